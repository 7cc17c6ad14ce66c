"""SGLang's gates, splits of the projections, and convolution."""

from __future__ import annotations

import sys

import torch

from gdn_kernels.integrations import _engine_calls as calls
from gdn_kernels.integrations.sglang._plugin import CONV, DISPATCH, FLA, LINEAR, PROJECTIONS, plugin
from gdn_kernels.ops import registry

_gating = registry.direct("gating")
_split_qkvz_ba = registry.direct("split_qkvz_ba")
_causal_conv1d_verify = registry.direct("causal_conv1d_verify")

#: Kernels that want contiguous q, k and v: imported only where a user has chosen one of them.
_CONTIGUOUS = tuple(f"sglang.srt.layers.attention.linear.kernels.{name}" for name in ("gdn_flashinfer", "gdn_cutedsl"))


@plugin.place(
    f"{LINEAR}.fused_gdn_gating.fused_gdn_gating", "gating", also=(f"{FLA}.fused_gdn_gating.fused_gdn_gating",)
)
def fused_gdn_gating(A_log, a, b, dt_bias, beta=1.0, threshold=20.0):
    """``(g, beta)``, each ``[1, L, HV]`` fp32; beta is not rounded to the dtype of b."""
    if (beta, threshold) != calls.SOFTPLUS:
        return "another softplus"
    if a.dtype != b.dtype:
        return "a and b of two dtypes"
    return _gates(A_log, a, b, dt_bias)


@calls.repeatable
def _gates(A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor):
    return _gating(a[None], b[None], A_log, dt_bias)


@plugin.place(f"{PROJECTIONS}.fused_qkvzba_split_reshape_cat", "split_qkvz_ba")
def fused_qkvzba_split_reshape_cat(mixed_qkvz, mixed_ba, num_heads_qk, num_heads_v, head_qk, head_v):
    """Interleaved projections: ``mixed_qkv [T, D]``, ``z [T, HV, V]``, ``b`` and ``a`` ``[T, HV]``."""
    return _split(mixed_qkvz, mixed_ba, num_heads_qk, num_heads_v, head_qk, head_v)


@calls.repeatable
def _split(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
):
    return _split_qkvz_ba(
        mixed_qkvz,
        mixed_ba,
        num_k_heads=num_heads_qk,
        num_v_heads=num_heads_v,
        head_k_dim=head_qk,
        head_v_dim=head_v,
    )


def _columns(mixed_qkvz, mixed_ba, qkv_dim, num_heads_v, head_v):
    mixed_qkv, z = mixed_qkvz.split_with_sizes((qkv_dim, mixed_qkvz.shape[1] - qkv_dim), 1)
    b, a = mixed_ba.split_with_sizes((num_heads_v, mixed_ba.shape[1] - num_heads_v), 1)
    return mixed_qkv, z.view(-1, num_heads_v, head_v), b, a


@plugin.place(f"{PROJECTIONS}.fused_qkvzba_split_reshape_cat_contiguous")
def fused_qkvzba_split_reshape_cat_contiguous(mixed_qkvz, mixed_ba, num_heads_qk, num_heads_v, head_qk, head_v):
    """Projections in the order q, k, v, z and b, a: the four results are views of their columns."""
    if mixed_ba.shape[1] != 2 * num_heads_v:
        return "a wider mixed_ba"
    return _columns(mixed_qkvz, mixed_ba, 2 * num_heads_qk * head_qk + num_heads_v * head_v, num_heads_v, head_v)


@plugin.place(f"{PROJECTIONS}.fused_qkv_split_gdn_prefill")
def fused_qkv_split_gdn_prefill(mixed_qkv, num_q_heads, num_k_heads, num_v_heads, head_q, head_k, head_v):
    """q, k, v ``[1, T, heads, size]`` as views of ``mixed_qkv``, which the operators read in place."""
    for name in _CONTIGUOUS:
        if name in sys.modules:
            return "another backend, which wants contiguous q, k, v"
    tokens, sizes = mixed_qkv.shape[0], (num_q_heads * head_q, num_k_heads * head_k, num_v_heads * head_v)
    q, k, v = mixed_qkv.split_with_sizes(sizes, 1)
    return (
        q.view(1, tokens, num_q_heads, head_q),
        k.view(1, tokens, num_k_heads, head_k),
        v.view(1, tokens, num_v_heads, head_v),
    )


