"""Gated normalisation, its quantisation to e4m3, and l2norm, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_kernels.reference import _math

E4M3_MAX = 448.0
QUANT_EPS = 1e-10  # least maximum of a group, as in the engines' per_token_group_quant_fp8


def layer_norm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    norm_before_gate: bool,
    is_rms_norm: bool = True,
    eps: float = 1e-6,
    group_size: int | None = None,
    activation: str = "silu",
) -> Tensor:
    """norm(x) w + b, times act(z) after the norm or, with ``norm_before_gate=False``, before it.

    x, z ``[..., D]``, weight, bias ``[D]``; groups of ``group_size`` along D are normalised apart. Returns a new
    tensor like x. Source: RMSNorm (arXiv 1910.07467), gated as in Gated Delta Networks (arXiv 2412.06464).
    """
    out = x.new_empty(x.shape)
    layer_norm_gated_out(
        x,
        weight,
        bias,
        z,
        out,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        eps=eps,
        group_size=group_size,
        activation=activation,
    )
    return out


def layer_norm_gated_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    out: Tensor,
    *,
    norm_before_gate: bool,
    is_rms_norm: bool = True,
    eps: float = 1e-6,
    group_size: int | None = None,
    activation: str = "silu",
) -> None:
    """:func:`layer_norm_gated` into ``out`` ``[..., D]``, which may be x itself."""
    dtype = _math.compute_dtype(x)
    gate = None if z is None else _math.activate(z.to(dtype), activation)
    y = x.to(dtype)
    if gate is not None and not norm_before_gate:
        y = y * gate

    size = group_size or x.shape[-1]
    y = y.unflatten(-1, (x.shape[-1] // size, size))
    if not is_rms_norm:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    y = y.flatten(-2) * weight.to(dtype)

    if bias is not None:
        y = y + bias.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    out.copy_(y)


def layer_norm_gated_fp8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    norm_before_gate: bool,
    is_rms_norm: bool = True,
    eps: float = 1e-6,
    group_size: int | None = None,
    activation: str = "silu",
    quant_group_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """:func:`layer_norm_gated`, then e4m3 values like x and fp32 scales ``[T, columns of a token / quant_group_size]``.

    scale = max(max |y|, 1e-10) / 448 over each group of y in x's dtype; value = y / scale, rounded to nearest even.
    """
    y = layer_norm_gated(
        x,
        weight,
        bias,
        z,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        eps=eps,
        group_size=group_size,
        activation=activation,
    )
    groups = y.to(_math.compute_dtype(y)).view(*y.shape[:-1], y.shape[-1] // quant_group_size, quant_group_size)
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(QUANT_EPS) / E4M3_MAX
    values = (groups / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.view(y.shape), scales.float().view(y.shape[0], y.shape[1:].numel() // quant_group_size)


def l2norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dim of x ``[..., D]``; returns a new tensor like x."""
    return x.new_empty(x.shape).copy_(_math.unit(x.to(_math.compute_dtype(x)), eps))
