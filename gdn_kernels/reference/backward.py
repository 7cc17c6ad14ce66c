"""Backward formulas, in plain PyTorch for every device: each gives the gradients of its operator's inputs.

``grads`` are the gradients of the operator's results, ``inputs`` what it was given, ``needs`` which inputs' gradients
are asked for. Computed in fp32 (fp64 for fp64 input), rounded to each input's dtype; themselves differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


def joined(x: Tensor, windows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each sequence's window before its tokens: x ``[T, D]``, windows ``[N, C, D]``, offsets ``[N + 1]`` int64.

    Returns ``[T + N * C, D]``, the rows there of the tokens ``[T]`` and of the windows ``[N * C]``, and for each token
    how many offsets lie before or at it: 0 or N + 1 for tokens of no sequence, which stand at the ends.
    """
    count, columns = windows.shape[:2]
    index = torch.arange(x.shape[0], device=x.device)
    begun = torch.searchsorted(offsets, index, right=True)
    rows = index + columns * begun.clamp(max=count)
    starts = offsets[:-1] + columns * torch.arange(count, device=x.device)
    window_rows = (starts[:, None] + torch.arange(columns, device=x.device)).flatten()
    whole = x.new_zeros(x.shape[0] + count * columns, x.shape[1])
    whole = whole.index_copy(0, rows, x).index_copy(0, window_rows, windows.flatten(0, 1))
    return whole, rows, window_rows, begun


def causal_conv1d_inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    cu_seqlens: Tensor,
    *,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    activation: str | None,
    pad_slot_id: int,
) -> tuple[Tensor | None, ...]:
    """What the backward needs, before the pool is written: x, weight, bias, the window ``[N, W - 1, D]`` that each
    sequence starts from, cu_seqlens, and ``[N]`` whether it has a slot."""
    count, slots = cu_seqlens.shape[0] - 1, conv_state.shape[0]
    index = torch.arange(count, device=x.device) if state_indices is None else state_indices.long()
    has_slot = (index >= 0) & (index < slots) & (index != pad_slot_id)
    kept = has_slot if has_initial_state is None else has_slot & has_initial_state
    if slots == 0:
        windows = conv_state.new_zeros(count, *conv_state.shape[:0:-1])
    else:
        windows = conv_state[index.clamp(0, slots - 1)].transpose(1, 2).masked_fill(~kept[:, None, None], 0)
    return x, weight, bias, windows, cu_seqlens, has_slot


def causal_conv1d(
    grads: Inputs,
    inputs: Inputs,
    needs: Sequence[bool],
    *,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    activation: str | None,
    pad_slot_id: int,
) -> Gradients:
    """u[t] = bias + sum_j w_j x[t - (W - 1) + j], y = act(u): du = act'(u) dy, dx[t] = sum_j w_j du[t + (W - 1) - j],
    dw_j = sum_t du[t] x[t - (W - 1) + j], dbias = sum_t du[t]. ``inputs`` are those of ``causal_conv1d_inputs``.

    All sequences at once: with each one's window before its tokens no sum over columns reaches into another.
    """
    x, weight, bias, windows, cu_seqlens, has_slot = inputs
    dtype, last = compute_dtype(x), weight.shape[1] - 1
    columns, rows, _, begun = joined(x.to(dtype), windows.to(dtype), cu_seqlens.long())
    # tokens that are padding may hold anything, and their output is zero
    padding = ~F.pad(has_slot, (1, 1))[begun][:, None]
    columns = columns.index_copy(0, rows, columns[rows].masked_fill(padding, 0))
    du = torch.zeros_like(columns).index_copy(0, rows, grads[0].to(dtype).masked_fill(padding, 0))
    taps = weight.to(dtype).unbind(1)
    before = [F.pad(columns, (0, 0, last - j, 0))[: columns.shape[0]] for j in range(last + 1)]
    if activation is not None:
        u = sum(column * tap for column, tap in zip(before, taps, strict=True))
        u = u if bias is None else u + bias.to(dtype)
        s = torch.sigmoid(u)
        du = du * s * (1 + u * (1 - s))
    dx = dweight = dbias = None
    if needs[0]:
        dx = sum(F.pad(du, (0, 0, 0, last - j))[last - j :] * tap for j, tap in enumerate(taps))[rows]
    if needs[1]:
        dweight = torch.stack([(du * column).sum(0) for column in before], 1)
    if needs[2]:
        dbias = du.sum(0)
    return *_like([dx, dweight, dbias], inputs[:3]), None, None


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