@plugin.place(f"{PROJECTIONS}.fused_qkvzba_causal_conv1d_update_contiguous", "causal_conv1d_update")
def fused_qkvzba_causal_conv1d_update_contiguous(
    mixed_qkvz,
    mixed_ba,
    conv_state,
    conv_weight,
    conv_bias,
    conv_state_indices,
    *,
    qkv_dim,
    v_dim,
    num_v_heads,
    head_v_dim,
    activation,
    pad_slot_id=-1,
):
    """The conv of a decode step on the first ``qkv_dim`` columns, state in place; z, b and a are views."""
    mixed_qkv, z, b, a = _columns(mixed_qkvz, mixed_ba, qkv_dim, num_v_heads, head_v_dim)
    y = _conv_update(mixed_qkv, conv_state, conv_weight, conv_bias, activation, conv_state_indices, None, pad_slot_id)
    return y if isinstance(y, str) else (y, z, b, a)


@plugin.place(f"{CONV}.causal_conv1d_fn", "causal_conv1d")
def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    seq_lens_cpu,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    pad_slot_id=-1,
    validate_data=False,
    block_table=None,
    **kwargs,
):
    """x ``[D, T]`` channel-last; ``conv_states [S, D, W - 1]`` in place. The host's lengths are not needed."""
    return calls.conv_prefill(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation, pad_slot_id
    )


@plugin.place(f"{DISPATCH}.causal_conv1d_fn", "causal_conv1d")
def causal_conv1d_fn_dispatch(
    x,
    weight,
    bias=None,
    query_start_loc=None,
    cache_indices=None,
    has_initial_state=None,
    conv_states=None,
    activation="silu",
    pad_slot_id=-1,
    **kwargs,
):
    """As :func:`causal_conv1d_fn`, from the function that picks CUDA or Triton."""
    return calls.conv_prefill(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation, pad_slot_id
    )


def _conv_update(x, conv_state, weight, bias, activation, indices, accepted, pad_slot_id):
    """One or a few tokens a row, x ``[B, D]`` or ``[B, D, T]``, state in place."""
    if conv_state is None:
        return "no conv state"
    try:
        return calls.conv_update(x, conv_state, weight, bias, activation, indices, accepted, None, pad_slot_id)
    except calls.REFUSALS:
        why = _update_reason(x, conv_state, weight, activation, conv_state_indices=indices)
        if why is None:
            raise
        return why


def _update_reason(x, conv_state, weight, activation, **indices):
    why = calls.conv_reason(x, weight, conv_state, activation) or calls.index_reason(**indices)
    if why is None and x.dim() == 3 and x.stride(1) != 1 and x.shape[2] > 1:
        return "a time-last x"
    return why


@plugin.place(f"{CONV}.causal_conv1d_update", "causal_conv1d_update", "causal_conv1d_verify")
def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
    num_accept_tokens=None,
    intermediate_conv_window=None,
    intermediate_state_indices=None,
    retrieve_next_token=None,
    retrieve_next_sibling=None,
    retrieve_parent_token=None,
    pad_slot_id=-1,
    metadata=None,
    validate_data=False,
):
    """Decode, accepted counts, and drafts whose windows go to ``intermediate_conv_window [M, t, D, W - 1]``.

    A tree is left to the engine, whose kernel also works out the parents.
    """
    if cache_seqlens is not None:
        return "a circular state"
    if retrieve_next_token is not None:
        return "a tree of drafts: its parents are worked out there"
    if intermediate_conv_window is None:
        return _conv_update(x, conv_state, weight, bias, activation, conv_state_indices, num_accept_tokens, pad_slot_id)
    if num_accept_tokens is not None or x.dim() != 3:
        return "intermediate windows beside accepted counts"
    if conv_state is None:
        return "no conv state"
    try:
        return _verified(
            x,
            conv_state,
            weight,
            bias,
            activation,
            conv_state_indices,
            intermediate_conv_window,
            intermediate_state_indices,
            pad_slot_id,
        )
    except calls.REFUSALS:
        why = _update_reason(
            x,
            conv_state,
            weight,
            activation,
            conv_state_indices=conv_state_indices,
            intermediate_state_indices=intermediate_state_indices,
        )
        if why is None:
            raise
        return why


@calls.repeatable
def _verified(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: bool | str | None,
    indices: torch.Tensor | None,
    windows: torch.Tensor,
    windows_indices: torch.Tensor | None,
    pad_slot_id: int,
):
    return _causal_conv1d_verify(
        x.mT,
        weight,
        bias,
        calls.conv_window(conv_state, weight.shape[1] - 1),
        windows,
        intermediate_indices=windows_indices,
        **calls.conv_options(activation, indices, pad_slot_id),
    ).mT


@plugin.place(f"{DISPATCH}.causal_conv1d_update", "causal_conv1d_update")
def causal_conv1d_update_dispatch(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
    pad_slot_id=-1,
):
    """As :func:`causal_conv1d_update`, from the function that picks CUDA or Triton."""
    if cache_seqlens is not None:
        return "a circular state"
    return _conv_update(x, conv_state, weight, bias, activation, conv_state_indices, None, pad_slot_id)
