"""Unpacks the interleaved input projections of Qwen3-Next.

    qkvz [T, H (2K + 2 r V)], per key head [q K | k K | v r V | z r V]   ->   mixed_qkv [T, 2 H K + HV V] (q | k | v),
                                                                              z [T, HV, V]
    ba   [T, H 2 r],          per key head [b r | a r]                   ->   b, a [T, HV]          r = HV / H

Row strides of qkvz and ba are free, columns contiguous; the results are contiguous. Bits are copied, no arithmetic.
One program takes one key head of a few rows.
"""

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels._math import stride_unit, wait_for_inputs


@triton.jit
def _copy(source, target, row_ok, cols, width: tl.constexpr, block: tl.constexpr):
    """Copy ``width`` columns of each row; ``source`` and ``target`` point at the first."""
    if width == block:
        mask = row_ok[:, None]
    else:
        mask = row_ok[:, None] & (cols < width)[None, :]
    tl.store(target + cols[None, :], tl.load(source + cols[None, :], mask=mask), mask=mask)


@triton.jit(do_not_specialize=["T", "stride_qkvz_t", "stride_ba_t"], do_not_specialize_on_alignment=["ba_ptr"])
def split_qkvz_ba_kernel(
    qkvz_ptr,
    ba_ptr,
    mixed_qkv_ptr,
    z_ptr,
    b_ptr,
    a_ptr,
    T: tl.int32,
    stride_qkvz_t: tl.int64,
    stride_ba_t: tl.int64,
    H: tl.constexpr,
    K: tl.constexpr,
    RATIO: tl.constexpr,
    V: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RV: tl.constexpr,
    BLOCK_RATIO: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    RV: tl.constexpr = RATIO * V
    HV: tl.constexpr = H * RATIO
    program = tl.program_id(0)
    head = program % H
    rows = (program // H) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok = rows < T
    rows = rows.to(tl.int64)[:, None]
    k_cols = tl.arange(0, BLOCK_K)
    v_cols = tl.arange(0, BLOCK_RV)
    gate_cols = tl.arange(0, BLOCK_RATIO)

    source = qkvz_ptr + rows * (stride_qkvz_t * STRIDE_UNIT) + head * (2 * K + 2 * RV)
    mixed = mixed_qkv_ptr + rows * (2 * H * K + HV * V)
    _copy(source, mixed + head * K, row_ok, k_cols, K, BLOCK_K)
    _copy(source + K, mixed + (H * K + head * K), row_ok, k_cols, K, BLOCK_K)
    _copy(source + 2 * K, mixed + (2 * H * K + head * RV), row_ok, v_cols, RV, BLOCK_RV)
    _copy(source + (2 * K + RV), z_ptr + rows * (HV * V) + head * RV, row_ok, v_cols, RV, BLOCK_RV)

    gates = ba_ptr + rows * stride_ba_t + head * (2 * RATIO)
    _copy(gates, b_ptr + rows * HV + head * RATIO, row_ok, gate_cols, RATIO, BLOCK_RATIO)
    _copy(gates + RATIO, a_ptr + rows * HV + head * RATIO, row_ok, gate_cols, RATIO, BLOCK_RATIO)


def split_qkvz_ba(
    qkvz: torch.Tensor, ba: torch.Tensor, *, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    T = qkvz.shape[0]
    ratio = num_v_heads // num_k_heads
    mixed_qkv = launch.empty(qkvz, T, 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim)
    z = launch.empty(qkvz, T, num_v_heads, head_v_dim)
    b = launch.empty(ba, T, num_v_heads)
    a = launch.empty(ba, T, num_v_heads)
    # A single row's stride says nothing about alignment: its width stands in.
    stride = qkvz.stride(0) if T != 1 else qkvz.shape[1]
    unit = stride_unit(qkvz.element_size(), stride)

    config = launch.config("split_qkvz_ba")
    launch.run(
        split_qkvz_ba_kernel,
        (triton.cdiv(T, config.block_rows) * num_k_heads,),
        qkvz,
        ba,
        mixed_qkv,
        z,
        b,
        a,
        T,
        stride // unit,
        ba.stride(0),
        config=config,
        H=num_k_heads,
        K=head_k_dim,
        RATIO=ratio,
        V=head_v_dim,
        STRIDE_UNIT=unit,
        BLOCK_ROWS=config.block_rows,
        BLOCK_K=triton.next_power_of_2(head_k_dim),
        BLOCK_RV=triton.next_power_of_2(ratio * head_v_dim),
        BLOCK_RATIO=triton.next_power_of_2(ratio),
    )
    return mixed_qkv, z, b, a
