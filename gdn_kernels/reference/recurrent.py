"""The gated delta rule token by token, in plain PyTorch: the oracle of every other form.

Per value head, with S ``[V, K]``: ``S <- exp(g) S``, ``S <- S + beta (v - S k) k^T``, ``o = scale S q``.
Source: Yang et al., Gated Delta Networks, arXiv 2412.06464.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_kernels.reference import _math


def step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
    """One token: updates S [HV, V, K] in place and returns o [HV, V]; q, k [HV, K], v [HV, V], g, beta [HV]."""
    q, k = q[:, None, :], k[:, None, :]
    S.mul_(torch.exp(g)[:, None, None])
    error = v - (S * k).sum(-1)
    S.add_((beta[:, None] * error)[:, :, None] * k)
    return scale * (S * q).sum(-1)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over whole sequences, functional, token by token; the oracle, in fp64 for fp64 input.

    q, k ``[B, T, H, K]``, v ``[B, T, HV, V]``, g (natural log), beta ``[B, T, HV]``, or the raw a, b with A_log and
    dt_bias ``[HV]``; initial_state ``[N, HV, V, K]``; with cu_seqlens ``[N+1]`` B is 1. Returns o ``[B, T, HV, V]``
    in v's dtype, zero past the last sequence, and final_state ``[N, HV, V, K]``. Source: arXiv 2412.06464.
    """
    dtype, scale = _math.compute_dtype(q), _math.default_scale(scale, q.shape[-1])
    sequences = _math.spans(q.shape[1], cu_seqlens, q.shape[0])
    o = v.new_zeros(v.shape)
    final_state = torch.zeros(len(sequences), *v.shape[2:], q.shape[-1], dtype=dtype)
    if initial_state is not None:
        final_state.copy_(initial_state)
    options = {"use_qk_l2norm": use_qk_l2norm, "A_log": A_log, "dt_bias": dt_bias, "beta_scale": beta_scale}
    for (row, start, end), S in zip(sequences, final_state, strict=True):
        inputs = _math.delta_inputs(*(x[row, start:end] for x in (q, k, v, g, beta)), **options)
        for i, token in enumerate(zip(*inputs, strict=True)):
            o[row, start + i] = step(S, *token, scale)
    return o, final_state


def recurrent_gated_delta_rule_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    write_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
) -> Tensor:
    """The rule on a state pool, in place; use it for decode and for verify with a slot a token.

    q, k ``[N, t, H, K]``, v ``[N, t, HV, V]``, g, beta ``[N, t, HV]``, or packed with B = 1 and cu_seqlens ``[N+1]``.
    state ``[S, HV, V, K]`` is written: with state_indices ``[N]`` once, after the last token, at write_indices
    ``[N]`` (default: the slot read); with ``[N, t_max]`` after each token at its own index, the slot read being that of
    column num_accepted_tokens[n] - 1 (default 0). Returns o like v, zero for padding. Source: arXiv 2412.06464.
    """
    dtype, scale = _math.compute_dtype(q), _math.default_scale(scale, q.shape[-1])
    sequences = _math.spans(q.shape[1], cu_seqlens, q.shape[0])
    keeps = _math.flags(has_initial_state, len(sequences))
    slots = _math.slots(state_indices, state.shape[0], pad_slot_id)
    per_token = slots.dim() == 2
    if not per_token:
        reads = slots.tolist()
        writes = reads if write_indices is None else _math.slots(write_indices, state.shape[0], pad_slot_id).tolist()
    else:
        writes = slots.tolist()
        accepted = [1] * len(sequences) if num_accepted_tokens is None else num_accepted_tokens.tolist()
        reads = [row[count - 1] if 1 <= count <= len(row) else -1 for row, count in zip(writes, accepted, strict=True)]

    o = v.new_zeros(v.shape)
    options = {"use_qk_l2norm": use_qk_l2norm, "A_log": A_log, "dt_bias": dt_bias, "beta_scale": beta_scale}
    for n, (row, start, end) in enumerate(sequences):
        if reads[n] < 0 or start == end:
            continue
        inputs = _math.delta_inputs(*(x[row, start:end] for x in (q, k, v, g, beta)), **options)
        S = _math.load_state(state, reads[n], keeps[n], dtype, in_place=not per_token and writes[n] == reads[n])
        for i, token in enumerate(zip(*inputs, strict=True)):
            o[row, start + i] = step(S, *token, scale)
            if per_token and i < len(writes[n]) and writes[n][i] >= 0:
                _math.store_state(state, writes[n][i], S)
        if not per_token and writes[n] >= 0:
            _math.store_state(state, writes[n], S)
    return o


def recurrent_gated_delta_rule_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    intermediate_states: Tensor,
    state_indices: Tensor,
    *,
    intermediate_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    parents: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
) -> Tensor:
    """The rule over draft tokens, a chain or a tree, that leaves the pool alone; use it for verify.

    Shapes as in :func:`recurrent_gated_delta_rule_paged` with state_indices ``[N]``. intermediate_states
    ``[M, t_max, HV, V, K]``: entry ``[intermediate_indices[n] (or n), i]`` gets the state after token i, where it
    exists. parents ``[N, t_max]``: the token whose stored state each one starts from; outside 0..i-1, or not
    stored, it starts from the pool's. Returns o like v, zero for padding. Source: arXiv 2412.06464.
    """
    dtype, scale = _math.compute_dtype(q), _math.default_scale(scale, q.shape[-1])
    sequences = _math.spans(q.shape[1], cu_seqlens, q.shape[0])
    keeps = _math.flags(has_initial_state, len(sequences))
    reads = _math.slots(state_indices, state.shape[0], pad_slot_id).tolist()
    targets = _math.own_slots(intermediate_indices, len(sequences), intermediate_states.shape[0]).tolist()
    tree = None if parents is None else parents.tolist()

    o = v.new_zeros(v.shape)
    options = {"use_qk_l2norm": use_qk_l2norm, "A_log": A_log, "dt_bias": dt_bias, "beta_scale": beta_scale}
    for n, (row, start, end) in enumerate(sequences):
        if reads[n] < 0 or start == end:
            continue
        inputs = _math.delta_inputs(*(x[row, start:end] for x in (q, k, v, g, beta)), **options)
        # How many of the row's states are stored: its buffer's length, or none where it has no buffer.
        stored = intermediate_states.shape[1] if targets[n] >= 0 else 0
        initial = _math.load_state(state, reads[n], keeps[n], dtype)
        S = initial.clone()
        for i, token in enumerate(zip(*inputs, strict=True)):
            if tree is not None:
                parent = tree[n][i] if i < len(tree[n]) else -1
                follows = 0 <= parent < min(i, stored)
                S.copy_(intermediate_states[targets[n], parent] if follows else initial)
            o[row, start + i] = step(S, *token, scale)
            if i < stored:
                intermediate_states[targets[n], i].copy_(S)
    return o
