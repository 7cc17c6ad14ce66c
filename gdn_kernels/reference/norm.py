"""Gated normalisation and l2norm, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_kernels.reference import _math


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


def l2norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dim of x ``[..., D]``; returns a new tensor like x."""
    return x.new_empty(x.shape).copy_(_math.unit(x.to(_math.compute_dtype(x)), eps))
