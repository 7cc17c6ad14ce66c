"""One decode step from the conv's output, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn_kernels.reference import _math
from gdn_kernels.reference.recurrent import step


def packed_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    *,
    num_k_heads: int,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    pad_slot_id: int = -1,
    rounding_seed: Tensor | None = None,
) -> Tensor:
    """Gate, sigmoid, l2norm and one token of the gated delta rule for each row; use it for decode.

    mixed_qkv ``[N, 2HK + HV V]`` in the order q, k, v; a, b ``[N, HV]``; A_log, dt_bias ``[HV]``; state
    ``[S, HV, V, K]`` is updated in place at state_indices ``[N]``. Returns o ``[N, HV, V]`` in mixed_qkv's dtype, zero
    for padding rows. Source: Yang et al., Gated Delta Networks, arXiv 2412.06464.
    """
    HV, V, K = state.shape[1:]
    key_dim = num_k_heads * K
    dtype, scale = _math.compute_dtype(mixed_qkv), _math.default_scale(scale, K)
    slots = _math.slots(state_indices, state.shape[0], pad_slot_id)
    rows = (slots >= 0).nonzero().squeeze(1)

    q, k, v = mixed_qkv[rows].split([key_dim, key_dim, HV * V], -1)
    q, k, v = q.unflatten(1, (num_k_heads, K)), k.unflatten(1, (num_k_heads, K)), v.unflatten(1, (HV, V))
    inputs = _math.delta_inputs(q, k, v, a[rows], b[rows], use_qk_l2norm=use_qk_l2norm, A_log=A_log, dt_bias=dt_bias)

    o = mixed_qkv.new_zeros(mixed_qkv.shape[0], HV, V)
    initial, work = torch.empty(2, HV, V, K, dtype=dtype)
    for row, slot, *token in zip(rows.tolist(), slots[rows].tolist(), *inputs, strict=True):
        S = _math.load_state(state, slot, True, initial, in_place=True)
        o[row] = step(S, *token, scale, work)
        _math.store_state(state[slot], S, _math.draw(rounding_seed, slot, 0))
    return o


def packed_decode_out(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    out: Tensor,
    state_indices: Tensor,
    **options: Any,
) -> None:
    """:func:`packed_decode` into ``out`` ``[N, HV, V]`` or ``[N, 1, HV, V]``; the same options."""
    out.copy_(packed_decode(mixed_qkv, a, b, A_log, dt_bias, state, state_indices, **options).view(out.shape))
