"""The gated delta rule in chunks of 64 tokens, in plain PyTorch: the same map as recurrent.py, as matrix products.

Per chunk and value head, with gamma the decay summed from the chunk's start and G_ij = gamma_i / gamma_j for i >= j:

    L = strictly lower part of diag(beta) K K^T        T = (I + L)^-1 diag(beta)
    X = T^T K                                          R = lower part of Q K^T, times T
    W = V - gamma * (K S^T)
    O = scale (gamma * (Q S^T) + (G * R) W)            S <- gamma_C S + ((gamma_C / gamma) * W)^T X

T is free of the gates because (I + L * G)^-1 = G * (I + L)^-1: conjugation by diag(gamma) commutes with the inverse
(a form of the WY representation of Yang et al., Gated Delta Networks, arXiv 2412.06464). No exponent is positive.
Sequences are worked one by one, so that one's bits do not depend on its batch; the last chunk is as long as the tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gdn_kernels.reference import _math

CHUNK = 64
BLOCK = 16  # chunks prepared at once: bounds the scratch, [BLOCK, HV, 64, 64] a matrix
MIN_LOG_DECAY = -60 * math.log(2)  # of one token: finite, so that no -inf - (-inf) arises, and 2^-60 is nothing


def _block(q, k, v, g, beta, S: Tensor, scale: float, out: Tensor) -> Iterator[None]:
    """n chunks [n, C, HV, ...] of one sequence: writes out [n, C, HV, V] and S [HV, V, K]; yields after each chunk."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [n, HV, C, .]
    g, beta = g.transpose(1, 2), beta.transpose(1, 2).contiguous()

    # Summed and subtracted in fp64: after a gate of -inf the difference of two large sums would lose fp32's digits.
    log_gamma = g.double().clamp(min=MIN_LOG_DECAY).cumsum(-1)
    C = log_gamma.shape[-1]
    future = torch.ones(C, C, dtype=torch.bool).triu(1)
    log_G = (log_gamma[..., :, None] - log_gamma[..., None, :]).to(q.dtype)
    G = log_G.masked_fill_(future, -torch.inf).exp_()
    gamma = log_gamma.to(q.dtype).exp()[..., None]
    to_end = (log_gamma[..., -1:] - log_gamma).to(q.dtype).exp()[..., None]

    k_t = k.transpose(-1, -2)
    L = beta[..., None] * (k @ k_t)  # the solver reads its strictly lower part only
    T = torch.linalg.solve_triangular(L, torch.diag_embed(beta), upper=False, unitriangular=True)
    X = T.transpose(-1, -2) @ k
    GR = G * ((q @ k_t).tril() @ T)
    kq = torch.cat([k, q], -2)

    for c in range(len(q)):
        K_S, Q_S = (kq[c] @ S.transpose(-1, -2)).split(C, -2)
        W = v[c] - gamma[c] * K_S
        o = scale * (gamma[c] * Q_S + GR[c] @ W)
        out[c].copy_(o.transpose(0, 1))
        S.mul_(gamma[c, :, -1:]).baddbmm_((to_end[c] * W).transpose(-1, -2), X[c])
        yield


def _sequence(inputs, S: Tensor, scale: float, out: Tensor) -> Iterator[int]:
    """One sequence [L, HV, ...]: writes out [L, HV, V] and S chunk by chunk, yielding the tokens done so far."""
    length, done = out.shape[0], 0
    while done < length:
        C = min(CHUNK, length - done)
        n = min(BLOCK, (length - done) // C)
        *parts, target = (x[done : done + n * C].unflatten(0, (n, C)) for x in (*inputs, out))
        for _ in _block(*parts, S, scale, target):
            done += C
            yield done


def chunk_gated_delta_rule(
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
    """The gated delta rule over whole sequences, functional; use it for prefill and training-like evaluation.

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
        for _ in _sequence(inputs, S, scale, o[row, start:end]):
            pass
    return o, final_state


def chunk_gated_delta_rule_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    out: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    *,
    has_initial_state: Tensor | None = None,
    write_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
) -> None:
    """:func:`chunk_gated_delta_rule` on a state pool, in place; use it for an engine's prefill.

    q, k ``[1, T, H, K]``, v ``[1, T, HV, V]``, g, beta ``[1, T, HV]``. Writes out ``[1, T, HV, V]`` (zero for padding)
    and state ``[S, HV, V, K]`` at write_indices ``[N]``, by default state_indices ``[N]``, where states are read
    unless has_initial_state ``[N]`` is False. An empty sequence writes nothing. Source: arXiv 2412.06464.
    """
    slots = (state_indices, has_initial_state, write_indices, pad_slot_id)
    options = {"use_qk_l2norm": use_qk_l2norm, "A_log": A_log, "dt_bias": dt_bias, "beta_scale": beta_scale}
    _paged((q, k, v, g, beta), state, out, cu_seqlens, slots, scale, options)


def chunk_gated_delta_rule_paged_checkpoints(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    out: Tensor,
    checkpoints: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    checkpoint_offsets: Tensor,
    *,
    checkpoint_interval: int,
    has_initial_state: Tensor | None = None,
    write_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
) -> None:
    """:func:`chunk_gated_delta_rule_paged` that also keeps states on the way; use it to fill a prefix cache.

    checkpoints ``[M, HV, V, K]``: row checkpoint_offsets[n] + j gets sequence n's state after (j + 1) times
    checkpoint_interval tokens (a multiple of 64), as long as it lies before checkpoint_offsets[n + 1] and M.
    """
    slots = (state_indices, has_initial_state, write_indices, pad_slot_id)
    options = {"use_qk_l2norm": use_qk_l2norm, "A_log": A_log, "dt_bias": dt_bias, "beta_scale": beta_scale}
    keep = (checkpoints, checkpoint_offsets.tolist(), checkpoint_interval)
    _paged((q, k, v, g, beta), state, out, cu_seqlens, slots, scale, options, keep)


def _paged(tensors, state, out, cu_seqlens, slots, scale, options, keep=None) -> None:
    q = tensors[0]
    state_indices, has_initial_state, write_indices, pad_slot_id = slots
    checkpoints, offsets, interval = keep or (None, None, None)
    dtype, scale = _math.compute_dtype(q), _math.default_scale(scale, q.shape[-1])
    sequences = _math.spans(q.shape[1], cu_seqlens)
    reads = _math.slots(state_indices, state.shape[0], pad_slot_id).tolist()
    writes = reads if write_indices is None else _math.slots(write_indices, state.shape[0], pad_slot_id).tolist()
    keeps = _math.flags(has_initial_state, len(sequences))

    written = 0  # tokens of out so far
    for n, (_, start, end) in enumerate(sequences):
        if reads[n] < 0 or start == end:
            continue
        out[0, written:start].zero_()
        written = end
        inputs = _math.delta_inputs(*(x[0, start:end] for x in tensors), **options)
        S = _math.load_state(state, reads[n], keeps[n], torch.empty(state.shape[1:], dtype=dtype))
        for done in _sequence(inputs, S, scale, out[0, start:end]):
            if checkpoints is not None and done % interval == 0:
                row = offsets[n] + done // interval - 1
                if 0 <= row < min(offsets[n + 1], len(checkpoints)):
                    checkpoints[row].copy_(S)
        if writes[n] >= 0:
            _math.store_state(state[writes[n]], S)
    out[0, written:].zero_()
