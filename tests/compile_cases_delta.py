"""Compile cases of the delta rule: chunk, recurrent, verify and decode kernels over dtypes and head sizes."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch
import triton
from compile_cases import COMPILE_CASES, SPILL_BUDGET, case, sweep
from delta_cases import delta_inputs

from gdn_kernels import launch
from gdn_kernels.kernels import chunk, chunk_segments, decode, recurrent

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _slots(count):
    return torch.arange(count, dtype=torch.int32)


def _parameters(HV):
    return {"A_log": torch.zeros(HV), "dt_bias": torch.zeros(HV)}


def chunk_case(dtype, K, V, tokens=2):
    inputs = delta_inputs((2, tokens), H=2, HV=4, K=K, V=V, dtype=dtype)
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


def plain_chunk_case(dtype, K, V, H=2, HV=4, tokens=2):
    inputs = delta_inputs((tokens,), H=H, HV=HV, K=K, V=V, dtype=dtype)
    chunk.chunk_gated_delta_rule(*inputs.tensors, initial_state=inputs.initial_state)


def segments_case(K, V, tokens=4100, *, has_slots):
    # the chooser cuts nothing but for sm_90: elsewhere its own tile, and as many segments
    config = launch.config("chunk_segments", 8, V, launch.target(torch.device("cpu")))
    config = dataclasses.replace(config, max_segments=8, min_tokens=1024, long_tokens=1024, map_tokens=1024)
    cu_seqlens = torch.tensor([0, tokens, tokens], dtype=torch.int32) if has_slots else None
    num_maps = chunk_segments.num_places(2, tokens, cu_seqlens, config, 1024)
    chunk_segments.combine(
        torch.empty(num_maps, 4, V + K, K),
        torch.empty(num_maps, 4, V, K),
        torch.zeros(num_maps, 4, dtype=torch.int32),
        torch.empty(4, 4, V, K) if has_slots else None,
        cu_seqlens=cu_seqlens,
        count=2,
        tokens=tokens,
        read=_slots(2) if has_slots else None,
        has_initial_state=torch.ones(2, dtype=torch.bool) if has_slots else None,
        pad_slot_id=-1,
        config=config,
    )


def cut_chunk_case():
    """A long sequence in segments, where the architecture's scan walks them: the map pass, the joining, the scan."""
    config = launch.SegmentConfig(max_segments=2, min_tokens=64, long_tokens=128, map_tokens=128)
    with launch.pinned("chunk_segments", config):
        chunk_case(torch.bfloat16, 128, 128, tokens=130)
        if launch.has_descriptors(launch.target(torch.device("cpu"))):
            plain_chunk_case(torch.bfloat16, 128, 128, tokens=130)


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
case("segments-128x128")(lambda: segments_case(128, 128, has_slots=True))
case("segments-64x64-plain")(lambda: segments_case(64, 64, has_slots=False))
sweep("segments")(lambda T: segments_case(64, 64, T, has_slots=True))
case("chunk-fp16-128x128-plain")(lambda: plain_chunk_case(torch.float16, 128, 128))
# Four value heads a program of the inverses, and on sm_90 programs of 128 rows of the state.
case("chunk-bf16-128x128-32-of-128")(functools.partial(plain_chunk_case, torch.bfloat16, 128, 128, 32, 128))
case("chunk-bf16-128x128-segments")(cut_chunk_case)
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
# On sm_90 Triton 3.9 has the scans assembled with --regAllocOptLevel=2, against a fault of ptxas: 128 and 172 bytes
# then, most of them where an item begins. Triton 3.6 spills 4.
NEW = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
SPILL_BUDGET["chunk-bf16-128x128-32-of-128", 90] = 160 if NEW else 16
SPILL_BUDGET["chunk-bf16-128x128-segments", 90] = 224 if NEW else 32
for name in ("recurrent-fp32-128x128", "decode-fp32-128x128"):
    SPILL_BUDGET[name, "*"] = 16
# Up to five registers with Triton 3.9.0, where ptxas stops at 128 or 168 of them for the sake of occupancy.
for name in [name for name in COMPILE_CASES if "-rounded-" in name]:
    SPILL_BUDGET[name, "*"] = 32
# Two sums side by side take more registers; on sm_100, with Triton 3.6.0, two and four too many.
for name in ("recurrent-bf16-128x128", "recurrent-fp32-256x256"):
    SPILL_BUDGET[name, 100] = 16
