"""Compile cases of the delta rule: chunk, recurrent, verify and decode kernels over dtypes and head sizes."""

from __future__ import annotations

import contextlib
import functools
import itertools

import torch
from compile_cases import COMPILE_CASES, SPILL_BUDGET, case
from delta_cases import delta_inputs

from gdn_kernels import launch
from gdn_kernels.kernels import chunk, decode, recurrent

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _slots(count):
    return torch.arange(count, dtype=torch.int32)


def _parameters(HV):
    return {"A_log": torch.zeros(HV), "dt_bias": torch.zeros(HV)}


def chunk_case(dtype, K, V):
    inputs = delta_inputs((2, 2), H=2, HV=4, K=K, V=V, dtype=dtype)
    raw = [x.to(dtype) for x in inputs.tensors[3:]]
    pool = torch.zeros(4, 4, V, K)
    out = torch.empty_like(inputs.v)
    chunk.chunk_gated_delta_rule_paged_checkpoints(
        *inputs.tensors[:3],
        *raw,
        pool,
        out,
        pool.clone(),
        _slots(2),
        inputs.cu_seqlens,
        _slots(3),
        checkpoint_interval=64,
        has_initial_state=torch.ones(2, dtype=torch.bool),
        use_qk_l2norm=True,
        **_parameters(4),
    )


def plain_chunk_case(dtype, K, V, H=2, HV=4):
    inputs = delta_inputs((2,), H=H, HV=HV, K=K, V=V, dtype=dtype)
    chunk.chunk_gated_delta_rule(*inputs.tensors, initial_state=inputs.initial_state)


def overlapped_case(call, config):
    """The overlapped scan where it is made for, on other targets what their ladders say."""
    made_for = launch.target(torch.device("cpu")).arch == 90
    with launch.pinned("chunk_scan", config) if made_for else contextlib.nullcontext():
        call()


def recurrent_case(state_dtype, K, V, rounding_seed=None):
    inputs = delta_inputs((2, 2), H=2, HV=4, K=K, V=V, dtype=torch.bfloat16)
    pool = torch.zeros(4, 4, V, K, dtype=state_dtype)
    options = {"use_qk_l2norm": True, "rounding_seed": rounding_seed}
    recurrent.recurrent_gated_delta_rule_paged(
        *inputs.tensors, pool, _slots(2), cu_seqlens=inputs.cu_seqlens, write_indices=_slots(2), **options
    )
    rows = [x.reshape(2, 2, *x.shape[2:]) for x in inputs.tensors]
    table = torch.zeros(2, 2, dtype=torch.int32)
    recurrent.recurrent_gated_delta_rule_paged(*rows, pool, table, num_accepted_tokens=_slots(2), **options)
    kept = torch.zeros(2, 2, 4, V, K, dtype=state_dtype)
    recurrent.recurrent_gated_delta_rule_verify(
        *rows, pool, kept, _slots(2), intermediate_indices=_slots(2), parents=table, **options
    )


def decode_case(state_dtype, K, V, rounding_seed=None):
    decode.packed_decode(
        torch.zeros(2, 4 * K + 4 * V, dtype=torch.bfloat16),
        torch.zeros(2, 4, dtype=torch.bfloat16),
        torch.zeros(2, 4, dtype=torch.bfloat16),
        state=torch.zeros(4, 4, V, K, dtype=state_dtype),
        state_indices=_slots(2),
        num_k_heads=2,
        rounding_seed=rounding_seed,
        **_parameters(4),
    )


for dtype, (K, V) in itertools.product((torch.bfloat16,), ((64, 64), (128, 128), (256, 256))):
    case(f"chunk-{SHORT[dtype]}-{K}x{V}")(lambda dtype=dtype, K=K, V=V: chunk_case(dtype, K, V))
case("chunk-fp16-128x128-plain")(lambda: plain_chunk_case(torch.float16, 128, 128))
# Overlapped scans of 64 and of 128 rows, in the form of an engine with checkpoints and in the plain functional one.
for block_v, num_warps, stages, name, call, dtype, K in (
    (64, 4, 3, "bf16-64x128", plain_chunk_case, torch.bfloat16, 64),
    (64, 4, 3, "bf16-128x128", chunk_case, torch.bfloat16, 128),
    (128, 8, 2, "fp16-128x128", plain_chunk_case, torch.float16, 128),
):
    config = launch.ScanConfig(block_v, num_warps, stages, overlapped=True)
    call = functools.partial(overlapped_case, functools.partial(call, dtype, K, 128), config)
    case(f"chunk-overlapped-{block_v}-{name}")(call)
# Four value heads a program of the inverses.
case("chunk-bf16-128x128-8-of-32")(functools.partial(plain_chunk_case, torch.bfloat16, 128, 128, 8, 32))
for dtype, (K, V) in itertools.product((torch.bfloat16, torch.float32), ((64, 64), (128, 128), (256, 256))):
    case(f"recurrent-{SHORT[dtype]}-{K}x{V}")(lambda dtype=dtype, K=K, V=V: recurrent_case(dtype, K, V))
    case(f"decode-{SHORT[dtype]}-{K}x{V}")(lambda dtype=dtype, K=K, V=V: decode_case(dtype, K, V))
# A seed changes the stores alone: one head size.
for dtype in (torch.bfloat16, torch.float16):
    options = {"state_dtype": dtype, "K": 128, "V": 128, "rounding_seed": torch.zeros(1, dtype=torch.int64)}
    case(f"recurrent-rounded-{SHORT[dtype]}-128x128")(functools.partial(recurrent_case, **options))
    case(f"decode-rounded-{SHORT[dtype]}-128x128")(functools.partial(decode_case, **options))

# Bytes of spills as triton 3.6.0 and 3.9.0 compile, with room for the next version. The chunk kernels hold more tiles
# than fit the registers; a few numbers go to local memory, which L1 serves. Another tiling is not worth that yet.
for name in [name for name in COMPILE_CASES if name.startswith("chunk-")]:
    SPILL_BUDGET[name, "*"] = 320
    SPILL_BUDGET[name, "gfx942"] = 384
# None in the functional form with Triton 3.6.0; a few registers around checkpoints, and with 3.9.0.
for name in [name for name in COMPILE_CASES if name.startswith("chunk-overlapped-")]:
    SPILL_BUDGET[name, 90] = 96
for name in ("recurrent-fp32-128x128", "decode-fp32-128x128"):
    SPILL_BUDGET[name, "*"] = 16
# Up to five registers with Triton 3.9.0, where ptxas stops at 128 or 168 of them for the sake of occupancy.
for name in [name for name in COMPILE_CASES if "-rounded-" in name]:
    SPILL_BUDGET[name, "*"] = 32
# Two sums side by side take more registers; on sm_100, with Triton 3.6.0, two and four too many.
for name in ("recurrent-bf16-128x128", "recurrent-fp32-256x256"):
    SPILL_BUDGET[name, 100] = 16
