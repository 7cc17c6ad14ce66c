"""A plugin for vLLM: its Gated Delta Net functions on this package's operators.

Installed beside vLLM it does nothing until it is chosen: by name, ``VLLM_PLUGINS=gdn_kernels``, or by
``GDN_KERNELS_ENGINE=1``. vLLM then calls :func:`register` in each of its processes, before the engine starts; a place
is replaced where it is defined and in every module that has imported it. Without the setting the engine is as it was.
``README.md`` beside this file says which places, what is left to the engine, and what differs.

Signatures, layouts and null-slot rules (slot 0 is padding) are those of vllm 0.33.0. A case that a place does not cover
is left to the function that was there. Differences: a padding row is zero where vLLM leaves memory as it was;
``causal_conv1d_update`` returns a new tensor and leaves x as it was; of a norm's results, mean and rstd are None.

Public: :func:`register`, :func:`apply`, :func:`restore`, :func:`report`, :func:`examine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from gdn_kernels import contracts
from gdn_kernels.graphs import SPLIT_OPERATORS, decode_into
from gdn_kernels.integrations import _engine_calls as calls
from gdn_kernels.integrations._engines import Plugin, Record, rebind
from gdn_kernels.ops import conv, registry

__all__ = ["apply", "examine", "plugin", "register", "report", "restore"]

VERSIONS = ("0.33.0",)
_FLA = "vllm.third_party.flash_linear_attention.ops"
_CONV = "vllm.model_executor.layers.mamba.ops.causal_conv1d"
_LAYER = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
_METADATA = "vllm.v1.attention.backends.gdn_attn.GDNAttentionMetadata"
#: vLLM's null block.
NULL = 0

_paged = registry.direct("recurrent_gated_delta_rule_paged")


class VLLMPlugin(Plugin):
    """The places as attributes of vLLM's modules: it has no registry for functions."""

    def __init__(self) -> None:
        super().__init__("vLLM", "vllm", VERSIONS)

    def whitelist(self) -> Iterable[str] | None:
        import vllm.envs

        return vllm.envs.VLLM_PLUGINS

    def held_by(self, record: Record) -> str | None:
        import vllm

        module = getattr(record.original, "__module__", None) or "another module"
        if module.partition(".")[0] != self.package:
            return module
        # A wrapper may carry the name of what it wraps: then its file tells. torch wraps too, for vLLM.
        code = getattr(record.original, "__code__", None)
        own = tuple(str(Path(package.__file__).parent) for package in (vllm, torch))
        return None if code is None or code.co_filename.startswith(own) else code.co_filename

    def install(self, records: list[Record]) -> None:
        for record in records:
            setattr(record.owner, record.name, record.replacement)
        rebind((record.original, record.replacement) for record in records)
        operators = self._splitting_operators()
        operators.extend(set(SPLIT_OPERATORS) - set(operators))

    def uninstall(self, records: list[Record]) -> None:
        for record in records:
            setattr(record.owner, record.name, record.original)
        rebind((record.replacement, record.original) for record in records)
        operators = self._splitting_operators()
        for name in SPLIT_OPERATORS:
            if name in operators:
                operators.remove(name)

    @staticmethod
    def _splitting_operators() -> list[str]:
        from vllm.config.compilation import CompilationConfig

        return CompilationConfig._attention_ops


plugin = VLLMPlugin()
register: Callable[[], None] = plugin.register
apply: Callable[..., None] = plugin.apply
restore: Callable[[], None] = plugin.restore
report: Callable[[], list[dict[str, Any]]] = plugin.report
examine: Callable[[], dict[str, Record]] = plugin.examine


# ---------------------------------------------------------------------------------------------------------------
# Norms. vLLM's operator fla_rms_norm_gated calls rmsnorm_fn, so its fusion patterns still match.
# ---------------------------------------------------------------------------------------------------------------


@plugin.place(f"{_FLA}.layernorm_guard.layer_norm_fwd", "layer_norm_gated", "layer_norm_gated_out")
def layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    z=None,
    out=None,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
    activation="swish",
):
    """``(y, None, None)``: y ``[M, N]``, ``out`` where it is given."""
    y = calls.norm(
        x,
        weight,
        bias,
        z,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        activation=activation,
        out=out,
    )
    return y if isinstance(y, str) else (y, None, None)


