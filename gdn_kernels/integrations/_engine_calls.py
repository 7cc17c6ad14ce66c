"""What both serving engines' adapters do in the same way; each returns its result, or the reason to leave the call.

A call that an operator takes costs little more than the operator: reasons are looked for once it has refused the call,
which it does before it writes. What an operator would take otherwise than the engine means it is asked beforehand. What
picks an operator's options and makes its views is repeated with it (:func:`repeatable`). Where it is not, options at
their default are left out: each costs the dispatcher 0.4 us (torch 2.13, CPU). Views are made the quickest way: of
numbers 0.9 us, where a shape takes 2.5, mT 0.8, where transpose takes 1.1.
"""

from __future__ import annotations

import torch

from gdn_kernels import contracts, launch, replay
from gdn_kernels.integrations._common import rows
from gdn_kernels.ops import registry

#: The dtypes of the operators, and the one in which their references are the oracle, on a CPU.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.int32, torch.int64)
#: softplus and its threshold, as the operators have them built in.
SOFTPLUS = (1.0, 20.0)
#: How an operator refuses a call that may be a reason to leave it.
REFUSALS = (TypeError, ValueError)

#: Decorates what is recorded and replayed together with its operator.
repeatable = replay.repeatable(launch.replayable)

_layer_norm_gated = registry.direct("layer_norm_gated")
_layer_norm_gated_out = registry.direct("layer_norm_gated_out")
_packed_decode = registry.direct("packed_decode")
_packed_decode_out = registry.direct("packed_decode_out")
_causal_conv1d = registry.direct("causal_conv1d")
_causal_conv1d_update = registry.direct("causal_conv1d_update")


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
    activation: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor | str:
    """A gated norm of ``x`` ``[..., N]``; ``z`` of its shape, or ``[tokens, heads, N]`` beside rows ``[M, N]``."""
    if weight is None:
        return "a norm without weight"
    if z is not None and z.dim() != x.dim() and (x.dim() != 2 or z.dim() != 3):
        return "a gate of another rank than [tokens, heads, N]"
    options = eps, group_size, norm_before_gate, is_rms_norm, activation
    if not torch.compiler.is_compiling():
        try:
            # one tensor in two places would not be repeated
            y = _norm(x, weight, bias, z, None if out is x else out, out is x, *options)
            return y if out is None else out
        except (*REFUSALS, NotImplementedError):
            pass
    why = _norm_reason(x, z, group_size, activation, out)
    if why is not None:
        return why
    y = _normed(rows(x), rows(weight), rows(bias), rows(z), out, False, *options)
    return y if out is None else out


def _normed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    out: torch.Tensor | None,
    in_place: bool,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
    activation: str,
) -> torch.Tensor | None:
    """None where ``out`` is written, or x itself."""
    if in_place:
        out = x
    options = {"norm_before_gate": norm_before_gate, "eps": eps}
    if not is_rms_norm:
        options["is_rms_norm"] = False
    if group_size is not None:
        options["group_size"] = group_size
    if activation != "silu" and activation != "swish":
        options["activation"] = activation
    if z is None or z.dim() == x.dim():
        if out is None:
            return _layer_norm_gated(x, weight, bias, z, **options)
        _layer_norm_gated_out(x, weight, bias, z, out, **options)
        return None
    tokens, heads, _ = z.shape
    columns = x.shape[1]
    if out is None:
        return _layer_norm_gated(x.view(tokens, heads, columns), weight, bias, z, **options).view_as(x)
    y = out.view(tokens, heads, columns)
    _layer_norm_gated_out(y if out is x else x.view(tokens, heads, columns), weight, bias, z, y, **options)
    return None


_norm = repeatable(_normed)


