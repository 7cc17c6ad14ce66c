"""SGLang's delta rule: decode, verification and prefill."""

from __future__ import annotations

import torch

from gdn_kernels.contracts import CHUNK, HEAD_DIMS
from gdn_kernels.integrations import _engine_calls as calls
from gdn_kernels.integrations.sglang._plugin import BACKEND, FLA, KERNEL, LINEAR, plugin
from gdn_kernels.ops import registry

_prefill = registry.direct("chunk_gated_delta_rule_paged")
_paged = registry.direct("recurrent_gated_delta_rule_paged")
_verify = registry.direct("recurrent_gated_delta_rule_verify")


@plugin.place(f"{FLA}.fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode", "packed_decode_out")
def packed_decode(
    mixed_qkv,
    a,
    b,
    A_log,
    dt_bias,
    scale,
    initial_state,
    out,
    ssm_state_indices,
    use_qk_l2norm_in_kernel=False,
):
    """``(out, initial_state)``: the pool ``[S, HV, V, K]`` in place, out ``[B, 1, HV, V]`` written."""
    o = calls.packed_decode(
        mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel, -1
    )
    return o if isinstance(o, str) else (o, initial_state)


@plugin.place(f"{KERNEL}.packed_decode", "packed_decode")
def kernel_packed_decode(
    self, mixed_qkv, a, b, *, A_log, dt_bias, scale, ssm_states, cache_indices, num_v_heads, head_v_dim, **kwargs
):
    """``[1, B, HV, V]``: the decode step of SGLang's kernel object, without the copy into its out."""
    for name in ("replayssm_d", "replayssm_k", "replayssm_g"):
        if kwargs.get(name) is not None:
            return "ReplaySSM"
    o = calls.packed_decode(mixed_qkv, a, b, A_log, dt_bias, scale, ssm_states, None, cache_indices, True, -1)
    return o if isinstance(o, str) else o[None]


@plugin.place(
    f"{LINEAR}.fused_sigmoid_gating_recurrent.fused_sigmoid_gating_delta_rule_update",
    "recurrent_gated_delta_rule_paged",
    "recurrent_gated_delta_rule_verify",
    also=(f"{FLA}.fused_sigmoid_gating_recurrent.fused_sigmoid_gating_delta_rule_update",),
)
def fused_sigmoid_gating_delta_rule_update(
    A_log,
    a,
    dt_bias,
    softplus_beta,
    softplus_threshold,
    q,
    k,
    v,
    b,
    initial_state_source,
    initial_state_indices,
    scale=None,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    is_kda=False,
    lower_bound=None,
    disable_state_update=False,
    intermediate_states_buffer=None,
    intermediate_state_indices=None,
    cache_steps=None,
    retrieve_parent_token=None,
    cache_ring=False,
    replayssm_rawv=None,
    replayssm_rawk=None,
    replayssm_g=None,
    replayssm_beta=None,
    match_cutedsl_decode=False,
):
    """o ``[B, T, HV, V]``: decode writes the pool in place; verification leaves it alone and writes the state after
    each draft to ``intermediate_states_buffer [M, steps, HV, V, K]``, a tree's along ``retrieve_parent_token [N, t]``.
    """
    if is_kda or lower_bound is not None or match_cutedsl_decode:
        return "KDA"
    if cache_ring:
        return "ReplaySSM"
    if (softplus_beta, softplus_threshold) != calls.SOFTPLUS:
        return "another softplus"
    return _update(
        q,
        k,
        v,
        a,
        b,
        A_log,
        dt_bias,
        initial_state_source,
        initial_state_indices,
        scale,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        disable_state_update,
        intermediate_states_buffer,
        intermediate_state_indices,
        cache_steps,
        retrieve_parent_token,
    )