@plugin.place(f"{_FLA}.layernorm_guard.layernorm_fn", "layer_norm_gated")
def layernorm_fn(
    x,
    weight,
    bias,
    z=None,
    eps=1e-6,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
    activation="swish",
):
    """A new tensor of the shape of x ``[..., N]``."""
    return calls.norm(
        x,
        weight,
        bias,
        z,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        activation=activation,
    )


@plugin.place(f"{_FLA}.layernorm_guard.rmsnorm_fn", "layer_norm_gated")
def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, activation="swish"):
    """As :func:`layernorm_fn`, an RMS norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True, activation)


@plugin.place(f"{_FLA}.layernorm_guard.RMSNormGated.forward", "layer_norm_gated")
def rms_norm_gated_forward(self, x, z=None):
    """The module's forward: x ``[..., N]``."""
    return layernorm_fn(
        x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, True, self.activation
    )


# ---------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------


def _slot(null_block_id):
    return -1 if null_block_id is None else null_block_id


@plugin.place(f"{_CONV}.causal_conv1d_fn", "causal_conv1d")
def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    pad_slot_id=-1,
    null_block_id=NULL,
    metadata=None,
    validate_data=False,
):
    """x ``[D, T]`` channel-last, in and out; ``conv_states [S, D, L]``, its first W - 1 columns in place."""
    if cache_indices is not None and cache_indices.dim() != 1:
        return "a table of blocks"
    return calls.conv_prefill(
        x,
        weight,
        bias,
        conv_states,
        query_start_loc,
        cache_indices,
        has_initial_state,
        activation,
        _slot(null_block_id),
    )


@plugin.place(f"{_CONV}.causal_conv1d_update", "causal_conv1d_update")
def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    conv_state_indices=None,
    num_accepted_tokens=None,
    query_start_loc=None,
    max_query_len=-1,
    null_block_id=NULL,
    validate_data=False,
    out=None,
):
    """x ``[N, D]``, ``[N, D, t]``, or ``[N * t, D]`` with offsets; a new tensor of that shape, the state in place.

    With ``num_accepted_tokens`` the window moves within the first W - 2 + t columns of ``conv_state [S, D, L]``.
    """
    if conv_state is None:
        return "no conv state"
    if out is not None:
        return "an out"
    drafts = None
    if query_start_loc is not None:
        # Lengths are at most max_query_len, so this many tokens mean that all have it.
        drafts = max_query_len
        if conv_state_indices is None or x.shape[0] != conv_state_indices.shape[0] * drafts:
            return "rows of unequal lengths"
    try:
        return calls.conv_update(
            x,
            conv_state,
            weight,
            bias,
            activation,
            conv_state_indices,
            num_accepted_tokens,
            drafts,
            _slot(null_block_id),
        )
    except calls.REFUSALS:
        why = calls.conv_reason(x, weight, conv_state, activation) or calls.index_reason(
            conv_state_indices=conv_state_indices, num_accepted_tokens=num_accepted_tokens
        )
        if why is not None:
            return why
        if conv_state_indices is not None and conv_state_indices.dim() != 1:
            return "a table of blocks"
        if query_start_loc is None and x.dim() == 3 and x.stride(1) != 1 and x.shape[2] > 1:
            return "a time-last x"
        raise


# ---------------------------------------------------------------------------------------------------------------
# Delta rule: decode and verification
# ---------------------------------------------------------------------------------------------------------------


@plugin.place(f"{_FLA}.fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode", "packed_decode_out")
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
        mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel, NULL
    )
    return o if isinstance(o, str) else (o, initial_state)


@plugin.place(f"{_FLA}.fused_sigmoid_gating.fused_sigmoid_gating_delta_rule_update", "recurrent_gated_delta_rule_paged")
def fused_sigmoid_gating_delta_rule_update(
    A_log,
    a,
    b,
    dt_bias,
    q,
    k,
    v,
    beta=1.0,
    threshold=20.0,
    scale=None,
    initial_state=None,
    inplace_final_state=True,
    cu_seqlens=None,
    ssm_state_indices=None,
    num_accepted_tokens=None,
    use_qk_l2norm_in_kernel=False,
    is_kda=False,
):
    """``(o [B, T, HV, V], initial_state)``: the pool ``[S, HV, V, K]`` in place at ``ssm_state_indices`` ``[N]``, or
    ``[N, t]`` with the state after token i in column i, read at column ``num_accepted_tokens - 1``."""
    if is_kda:
        return "KDA"
    if (beta, threshold) != calls.SOFTPLUS:
        return "another softplus"
    return _update(
        q,
        k,
        v,
        a,
        b,
        A_log,
        dt_bias,
        initial_state,
        inplace_final_state,
        cu_seqlens,
        ssm_state_indices,
        num_accepted_tokens,
        scale,
        use_qk_l2norm_in_kernel,
    )


