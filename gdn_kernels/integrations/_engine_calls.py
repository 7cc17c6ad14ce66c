"""What both serving engines' adapters do in the same way; each returns its result, or the reason to leave the call."""

from __future__ import annotations

import torch

from gdn_kernels import contracts
from gdn_kernels.integrations._common import rows
from gdn_kernels.ops import conv

#: The dtypes of the operators, and the one in which their references are the oracle, on a CPU.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.int32, torch.int64)
#: softplus and its threshold, as the operators have them built in.
SOFTPLUS = (1.0, 20.0)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    *,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
    activation: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor | str:
    """A gated norm of ``x`` ``[..., N]``; ``z`` of its shape, or ``[tokens, heads, N]`` beside rows ``[M, N]``.

    Traced by Dynamo, so only dtypes, ranks and options are looked at.
    """
    if weight is None:
        return "a norm without weight"
    if x.dtype not in FLOATS or (z is not None and z.dtype != x.dtype):
        return "a gate whose dtype is not that of x, or a dtype that is not built"
    if activation not in contracts.ACTIVATIONS:
        return f"activation {activation!r}"
    if x.dim() > 4:
        return "a norm of more than four dimensions"
    if (group_size or x.shape[-1]) > contracts.MAX_NORM_GROUP:
        return "a norm over more columns than are built"
    options = {
        "norm_before_gate": norm_before_gate,
        "is_rms_norm": is_rms_norm,
        "eps": eps,
        "group_size": group_size,
        "activation": activation,
    }
    shape = x.shape
    x, z, weight, bias = rows(x), rows(z), rows(weight), rows(bias)
    by_head = z is not None and z.dim() != x.dim()
    if by_head:
        if x.dim() != 2 or z.dim() != 3:
            return "a gate of another rank than [tokens, heads, N]"
        x = x.unflatten(0, z.shape[:2])
    if out is None:
        y = torch.ops.gdn.layer_norm_gated(x, weight, bias, z, **options)
        return y.view(shape) if by_head else y
    if out.dtype != x.dtype:
        return "an out of another dtype than x"
    torch.ops.gdn.layer_norm_gated_out(x, weight, bias, z, out.unflatten(0, z.shape[:2]) if by_head else out, **options)
    return out


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
    state: torch.Tensor,
    indices: torch.Tensor,
    use_qk_l2norm: bool,
    pad_slot_id: int,
) -> torch.Tensor | str:
    """``[N, HV, V]``, the state written in place."""
    why = state_reason(state) or index_reason(ssm_state_indices=indices)
    if why is not None:
        return why
    num_v_heads, head_v_dim, head_k_dim = state.shape[1:]
    return torch.ops.gdn.packed_decode(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        indices,
        num_k_heads=(mixed_qkv.shape[-1] - num_v_heads * head_v_dim) // (2 * head_k_dim),
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        pad_slot_id=pad_slot_id,
    )


def packed_gates(gate: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``[B * T, HV]`` or ``[B, T, HV]`` as ``[B, T, HV]``, beside ``[B, T, H, K]``: a view."""
    return gate if gate.dim() == 3 else gate.unflatten(0, tokens.shape[:2])


def first(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """The first ``count`` rows: engines' buffers may be longer than the batch."""
    return tensor if tensor is None or tensor.shape[0] <= count else tensor[:count]


def conv_window(conv_state: torch.Tensor, columns: int) -> torch.Tensor:
    """The first ``columns`` of a pool: with room for drafts, engines keep the window there."""
    return conv_state if conv_state.shape[-1] == columns else conv_state[..., :columns]


def conv_reason(
    x: torch.Tensor, weight: torch.Tensor, conv_state: torch.Tensor | None, activation: object
) -> str | None:
    if conv_state is None:
        return "no conv state"
    if x.dtype not in FLOATS or conv_state.dtype not in FLOATS:
        return "a dtype that is not built"
    if weight.shape[1] not in contracts.CONV_WIDTHS:
        return f"a width of {weight.shape[1]}"
    if activation not in contracts.CONV_ACTIVATIONS:
        return f"activation {activation!r}"
    return None


def conv_activation(activation: bool | str | None) -> str | None:
    """Engines also take True for silu, and False for none."""
    return ("silu" if activation else None) if isinstance(activation, bool) else activation


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
    activation = conv_activation(activation)
    why = conv_reason(x, weight, conv_state, activation) or index_reason(cache_indices=indices, query_start_loc=offsets)
    if why is not None:
        return why
    if x.dim() != 2 or offsets is None:
        return "a batch of equal lengths"
    if x.stride(0) != 1:
        return "a time-last x"
    count = offsets.shape[0] - 1
    if has_initial_state is None:
        has_initial_state = x.new_zeros(count, dtype=torch.bool)
    elif has_initial_state.dtype is not torch.bool:
        return "has_initial_state that is not bool"
    return conv.causal_conv1d(
        x.transpose(0, 1),
        weight,
        bias,
        conv_window(conv_state, weight.shape[1] - 1),
        offsets,
        state_indices=first(indices, count),
        has_initial_state=first(has_initial_state, count),
        activation=activation,
        pad_slot_id=pad_slot_id,
    ).transpose(0, 1)