@plugin.place(
    f"{FLA}.fused_recurrent.fused_recurrent_gated_delta_rule_update",
    "recurrent_gated_delta_rule_paged",
    "recurrent_gated_delta_rule_verify",
)
def fused_recurrent_gated_delta_rule_update(
    q,
    k,
    v,
    g,
    beta=None,
    scale=None,
    initial_state_source=None,
    initial_state_indices=None,
    cu_seqlens=None,
    use_qk_l2norm_in_kernel=False,
    disable_state_update=False,
    disable_output_calculation=False,
    intermediate_states_buffer=None,
    intermediate_state_indices=None,
    cache_steps=None,
    retrieve_parent_token=None,
):
    """As :func:`fused_sigmoid_gating_delta_rule_update`, for g and beta ``[B, T, HV]`` in fp32."""
    if disable_output_calculation:
        return "no output"
    if beta is None:
        return calls.gates_reason(g, beta)
    return _update(
        q,
        k,
        v,
        g,
        beta,
        None,
        None,
        initial_state_source,
        initial_state_indices,
        scale,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        disable_state_update,
        intermediate_states_buffer,
        intermediate_state_indices,
        cache_steps,
        retrieve_parent_token,
    )


def _update(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    state,
    indices,
    scale,
    use_qk_l2norm,
    cu_seqlens,
    keep_state,
    buffer,
    buffer_indices,
    steps,
    parents,
):
    """g and beta, or with ``A_log`` and ``dt_bias`` the raw a and b, which may be flat, ``[B * T, HV]``."""
    if state is None:
        return "no state"
    try:
        return _updated(
            q,
            k,
            v,
            g,
            beta,
            A_log,
            dt_bias,
            state,
            indices,
            scale,
            use_qk_l2norm,
            cu_seqlens,
            keep_state,
            buffer,
            buffer_indices,
            steps,
            parents,
        )
    except calls.REFUSALS:
        why = calls.state_reason(state) or calls.index_reason(
            indices=indices, buffer_indices=buffer_indices, parents=parents, cu_seqlens=cu_seqlens
        )
        if why is None and A_log is None:
            why = calls.gates_reason(g, beta)
        if why is None and buffer is not None and buffer.dtype not in calls.FLOATS:
            why = "intermediate states of a dtype that is not built"
        if why is None:
            raise
        return why


@calls.repeatable
def _updated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor,
    indices: torch.Tensor,
    scale: float | None,
    use_qk_l2norm: bool,
    cu_seqlens: torch.Tensor | None,
    keep_state: bool,
    buffer: torch.Tensor | None,
    buffer_indices: torch.Tensor | None,
    steps: int | None,
    parents: torch.Tensor | None,
):
    if buffer is None:
        if keep_state:
            return "drafts whose states are not kept"
        drafts = 1
    elif not keep_state:
        return "intermediate states beside an update of the pool"
    else:
        # A tree has a column a draft; the buffer may have more, where the number of drafts changes at run time.
        drafts = steps or (0 if parents is None else parents.shape[1])
    if cu_seqlens is None:
        count, rows = q.shape[0], None
    else:
        # One token a row in a decode step, the drafts in a verification: so many tokens mean that all rows have them.
        count = cu_seqlens.shape[0] - 1
        rows = drafts if drafts and q.shape[1] == count * drafts else None
        if rows is None and buffer is not None:
            return "drafts of unequal lengths"
    options = calls.delta_options(scale, use_qk_l2norm, A_log, dt_bias, rows)
    if rows is None:
        g, beta = calls.packed_gates(g, k), calls.packed_gates(beta, k)
        if cu_seqlens is not None:
            options["cu_seqlens"] = cu_seqlens
    if buffer is None:
        return _paged(q, k, v, g, beta, state, calls.first(indices, count), **options)
    if buffer_indices is not None:
        options["intermediate_indices"] = calls.first(buffer_indices, count)
    if parents is not None:
        options["parents"] = calls.first(parents, count)
    return _verify(q, k, v, g, beta, state, buffer, calls.first(indices, count), **options)