@plugin.place(f"{_FLA}.fused_recurrent.fused_recurrent_gated_delta_rule", "recurrent_gated_delta_rule_paged")
def fused_recurrent_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta=None,
    scale=None,
    initial_state=None,
    inplace_final_state=True,
    cu_seqlens=None,
    ssm_state_indices=None,
    num_accepted_tokens=None,
    use_qk_l2norm_in_kernel=False,
):
    """As :func:`fused_sigmoid_gating_delta_rule_update`, for g and beta ``[B, T, HV]`` in fp32."""
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
        initial_state,
        inplace_final_state,
        cu_seqlens,
        ssm_state_indices,
        num_accepted_tokens,
        scale,
        use_qk_l2norm_in_kernel,
    )


def _update(q, k, v, g, beta, A_log, dt_bias, state, in_place, cu_seqlens, indices, accepted, scale, use_qk_l2norm):
    """g and beta, or with ``A_log`` and ``dt_bias`` the raw a and b, which may be flat, ``[B * T, HV]``."""
    if state is None:
        return "no state"
    if not in_place or indices is None:
        return "states that are not in a pool in place"
    if accepted is not None and indices.dim() != 2:
        return "accepted counts beside one slot a sequence"
    try:
        o = _updated(q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, indices, accepted, scale, use_qk_l2norm)
    except calls.REFUSALS:
        why = calls.state_reason(state) or calls.index_reason(
            ssm_state_indices=indices, num_accepted_tokens=accepted, cu_seqlens=cu_seqlens
        )
        if why is None and A_log is None:
            why = calls.gates_reason(g, beta)
        if why is None:
            raise
        return why
    return o, state


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
    cu_seqlens: torch.Tensor | None,
    indices: torch.Tensor,
    accepted: torch.Tensor | None,
    scale: float | None,
    use_qk_l2norm: bool,
):
    if cu_seqlens is None:
        count, rows = q.shape[0], None
    else:
        # A row has at most a token a slot, so this many tokens mean that all have as many.
        count, rows = cu_seqlens.shape[0] - 1, 1 if indices.dim() == 1 else indices.shape[1]
        rows = rows if q.shape[1] == count * rows else None
    options = calls.delta_options(scale, use_qk_l2norm, A_log, dt_bias, rows)
    options["pad_slot_id"] = NULL
    if rows is None:
        g, beta = calls.packed_gates(g, k), calls.packed_gates(beta, k)
        if cu_seqlens is not None:
            options["cu_seqlens"] = cu_seqlens
    if accepted is not None:
        options["num_accepted_tokens"] = calls.first(accepted, count)
    return _paged(q, k, v, g, beta, state, calls.first(indices, count), **options)


# ---------------------------------------------------------------------------------------------------------------
# Delta rule: prefill
# ---------------------------------------------------------------------------------------------------------------


