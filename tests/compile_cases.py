"""Calls that the compile tests make, one for each kernel variant worth a binary of its own, and their budgets.

Each case calls the package's launch functions on small CPU tensors; nothing runs, only shapes, dtypes and strides
count. To add a kernel: write a function under ``@case``, here or in a ``compile_cases_*.py`` beside this file, and one
under ``@sweep`` that takes a number of tokens: the kernel must need one binary for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gdn_kernels.kernels import conv, gating, norm, split

COMPILE_CASES: dict[str, Callable[[], None]] = {}
# Of these, the cases that write e4m3: where an architecture has none, the operator's contract refuses the call.
FP8_CASES: set[str] = set()
SWEEP_CASES: dict[str, Callable[[int], None]] = {}


def case(name: str, fp8: bool = False) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a case under ``name``; ``fp8``: it writes e4m3."""

    def register(call: Callable[[], None]) -> Callable[[], None]:
        COMPILE_CASES[name] = call
        if fp8:
            FP8_CASES.add(name)
        return call

    return register


def sweep(name: str) -> Callable[[Callable[[int], None]], Callable[[int], None]]:
    """Register a call over token counts under ``name``."""

    def register(call: Callable[[int], None]) -> Callable[[int], None]:
        SWEEP_CASES[name] = call
        return call

    return register


# Bytes of spills allowed, by (case, architecture) or (case, "*"); what is not listed may not spill.
SPILL_BUDGET: dict[tuple[str, int | str], int] = {
    # two registers, with Triton 3.6.0 alone; rows of more than 8,192 columns in fp32
    ("norm-fp8-layer-16384-fp32", 120): 8,
}


def spill_budget(name: str, arch: int | str) -> int:
    """Bytes that a kernel of case ``name`` may spill on ``arch``."""
    return SPILL_BUDGET.get((name, arch), SPILL_BUDGET.get((name, "*"), 0))


# ---------------------------------------------------------------------------------------------------------------
# Norm, gating, split, conv: the shapes of Qwen3-Next, 16 key heads, 32 value heads of 128, 8192 conv channels
# ---------------------------------------------------------------------------------------------------------------

BF16, FP32 = torch.bfloat16, torch.float32


@sweep("norm")
def norm_rms_gated(T: int) -> None:
    # z is a column view of the projections' output.
    wide = torch.empty(T, 12288, dtype=BF16)
    x, z = torch.empty(T, 32, 128, dtype=BF16), wide[:, 8192:].unflatten(1, (32, 128))
    norm.layer_norm_gated(x, torch.empty(128), None, z, norm_before_gate=True)


@case("norm-rms-gated-128")
def norm_rms_gated_128() -> None:
    norm_rms_gated(4)


@case("norm-layer-groups-gate-first")
def norm_layer_groups_gate_first() -> None:
    x, z = torch.empty(4, 4096, dtype=BF16), torch.empty(4, 4096, dtype=BF16)
    weight, bias = torch.empty(4096), torch.empty(4096)
    norm.layer_norm_gated(x, weight, bias, z, norm_before_gate=False, is_rms_norm=False, group_size=1024)


@case("norm-layer-16384-fp32")
def norm_layer_16384_fp32() -> None:
    x = torch.empty(2, 16384)
    norm.layer_norm_gated(x, torch.empty(16384), None, x, norm_before_gate=True, is_rms_norm=False)


@sweep("norm-fp8")
def norm_fp8(T: int) -> None:
    wide = torch.empty(T, 12288, dtype=BF16)
    x, z = torch.empty(T, 32, 128, dtype=BF16), wide[:, 8192:].unflatten(1, (32, 128))
    norm.layer_norm_gated_fp8(x, torch.empty(128), None, z, norm_before_gate=True)


@case("norm-fp8-128", fp8=True)
def norm_fp8_128() -> None:
    norm_fp8(4)


@case("norm-fp8-layer-groups-gate-first", fp8=True)
def norm_fp8_layer_groups_gate_first() -> None:
    x, z = torch.empty(4, 4096, dtype=BF16), torch.empty(4, 4096, dtype=BF16)
    weight, bias = torch.empty(4096), torch.empty(4096)
    norm.layer_norm_gated_fp8(x, weight, bias, z, norm_before_gate=False, is_rms_norm=False, group_size=1024)


@case("norm-fp8-layer-16384-fp32", fp8=True)
def norm_fp8_layer_16384_fp32() -> None:
    x = torch.empty(2, 16384)
    norm.layer_norm_gated_fp8(x, torch.empty(16384), None, x, norm_before_gate=True, is_rms_norm=False)