def _norm_reason(
    x: torch.Tensor, z: torch.Tensor | None, group_size: int | None, activation: str, out: torch.Tensor | None
) -> str | None:
    """Traced by Dynamo, so only dtypes, ranks and options are looked at."""
    if x.dtype not in FLOATS or (z is not None and z.dtype != x.dtype):
        return "a gate whose dtype is not that of x, or a dtype that is not built"
    if activation not in contracts.ACTIVATIONS:
        return f"activation {activation!r}"
    if x.dim() > 4:
        return "a norm of more than four dimensions"
    if (group_size or x.shape[-1]) > contracts.MAX_NORM_GROUP:
        return "a norm over more columns than are built"
    if out is not None and out.dtype != x.dtype:
        return "an out of another dtype than x"
    if out is not None and out.stride(-1) != 1:
        return "an out whose rows are not contiguous"
    return None


def state_reason(state: torch.Tensor | None) -> str | None:
    """Why a state pool ``[S, HV, V, K]`` is not one that the operators take."""
    if state is None:
        return "no state"
    if state.dtype not in FLOATS:
        return f"a state of {str(state.dtype).removeprefix('torch.')}"
    if state.dim() != 4 or state.stride()[1:] != (state.shape[2] * state.shape[3], state.shape[3], 1):
        return "a state whose slots are not contiguous"
    return None


def index_reason(**tensors: torch.Tensor | None) -> str | None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in INDICES:
            return f"{name} of {str(tensor.dtype).removeprefix('torch.')}"
    return None


def gates_reason(g: torch.Tensor, beta: torch.Tensor | None) -> str | None:
    """Why g and beta ``[B, T, HV]`` are not ones that the operators take: fp32, a number a head."""
    wide = (torch.float32, torch.float64)
    if beta is None or beta.dim() != 3 or g.dtype not in wide or beta.dtype not in wide:
        return "g or beta that is not fp32, a number a head"
    return None


def packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
    out: torch.Tensor | None,
    indices: torch.Tensor,
    use_qk_l2norm: bool,
    pad_slot_id: int,
) -> torch.Tensor | str:
    """``out`` ``[N, 1, HV, V]``, written, or without one a new tensor ``[N, HV, V]``; the state in place."""
    if state is None:
        return "no state"
    try:
        o = _decode(mixed_qkv, a, b, A_log, dt_bias, state, out, indices, scale, use_qk_l2norm, pad_slot_id)
        return o if out is None else out
    except REFUSALS:
        why = state_reason(state) or index_reason(ssm_state_indices=indices)
        if why is not None:
            return why
        if out is None:
            raise
    # An out that is strided, or of another dtype; else this raises again.
    o = _decode(mixed_qkv, a, b, A_log, dt_bias, state, None, indices, scale, use_qk_l2norm, pad_slot_id)
    return out.copy_(o.unsqueeze(1))


@repeatable
def _decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor | None,
    indices: torch.Tensor,
    scale: float,
    use_qk_l2norm: bool,
    pad_slot_id: int,
) -> torch.Tensor | None:
    """None where ``out`` is written."""
    options = {}
    _, num_v_heads, head_v_dim, head_k_dim = state.shape
    options["num_k_heads"] = (mixed_qkv.shape[-1] - num_v_heads * head_v_dim) // (2 * head_k_dim)
    if scale != head_k_dim**-0.5:
        options["scale"] = scale
    if not use_qk_l2norm:
        options["use_qk_l2norm"] = False
    if pad_slot_id != -1:
        options["pad_slot_id"] = pad_slot_id
    if out is None:
        return _packed_decode(mixed_qkv, a, b, A_log, dt_bias, state, indices, **options)
    _packed_decode_out(mixed_qkv, a, b, A_log, dt_bias, state, out, indices, **options)
    return None


def delta_options(
    scale: float | None,
    use_qk_l2norm: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    tokens_per_row: int | None,
) -> dict[str, object]:
    """The options that the forms of the delta rule on a pool have."""
    options: dict[str, object] = {}
    if use_qk_l2norm:
        options["use_qk_l2norm"] = True
    if scale is not None:
        options["scale"] = scale
    if A_log is not None:
        options["A_log"], options["dt_bias"] = A_log, dt_bias
    if tokens_per_row is not None:
        options["tokens_per_row"] = tokens_per_row
    return options