@plugin.place(f"{_FLA}.chunk.chunk_gated_delta_rule", "chunk_gated_delta_rule")
def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    chunk_indices=None,
    chunk_offsets=None,
    use_qk_l2norm_in_kernel=False,
    core_attn_out=None,
):
    """``(o, final_state)``: functional, ``final_state [N, HV, V, K]`` fp32 or None; chunk indices are not read."""
    if core_attn_out is not None:
        return "an out"
    why = calls.gates_reason(g, beta)
    if why is not None:
        return why
    o, final_state = torch.ops.gdn.chunk_gated_delta_rule(
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


@plugin.place(f"{_LAYER}._resolve_gdn_prefill_backend", takes_original=True)
def resolve_gdn_prefill_backend(original, vllm_config):
    """As vLLM resolves it, but for ``auto``, which stays with Triton, and so with us, where vLLM takes FlashInfer."""
    requested, active = original(vllm_config)
    return requested, "triton" if requested == "auto" and active == "flashinfer" else active


@plugin.place(
    f"{_LAYER}.QwenGatedDeltaNetAttention._forward_core",
    "causal_conv1d",
    "packed_decode_out",
    "chunk_gated_delta_rule_paged",
    needs=tuple(
        (_METADATA, name)
        for name in (
            "flashinfer_checkpoint_plan",
            "prefill_has_initial_state",
            "prefill_query_start_loc",
            "prefill_state_indices",
            "spec_sequence_masks",
        )
    ),
)
def forward_core(self, mixed_qkv, b, a, core_attn_out):
    """A batch with new tokens of prompts, and no drafts: conv, decode step and prefill on the pools, into
    ``core_attn_out [T, HV, V]``, with vLLM's metadata as it is. Other batches run vLLM's method on the places above.
    """
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    metadata = get_forward_context().attn_metadata
    metadata = metadata.get(self.prefix) if isinstance(metadata, dict) else None
    if metadata is None:
        return "a profile run"
    if metadata.num_prefills == 0 or metadata.spec_sequence_masks is not None:
        return "a batch of decodes or drafts"
    if metadata.flashinfer_checkpoint_plan is not None:
        return "FlashInfer's checkpoints"
    if self.gdn_prefill_backend != "triton":
        return f"the prefill backend {self.gdn_prefill_backend}"
    windows, state = self.kv_cache[0], self.kv_cache[1]
    if not is_conv_state_dim_first():
        windows = windows.transpose(-1, -2)
    conv_weight = self.conv1d.weight.flatten(1)
    why = calls.state_reason(state) or calls.conv_reason(mixed_qkv, conv_weight, windows, self.activation)
    if why is not None:
        return why
    if mixed_qkv.dtype is torch.float32 and mixed_qkv.device.type == "cuda":
        return "fp32 activations"
    tokens, decodes = metadata.num_actual_tokens, metadata.num_decode_tokens
    slots, offsets = metadata.non_spec_state_indices_tensor, metadata.non_spec_query_start_loc
    count = offsets.shape[0] - 1
    num_v_heads, head_v_dim, head_k_dim = state.shape[1:]
    num_k_heads = (mixed_qkv.shape[1] - num_v_heads * head_v_dim) // (2 * head_k_dim)
    keys = num_k_heads * head_k_dim

    def decode_arguments(x):
        return x[:decodes], a[:decodes], b[:decodes], self.A_log, self.dt_bias, state, slots[:decodes]

    def prefill_arguments(x):
        q, k, v = x[decodes:tokens].split([keys, keys, num_v_heads * head_v_dim], dim=-1)
        return (
            q.unflatten(-1, (num_k_heads, head_k_dim)),
            k.unflatten(-1, (num_k_heads, head_k_dim)),
            v.unflatten(-1, (num_v_heads, head_v_dim)),
            a[decodes:tokens],
            b[decodes:tokens],
            state,
            core_attn_out[decodes:tokens],
            metadata.prefill_state_indices,
            metadata.prefill_query_start_loc,
        )

    decode_options = {"num_k_heads": num_k_heads, "pad_slot_id": NULL}
    prefill_options = {
        "has_initial_state": metadata.prefill_has_initial_state,
        "use_qk_l2norm": True,
        "A_log": self.A_log,
        "dt_bias": self.dt_bias,
        "pad_slot_id": NULL,
    }
    # All that an operator refuses is refused before the conv writes its pool.
    contracts.packed_decode(*decode_arguments(mixed_qkv), **decode_options)
    lifted = [x.unsqueeze(0) for x in prefill_arguments(mixed_qkv)[:5]]
    rest = prefill_arguments(mixed_qkv)[5:]
    contracts.chunk_gated_delta_rule_paged(*lifted, rest[0], rest[1].unsqueeze(0), *rest[2:], **prefill_options)
    x = conv.causal_conv1d(
        mixed_qkv[:tokens],
        conv_weight,
        self.conv1d.bias,
        calls.conv_window(windows, conv_weight.shape[1] - 1),
        offsets,
        state_indices=calls.first(slots, count),
        has_initial_state=calls.first(metadata.has_initial_state, count),
        activation=self.activation,
        pad_slot_id=NULL,
    )
    if decodes:
        decode_into(core_attn_out[:decodes], *decode_arguments(x), **decode_options)
    torch.ops.gdn.chunk_gated_delta_rule_paged(*prefill_arguments(x), **prefill_options)
    return None