@plugin.place(f"{FLA}.fused_recurrent.fused_recurrent_gated_delta_rule", "recurrent_gated_delta_rule")
def fused_recurrent_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    use_qk_l2norm_in_kernel=False,
):
    """``(o, final_state)``: functional, ``final_state [N, HV, V, K]`` fp32 or None."""
    why = calls.gates_reason(g, beta)
    if why is not None:
        return why
    o, final_state = torch.ops.gdn.recurrent_gated_delta_rule.default(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o, final_state if output_final_state else None


@plugin.place(f"{BACKEND}.flashinfer_gdn_prefill_default")
def flashinfer_gdn_prefill_default(model_runner):
    """None: prefill stays on SGLang's kernel object, which is ours, unless a user names another backend."""
    return None


@plugin.place(
    f"{KERNEL}.extend",
    "chunk_gated_delta_rule_paged",
    "chunk_gated_delta_rule_paged_checkpoints",
    takes_original=True,
    needs=(
        (
            "sglang.srt.layers.attention.hybrid_linear_attn_backend.MambaAttnBackendBase._track_mamba_state_extend",
            "h_track_buf",
        ),
    ),
    sets=(("supports_track_state_snapshot", True),),
)
def kernel_extend(
    original,
    self,
    q,
    k,
    v,
    g,
    beta,
    *,
    ssm_states,
    cache_indices,
    query_start_loc,
    inplace_update=True,
    **kwargs,
):
    """``(o [1, T, HV, V], None, None)``: chunked prefill on the pool, in place unless ``inplace_update`` is False.

    q, k ``[1, T, H, K]``, v ``[1, T, HV, V]`` of any token stride, g and beta ``[1, T, HV]`` fp32. ``output`` is
    written where the engine gives one. ``track_state [N, HV, V, K]`` fp32 gets the state of sequence n where its chunk
    ``track_chunk_idx[n]`` of 64 tokens begins; a negative chunk leaves the row alone.
    """
    track, chunk = kwargs.get("track_state"), kwargs.get("track_chunk_idx")
    out = kwargs.get("output")
    if out is None or out.shape != v.shape or out.dtype != v.dtype:
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
    options = {"use_qk_l2norm": True}
    if not inplace_update:
        options["write_indices"] = torch.full_like(cache_indices, -1)
    try:
        if track is None:
            _prefill(q, k, v, g, beta, ssm_states, out, cache_indices, query_start_loc, **options)
        else:
            _tracked_prefill(q, k, v, g, beta, ssm_states, out, cache_indices, query_start_loc, track, chunk, options)
        return out, None, None
    except (*calls.REFUSALS, NotImplementedError) as error:
        why = _extend_reason(q, v, g, beta, ssm_states, cache_indices)
        if why is None:
            if not isinstance(error, NotImplementedError):
                raise
            why = str(error)
    if track is None:
        return why
    # The engine's kernel gives the states of all chunks, and does not know of the buffer.
    options = {name: value for name, value in kwargs.items() if name not in ("track_state", "track_chunk_idx")}
    o, state, h = original(
        self,
        q,
        k,
        v,
        g,
        beta,
        ssm_states=ssm_states,
        cache_indices=cache_indices,
        query_start_loc=query_start_loc,
        inplace_update=inplace_update,
        **options,
    )
    chunks = (query_start_loc.diff() + CHUNK - 1) // CHUNK
    _keep(track, chunk, h[0], chunks.cumsum(0) - chunks + chunk)
    return o, state, h


def _tracked_prefill(q, k, v, g, beta, state, out, indices, offsets, track, chunk, options):
    # A sequence has as many whole chunks as lie between its offsets in chunks, or one fewer.
    rows = offsets // CHUNK
    kept = torch.empty(max(q.shape[1] // CHUNK, 1), *state.shape[1:], dtype=torch.float32, device=q.device)
    # A state at the start of chunk 0 is the one before the call.
    before = state[indices.clamp(min=0)].float()
    torch.ops.gdn.chunk_gated_delta_rule_paged_checkpoints(
        q, k, v, g, beta, state, out, kept, indices, offsets, rows, checkpoint_interval=CHUNK, **options
    )
    _keep(track, chunk, kept, rows[:-1] + chunk - 1, before)


def _extend_reason(q, v, g, beta, state, indices):
    why = calls.state_reason(state) or calls.index_reason(cache_indices=indices)
    if why is not None:
        return why
    if q.dtype not in (torch.bfloat16, torch.float16) and q.device.type == "cuda":
        return "fp32 activations"
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] not in HEAD_DIMS:
        return "a head size that is not built"
    return calls.gates_reason(g, beta)


def _keep(track, chunk, states, at, before=None):
    """``track[n] = states[at[n]]`` where ``chunk[n] >= 0``; ``before[n]`` where it is 0 and ``before`` is given."""
    rows = states[at.clamp(0, states.shape[0] - 1)].to(track.dtype)
    if before is not None:
        rows = torch.where((chunk == 0).view(-1, 1, 1, 1), before, rows)
    track.copy_(torch.where((chunk >= 0).view(-1, 1, 1, 1), rows, track))
