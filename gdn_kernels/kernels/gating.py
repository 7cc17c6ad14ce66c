"""Gates of the delta rule.

    g    = -exp(A_log) * softplus(a + dt_bias)        natural log of the decay, <= 0
    beta = beta_scale * sigmoid(b)

a, b ``[..., HV]`` with one or two row dimensions of any stride, last dim contiguous; A_log, dt_bias ``[HV]``; g and
beta fp32, contiguous, of a's shape. Everything is computed in fp32. One program takes a few rows of all heads.
Leaves out fp64, which the reference covers.
"""

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels._math import gate, sigmoid, wait_for_inputs


@triton.jit(
    do_not_specialize=["n_rows", "n_inner", "stride_a_outer", "stride_a_inner", "stride_b_outer", "stride_b_inner"],
    do_not_specialize_on_alignment=["a_ptr", "b_ptr"],
)
def gating_kernel(
    a_ptr,
    b_ptr,
    A_log_ptr,
    dt_bias_ptr,
    g_ptr,
    beta_ptr,
    n_rows: tl.int32,
    n_inner: tl.int32,
    stride_a_outer: tl.int64,
    stride_a_inner: tl.int64,
    stride_b_outer: tl.int64,
    stride_b_inner: tl.int64,
    beta_scale,
    HV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HV: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    heads = tl.arange(0, BLOCK_HV)
    head_ok = heads < HV
    ok = (rows < n_rows)[:, None] & head_ok[None, :]
    outer = (rows // n_inner).to(tl.int64)[:, None]
    inner = (rows % n_inner).to(tl.int64)[:, None]

    a_offsets = outer * stride_a_outer + inner * stride_a_inner + heads[None, :]
    b_offsets = outer * stride_b_outer + inner * stride_b_inner + heads[None, :]
    a = tl.load(a_ptr + a_offsets, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + b_offsets, mask=ok, other=0.0).to(tl.float32)
    A_log = tl.load(A_log_ptr + heads, mask=head_ok, other=0.0).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + heads, mask=head_ok, other=0.0).to(tl.float32)

    out_offsets = rows.to(tl.int64)[:, None] * HV + heads[None, :]
    tl.store(g_ptr + out_offsets, gate(a, A_log[None, :], dt_bias[None, :]), mask=ok)
    tl.store(beta_ptr + out_offsets, beta_scale * sigmoid(b), mask=ok)


def gating(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, *, beta_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads = a.shape[-1]
    g = launch.empty(a, *a.shape, dtype=torch.float32)
    beta = launch.empty(a, *a.shape, dtype=torch.float32)
    n_inner = a.shape[1] if a.dim() == 3 else 1
    n_rows = a.shape[0] * n_inner

    config = launch.config("gating")
    launch.run(
        gating_kernel,
        (triton.cdiv(n_rows, config.block_rows),),
        a,
        b,
        A_log,
        dt_bias,
        g,
        beta,
        n_rows,
        n_inner,
        a.stride(0),
        a.stride(1) if a.dim() == 3 else 0,
        b.stride(0),
        b.stride(1) if b.dim() == 3 else 0,
        float(beta_scale),
        config=config,
        HV=num_heads,
        BLOCK_ROWS=config.block_rows,
        BLOCK_HV=triton.next_power_of_2(num_heads),
    )
    return g, beta
