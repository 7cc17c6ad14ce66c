"""The gated delta rule token by token, in plain PyTorch: the oracle of every other form.

Per value head, with S ``[V, K]``: ``S <- exp(g) S``, ``S <- S + beta (v - S k) k^T``, ``o = scale S q``.
Source: Yang et al., Gated Delta Networks, arXiv 2412.06464.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_kernels.reference import _math


def step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, work: Tensor) -> Tensor:
    """One token: updates S [HV, V, K] in place and returns o [HV, V]; q, k [HV, K], v [HV, V], g, beta [HV].

    ``work`` has the shape of S and is overwritten. A state at a time stays in the cache for all passes over it, and its
    bits cannot depend on the batch.
    """
    q, k = q[:, None, :], k[:, None, :]
    S.mul_(torch.exp(g)[:, None, None])
    error = v - torch.mul(S, k, out=work).sum(-1)
    S.addcmul_((beta[:, None] * error)[:, :, None], k)
    return scale * torch.mul(S, q, out=work).sum(-1)


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
    work = final_state.new_empty(final_state.shape[1:])
    for (row, start, end), S in zip(sequences, final_state, strict=True):
        inputs = _math.delta_inputs(*(x[row, start:end] for x in (q, k, v, g, beta)), **options)
        for i, token in enumerate(zip(*inputs, strict=True)):
            o[row, start + i] = step(S, *token, scale, work)
    return o, final_state


def _tokens(
    sequences: list[tuple[int, int, int]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    beta_scale: float,
) -> tuple[Tensor, ...]:
    """Operands of all tokens up to the last sequence's end: one pass over them, since each row has but a few."""
    end = max((end for *_, end in sequences), default=0)
    options = {"use_qk_l2norm": use_qk_l2norm, "A_log": A_log, "dt_bias": dt_bias, "beta_scale": beta_scale}
    return _math.delta_inputs(*(x[:, :end] for x in (q, k, v, g, beta)), **options)


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
    rounding_seed: Tensor | None = None,
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
    inputs = _tokens(sequences, q, k, v, g, beta, use_qk_l2norm, A_log, dt_bias, beta_scale)
    initial, work = torch.empty(2, *state.shape[1:], dtype=dtype)
    for n, (row, start, end) in enumerate(sequences):
        if reads[n] < 0 or start == end:
            continue
        S = _math.load_state(state, reads[n], keeps[n], initial, in_place=not per_token and writes[n] == reads[n])
        for i, token in enumerate(zip(*(x[row, start:end] for x in inputs), strict=True)):
            o[row, start + i] = step(S, *token, scale, work)
            if not per_token:
                slot = writes[n] if start + i == end - 1 else -1
            else:
                slot = writes[n][i] if i < len(writes[n]) else -1
            if slot >= 0:
                _math.store_state(state[slot], S, _math.draw(rounding_seed, slot, i))
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
    rounding_seed: Tensor | None = None,
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
    inputs = _tokens(sequences, q, k, v, g, beta, use_qk_l2norm, A_log, dt_bias, beta_scale)
    initial, S, work = torch.empty(3, *state.shape[1:], dtype=dtype)
    for n, (row, start, end) in enumerate(sequences):
        if reads[n] < 0 or start == end:
            continue
        # How many of the row's states are stored: its buffer's length, or none where it has no buffer.
        stored = intermediate_states.shape[1] if targets[n] >= 0 else 0
        S.copy_(_math.load_state(state, reads[n], keeps[n], initial))
        for i, token in enumerate(zip(*(x[row, start:end] for x in inputs), strict=True)):
            if tree is not None:
                parent = tree[n][i] if i < len(tree[n]) else -1
                follows = 0 <= parent < min(i, stored)
                S.copy_(intermediate_states[targets[n], parent] if follows else initial)
            o[row, start + i] = step(S, *token, scale, work)
            if i < stored:
                draw = _math.draw(rounding_seed, targets[n], i)
                _math.store_state(intermediate_states[targets[n], i], S, draw)
    return o
