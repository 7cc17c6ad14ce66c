"""What the reference operators share: one definition of each formula, and the walk over sequences and slots.

``torch.exp`` and ``torch.log1p`` give an element the same bits wherever it stands in a tensor. ``torch.sigmoid``,
``silu`` and ``exp2`` do not (their vector loops end in a scalar one), so none of them is used here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

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


def load_state(pool: Tensor, slot: int, keep: bool, work: Tensor, in_place: bool = False) -> Tensor:
    """State [HV, V, K] to work on: the slot itself where asked and possible, else ``work`` with what it holds.

    Zeros if not ``keep``. One ``work`` serves a whole call: fresh memory for each state costs more than the arithmetic.
    """
    if not keep:
        return work.zero_()
    if in_place and pool.dtype == work.dtype:
        return pool[slot]
    return work.copy_(pool[slot])


def store_state(target: Tensor, state: Tensor, draw: Draw | None = None) -> None:
    """Write ``state`` to the slot ``target``, to nearest or with the random numbers of ``draw``."""
    if target.data_ptr() == state.data_ptr():
        return
    if draw is None or target.dtype not in ROUNDED_DTYPES:
        target.copy_(state)
    else:
        target.copy_(round_stochastically(state.to(torch.float32), draw.bits(state.shape), target.dtype))


# ---------------------------------------------------------------------------------------------------------------
# Stochastic rounding, with the random numbers of the kernels (kernels/_math.py)
# ---------------------------------------------------------------------------------------------------------------

ROUNDED_DTYPES = (torch.bfloat16, torch.float16)
_WORD = 0xFFFFFFFF


def philox(seed: int, counter: Sequence[Tensor]) -> list[Tensor]:
    """Philox 4x32-10: four words of 32 random bits for each counter of four such words, all in int64.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    low, high = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # a product of two words fills 64 bits; that it wraps to a negative number changes none of them
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _WORD) ^ c1 ^ low, b & _WORD
        c2, c3 = ((a >> 32) & _WORD) ^ c3 ^ high, a & _WORD
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which random numbers round a state: those of a seed, a slot (or row of a buffer) and a token of the call."""

    seed: int
    slot: int
    token: int

    def bits(self, shape: torch.Size) -> Tensor:
        """16 random bits for each element of a state, int32: eight neighbours share one call of Philox."""
        octets = torch.arange(math.prod(shape) // 8)
        slot, token = torch.tensor(self.slot), torch.tensor(self.token)
        words = torch.stack(philox(self.seed, (octets, slot, token, torch.tensor(0))), -1)
        return torch.stack([words & 0xFFFF, words >> 16], -1).view(shape).to(torch.int32)


def draw(rounding_seed: Tensor | None, slot: int, token: int) -> Draw | None:
    return None if rounding_seed is None else Draw(int(rounding_seed), slot, token)


def round_stochastically(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``x`` to bf16 or fp16: away from zero where random ``bits``, added below the last place kept, carry into it.

    What the dtype holds, infinities too, stays; past its largest number, that or infinity, by the same rule.
    """
    if dtype == torch.bfloat16:
        pattern = (x.view(torch.int32) + bits) & -0x10000
        rounded = pattern.view(torch.float32)
    else:
        # below 2^-14 the spacing stays that of 2^-14
        offset = torch.where(x.abs() < 2.0**-14, 2.0**-14, 0.0)
        pattern = ((x.abs() + offset).view(torch.int32) + (bits >> 3)) & -0x2000
        rounded = torch.copysign(pattern.view(torch.float32) - offset, x)
    return torch.where(x.isnan(), x, rounded).to(dtype)


# ---------------------------------------------------------------------------------------------------------------
# Operands of the delta rule
# ---------------------------------------------------------------------------------------------------------------


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
    """Some tokens' operands [..., HV, *] in the compute dtype: heads expanded, l2norm and raw gates applied.

    A token's are its own: what another one holds, padding's NaN too, does not reach them.
    """
    dtype = compute_dtype(q)
    q, k = q.to(dtype), k.to(dtype)
    if use_qk_l2norm:
        q, k = unit(q), unit(k)
    if A_log is not None:
        g, beta = gates(g, beta, A_log, dt_bias, beta_scale, dtype)
    heads = v.shape[-2]
    return expand_heads(q, heads), expand_heads(k, heads), v.to(dtype), g.to(dtype), beta.to(dtype)
