"""Backward formulas, in plain PyTorch for every device: each gives the gradients of its operator's inputs.

``grads`` are the gradients of the operator's results, ``inputs`` what it was given, ``needs`` which inputs' gradients
are asked for. Computed in fp32 (fp64 for fp64 input), rounded to each input's dtype; themselves differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdn_kernels.reference._math import SOFTPLUS_THRESHOLD, compute_dtype

Inputs = Sequence[Tensor | None]
Gradients = tuple[Tensor | None, ...]


def _sum_rows(x: Tensor) -> Tensor:
    """``[..., D]`` summed over all but the last dimension."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def _like(gradients: Sequence[Tensor | None], inputs: Inputs) -> Gradients:
    return tuple(None if d is None else d.to(x.dtype) for d, x in zip(gradients, inputs, strict=True))


def l2norm(grads: Inputs, inputs: Inputs, needs: Sequence[bool], *, eps: float) -> Gradients:
    """y = r x, r = 1 / sqrt(sum x^2 + eps): dx = r (dy - y (y . dy))."""
    x, dy = (t.to(compute_dtype(inputs[0])) for t in (inputs[0], grads[0]))
    r = torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
    y = x * r
    return _like([r * (dy - y * (y * dy).sum(-1, keepdim=True))], inputs)


def gating(grads: Inputs, inputs: Inputs, needs: Sequence[bool], *, beta_scale: float) -> Gradients:
    """g = -exp(A_log) softplus(x), x = a + dt_bias, and beta = beta_scale s(b), with s the sigmoid and s' = s (1 - s).

    dx = -exp(A_log) s(x) dg (s = 1 above the threshold of softplus), dA_log = g dg, db = beta_scale s'(b) dbeta.
    """
    dtype = compute_dtype(inputs[0])
    a, b, A_log, dt_bias = (t.to(dtype) for t in inputs)
    dg, dbeta = (t.to(dtype) for t in grads)
    x, decay, strength = a + dt_bias, -torch.exp(A_log), torch.sigmoid(b)
    above = x > SOFTPLUS_THRESHOLD
    softplus = torch.where(above, x, torch.log1p(torch.exp(x)))
    da = decay * torch.where(above, 1.0, torch.sigmoid(x)) * dg
    db = beta_scale * strength * (1 - strength) * dbeta
    return _like([da, db, _sum_rows(decay * softplus * dg), _sum_rows(da)], inputs)


def layer_norm_gated(
    grads: Inputs,
    inputs: Inputs,
    needs: Sequence[bool],
    *,
    norm_before_gate: bool,
    is_rms_norm: bool,
    eps: float,
    group_size: int | None,
    activation: str,
) -> Gradients:
    """n = (t - mean t) r, r = 1 / sqrt(mean (t - mean t)^2 + eps) (RMS norm: without the means of t), u = n w + bias.

    dt = r (dn - mean dn - n mean(n dn)). Norm before gate: t = x, y = u act(z); else t = x act(z), y = u.
    """
    x, weight, bias, z = inputs
    dtype = compute_dtype(x)
    size = group_size or x.shape[-1]

    def groups(t: Tensor) -> Tensor:
        return t.unflatten(-1, (t.shape[-1] // size, size))

    dy, t, w = grads[0].to(dtype), x.to(dtype), weight.to(dtype)
    act = slope = None
    if z is not None:
        gate = z.to(dtype)
        s = torch.sigmoid(gate)
        act = s if activation == "sigmoid" else gate * s
        slope = s * (1 - s) if activation == "sigmoid" else s * (1 + gate * (1 - s))
        if not norm_before_gate:
            t = t * act
    t = groups(t)
    if not is_rms_norm:
        t = t - t.mean(-1, keepdim=True)
    r = torch.rsqrt((t * t).mean(-1, keepdim=True) + eps)
    n = t * r

    du = dy if act is None or not norm_before_gate else dy * act
    dn = groups(du * w)
    dt = dn - n * (n * dn).mean(-1, keepdim=True)
    if not is_rms_norm:
        dt = dt - dn.mean(-1, keepdim=True)
    dx, n = (r * dt).flatten(-2), n.flatten(-2)
    dweight = _sum_rows(du * n) if needs[1] else None
    dbias = _sum_rows(du) if needs[2] else None
    dz = None
    if act is not None and norm_before_gate:
        dz = dy * (n * w if bias is None else n * w + bias.to(dtype)) * slope
    elif act is not None:
        dz, dx = dx * x.to(dtype) * slope, dx * act
    return _like([dx, dweight, dbias, dz], inputs)