@sweep("l2norm")
def l2norm(T: int) -> None:
    norm.l2norm(torch.empty(T, 8192, dtype=BF16)[:, 2048:4096].unflatten(1, (16, 128)))


@case("l2norm-128")
def l2norm_128() -> None:
    l2norm(4)


@sweep("gating")
def gating_views(T: int) -> None:
    ba = torch.empty(T, 64, dtype=BF16)
    gating.gating(ba[:, 32:], ba[:, :32], torch.empty(32), torch.empty(32, dtype=BF16))


@case("gating-32")
def gating_32() -> None:
    gating_views(4)


@sweep("split")
def split_ratio_2(T: int) -> None:
    qkvz, ba = torch.empty(T, 12288, dtype=BF16), torch.empty(T, 64, dtype=BF16)
    split.split_qkvz_ba(qkvz, ba, num_k_heads=16, num_v_heads=32, head_k_dim=128, head_v_dim=128)


@case("split-r2")
def split_r2() -> None:
    split_ratio_2(4)


@case("split-r3")
def split_r3() -> None:
    qkvz, ba = torch.empty(4, 8192, dtype=BF16), torch.empty(4, 48, dtype=BF16)
    split.split_qkvz_ba(qkvz, ba, num_k_heads=8, num_v_heads=24, head_k_dim=128, head_v_dim=128)


def _conv_inputs(channel_last: bool, columns: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, bias = torch.empty(8192, 4, dtype=BF16), torch.empty(8192, dtype=BF16)
    if channel_last:
        return weight, bias, torch.empty(4, columns, 8192, dtype=BF16).transpose(1, 2)
    return weight, bias, torch.empty(4, 8192, columns, dtype=BF16)


@sweep("conv")
def conv_packed(T: int) -> None:
    N = 1 + T // 3
    x, indices = torch.empty(T, 12288, dtype=BF16)[:, :8192], torch.zeros(N, dtype=torch.int32)
    # Odd offsets: slices of a batch's metadata need not start on 16 bytes.
    cu_seqlens, has_initial_state = torch.zeros(N + 1 + T % 2, dtype=torch.int32), torch.zeros(N, dtype=torch.bool)
    weight, bias, state = _conv_inputs(channel_last=True)
    options = {"state_indices": indices, "has_initial_state": has_initial_state}
    conv.causal_conv1d(x, weight, bias, state, cu_seqlens[T % 2 :], **options)


@case("conv-channel-last")
def conv_channel_last() -> None:
    conv_packed(64)


@case("conv-time-last")
def conv_time_last() -> None:
    weight, _, state = _conv_inputs(channel_last=False)
    conv.causal_conv1d(
        torch.empty(64, 8192, dtype=BF16), weight, None, state, torch.zeros(3, dtype=torch.int64), activation=None
    )


@sweep("conv-update")
def conv_update(N: int) -> None:
    weight, bias, state = _conv_inputs(channel_last=True)
    indices = torch.zeros(N, dtype=torch.int32)
    x = torch.empty(N, 12288, dtype=BF16)[:, :8192]
    conv.causal_conv1d_update(x, weight, bias, state, state_indices=indices)


@case("conv-update-1")
def conv_update_1() -> None:
    conv_update(4)


@case("conv-update-8-accepted")
def conv_update_8_accepted() -> None:
    weight, bias, state = _conv_inputs(channel_last=False, columns=10)
    indices = torch.zeros(4, dtype=torch.int32)
    x = torch.empty(4, 8, 8192, dtype=BF16)
    conv.causal_conv1d_update(x, weight, bias, state, state_indices=indices, num_accepted_tokens=indices)


@case("conv-update-16-accepted")
def conv_update_16_accepted() -> None:
    weight, bias, state = _conv_inputs(channel_last=True, columns=18)
    indices = torch.zeros(4, dtype=torch.int32)
    x = torch.empty(4, 16, 8192, dtype=BF16)
    conv.causal_conv1d_update(x, weight, bias, state, state_indices=indices, num_accepted_tokens=indices)


@sweep("conv-verify")
def conv_verify(N: int) -> None:
    weight, bias, state = _conv_inputs(channel_last=False)
    indices, parents = torch.zeros(N, dtype=torch.int32), torch.zeros(N, 16, dtype=torch.int32)
    windows = torch.empty(N, 16, 8192, 3, dtype=BF16)
    x = torch.empty(N, 16, 8192, dtype=BF16)
    options = {"state_indices": indices, "intermediate_indices": indices, "parents": parents}
    conv.causal_conv1d_verify(x, weight, bias, state, windows, **options)


@case("conv-verify-16-tree")
def conv_verify_16_tree() -> None:
    conv_verify(4)
