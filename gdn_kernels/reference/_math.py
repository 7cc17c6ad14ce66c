"""What the reference operators share: one definition of each formula, and the walk over sequences and slots.

``torch.exp`` and ``torch.log1p`` give an element the same bits wherever it stands in a tensor. ``torch.sigmoid``,
``silu`` and ``exp2`` do not (their vector loops end in a scalar one), so none of them is used here.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

SOFTPLUS_THRESHOLD = 20.0  # above it softplus(x) rounds to x in fp32
L2NORM_EPS = 1e-6


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 input, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sigmoid(x: Tensor) -> Tensor:
    return torch.exp(-x).add_(1).reciprocal_()


def activate(x: Tensor, name: str | None) -> Tensor:
    if name is None:
        return x
    return sigmoid(x) if name == "sigmoid" else x * sigmoid(x)  # silu, and swish, its other name


def unit(x: Tensor, eps: float = L2NORM_EPS) -> Tensor:
    """Rows divided by sqrt(sum x^2 + eps)."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps)


def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, beta_scale: float, dtype: torch.dtype):
    """g = -exp(A_log) softplus(a + dt_bias) and beta = beta_scale sigmoid(b), in ``dtype``."""
    x = a.to(dtype) + dt_bias.to(dtype)
    softplus = torch.where(x > SOFTPLUS_THRESHOLD, x, torch.log1p(torch.exp(x)))
    return -torch.exp(A_log.to(dtype)) * softplus, beta_scale * sigmoid(b.to(dtype))


def spans(tokens: int, cu_seqlens: Tensor | None, batch: int = 1) -> list[tuple[int, int, int]]:
    """(batch row, first token, end) of each sequence, kept inside the buffer."""
    if cu_seqlens is None:
        return [(row, 0, tokens) for row in range(batch)]
    edges = [min(max(edge, 0), tokens) for edge in cu_seqlens.tolist()]
    return [(0, start, max(start, end)) for start, end in itertools.pairwise(edges)]


def slots(indices: Tensor, size: int, pad_slot_id: int) -> Tensor:
    """The indices as int64, with -1 for every one that is padding or outside a pool of ``size`` slots."""
    indices = indices.long()
    return torch.where((indices >= 0) & (indices < size) & (indices != pad_slot_id), indices, -1)


def own_slots(indices: Tensor | None, count: int, size: int, pad_slot_id: int = -1) -> Tensor:
    """:func:`slots`, where row n owns slot n if no indices are given (none of these is padding)."""
    return slots(torch.arange(count), size, -1) if indices is None else slots(indices, size, pad_slot_id)


def flags(has_initial_state: Tensor | None, count: int) -> list[bool]:
    return [True] * count if has_initial_state is None else has_initial_state.tolist()


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Key heads [..., H, K] repeated for the value heads [..., HV, K]: head hv reads hv // (HV / H)."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


def default_scale(scale: float | None, K: int) -> float:
    return K**-0.5 if scale is None else scale


def load_state(pool: Tensor, slot: int, keep: bool, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    """State [HV, V, K] to work on: the slot itself where asked and possible, or a copy; zeros if not ``keep``."""
    if not keep:
        return torch.zeros(pool.shape[1:], dtype=dtype)
    return pool[slot].to(dtype, copy=not in_place)


def store_state(pool: Tensor, slot: int, state: Tensor) -> None:
    target = pool[slot]
    if target.data_ptr() != state.data_ptr():
        target.copy_(state)


def delta_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    use_qk_l2norm: bool,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Some tokens' operands [L, HV, ...] in the compute dtype: heads expanded, l2norm and raw gates applied.

    It takes real tokens only, so that what padding holds is never read.
    """
    dtype = compute_dtype(q)
    q, k = q.to(dtype), k.to(dtype)
    if use_qk_l2norm:
        q, k = unit(q), unit(k)
    if A_log is not None:
        g, beta = gates(g, beta, A_log, dt_bias, beta_scale, dtype)
    heads = v.shape[-2]
    return expand_heads(q, heads), expand_heads(k, heads), v.to(dtype), g.to(dtype), beta.to(dtype)