def packed_gates(gate: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``[B * T, HV]`` or ``[B, T, HV]`` as ``[B, T, HV]``, beside ``[B, T, H, K]``: a view."""
    return gate if gate.dim() == 3 else gate.unflatten(0, tokens.shape[:2])


def first(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """The first ``count`` rows: engines' buffers may be longer than the batch."""
    return tensor if tensor is None or tensor.shape[0] <= count else tensor[:count]


def conv_window(conv_state: torch.Tensor, columns: int) -> torch.Tensor:
    """The first ``columns`` of a pool: with room for drafts, engines keep the window there."""
    return conv_state if conv_state.shape[-1] == columns else conv_state[..., :columns]


def conv_reason(x: torch.Tensor, weight: torch.Tensor, conv_state: torch.Tensor, activation: object) -> str | None:
    if x.dtype not in FLOATS or conv_state.dtype not in FLOATS:
        return "a dtype that is not built"
    if weight.shape[1] not in contracts.CONV_WIDTHS:
        return f"a width of {weight.shape[1]}"
    if not isinstance(activation, bool) and activation not in contracts.CONV_ACTIVATIONS:
        return f"activation {activation!r}"
    return None


def conv_options(activation: bool | str | None, indices: torch.Tensor | None, pad_slot_id: int) -> dict[str, object]:
    """The options that all forms of the conv have; engines also take True for silu, and False for none."""
    options: dict[str, object] = {"state_indices": indices}
    if activation is not True and activation != "silu" and activation != "swish":
        options["activation"] = None if activation is False else activation
    if pad_slot_id != -1:
        options["pad_slot_id"] = pad_slot_id
    return options


@repeatable
def conv_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: bool | str | None,
    indices: torch.Tensor | None,
    accepted: torch.Tensor | None,
    drafts: int | None,
    pad_slot_id: int,
) -> torch.Tensor:
    """x ``[N, D]`` or ``[N, D, t]``, or with ``drafts`` ``[N * drafts, D]``: a new tensor, the state in place."""
    tokens = x
    columns = weight.shape[1] - 1
    if drafts is not None:
        tokens = x.view(-1, drafts, x.shape[1])
    elif x.dim() == 3:
        tokens = x.mT
    options = conv_options(activation, indices, pad_slot_id)
    if accepted is not None:
        columns += 0 if tokens.dim() == 2 else tokens.shape[1] - 1
        options["num_accepted_tokens"] = first(accepted, tokens.shape[0])
    y = _causal_conv1d_update(tokens, weight, bias, conv_window(conv_state, columns), **options)
    if drafts is not None:
        return y.view_as(x)
    return y.mT if x.dim() == 3 else y


def conv_prefill(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor | None,
    offsets: torch.Tensor | None,
    indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    activation: bool | str | None,
    pad_slot_id: int,
) -> torch.Tensor | str:
    """The conv of channel-last x ``[D, T]`` in that layout; from zeros without ``has_initial_state``, as engines do."""
    if conv_state is None:
        return "no conv state"
    if x.dim() != 2 or offsets is None:
        return "a batch of equal lengths"
    try:
        return _conv(x, weight, bias, conv_state, offsets, indices, has_initial_state, activation, pad_slot_id)
    except REFUSALS:
        why = conv_reason(x, weight, conv_state, activation) or index_reason(
            cache_indices=indices, query_start_loc=offsets
        )
        if why is not None:
            return why
        if x.stride(0) != 1:
            return "a time-last x"
        if has_initial_state is not None and has_initial_state.dtype is not torch.bool:
            return "has_initial_state that is not bool"
        raise


@repeatable
def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    offsets: torch.Tensor,
    indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    activation: bool | str | None,
    pad_slot_id: int,
) -> torch.Tensor:
    count = offsets.shape[0] - 1
    if has_initial_state is None:
        has_initial_state = launch.empty(x, count, dtype=torch.bool, zero=True)
    return _causal_conv1d(
        x.mT,
        weight,
        bias,
        conv_window(conv_state, weight.shape[1] - 1),
        offsets,
        has_initial_state=first(has_initial_state, count),
        **conv_options(activation, first(indices, count), pad_slot_id),
    ).mT
