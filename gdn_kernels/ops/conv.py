"""``causal_conv1d``, ``causal_conv1d_update`` and ``causal_conv1d_verify``: the short depthwise convolution."""

from __future__ import annotations

import torch

from gdn_kernels import launch
from gdn_kernels.ops.registry import define
from gdn_kernels.reference import backward

define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_state, Tensor cu_seqlens, *, "
    "Tensor? state_indices=None, Tensor? has_initial_state=None, "
    'str? activation="silu", int pad_slot_id=-1) -> Tensor',
    module="conv",
    fake=lambda x, *args, **options: x.new_empty(x.shape),
    backward=backward.causal_conv1d,
    keep=backward.causal_conv1d_inputs,
)
define(
    "causal_conv1d_update(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_state, *, "
    "Tensor? state_indices=None, Tensor? num_accepted_tokens=None, "
    'str? activation="silu", int pad_slot_id=-1) -> Tensor',
    module="conv",
    fake=lambda x, *args, **options: x.new_empty(x.shape),
)
define(
    "causal_conv1d_verify(Tensor x, Tensor weight, Tensor? bias, Tensor conv_state, Tensor(a!) intermediate_windows, "
    "*, Tensor? state_indices=None, Tensor? intermediate_indices=None, Tensor? parents=None, "
    'str? activation="silu", int pad_slot_id=-1) -> Tensor',
    module="conv",
    fake=lambda x, *args, **options: x.new_empty(x.shape),
)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """Depthwise causal convolution over a packed batch of sequences, continuing from a pool of conv states.

    ``y[t, d] = act(bias[d] + sum_j weight[d, j] * x[t - (W - 1) + j, d])``; columns before a sequence's first token
    come from its slot's state.

    Args:
        x: ``[T, D]``, bf16, fp16 or fp32, last dimension contiguous, token stride free.
        weight: ``[D, W]``, W of 2 to 4, strides free. bias: ``[D]`` or None.
        conv_state: ``[S, D, W - 1]`` by strides (channel-last and time-last both work), newest token last. Written:
            the last W - 1 columns of (state, sequence). A sequence shorter than W - 1 keeps older columns; an empty
            sequence leaves its slot as it is.
        cu_seqlens: ``[N + 1]`` int32 or int64. Tokens past the last offset are padding: their output is zero.
        state_indices: ``[N]`` int32 or int64, the slot of each sequence; default slot n. An index equal to
            ``pad_slot_id``, negative or past the pool is padding: output zero, no state written.
        has_initial_state: ``[N]`` bool; where False the state counts as zeros, whatever the slot holds. Default: every
            sequence continues from its slot.
        activation: ``"silu"``, ``"swish"`` or None.

    Returns:
        ``[T, D]`` in the dtype of ``x``, contiguous. Differentiable in x, weight and bias; what is written to
        ``conv_state`` carries no gradient. The functions of ``gdn_kernels.integrations`` that return final states are
        differentiable in them and in the initial states too.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.causal_conv1d`` lists; NotImplementedError also for a
            ``conv_state`` that requires grad.
    """
    return torch.ops.gdn.causal_conv1d(
        x,
        weight,
        bias,
        conv_state,
        cu_seqlens,
        state_indices=state_indices,
        has_initial_state=has_initial_state,
        activation=activation,
        pad_slot_id=pad_slot_id,
    )


def causal_conv1d_update(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    *,
    state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """:func:`causal_conv1d` for one or a few new tokens a sequence: the conv of a decode step.

    Args:
        x: ``[N, D]`` or ``[N, t, D]``.
        weight, bias, activation, pad_slot_id, state_indices: as for :func:`causal_conv1d`; state_indices of any stride,
            such as the first column of a table of slots.
        conv_state: ``[S, D, W - 1]``, written. With ``num_accepted_tokens`` ``[S, D, L]``, ``L >= W - 2 + t``: it
            holds the columns before and of the last drafted tokens.
        num_accepted_tokens: ``[N]`` int32 or int64, how many tokens of the last call stand. The window read is
            columns ``o .. o + W - 2``, ``o = num_accepted - 1``; the state becomes the ``L - t`` columns from
            ``o + 1`` on, then the t new tokens. A count outside ``1 .. L - W + 2`` makes the row inert: zeros, nothing
            written.

    Returns:
        The shape and dtype of ``x``, contiguous.
    """
    return torch.ops.gdn.causal_conv1d_update(
        x,
        weight,
        bias,
        conv_state,
        state_indices=state_indices,
        num_accepted_tokens=num_accepted_tokens,
        activation=activation,
        pad_slot_id=pad_slot_id,
    )


def causal_conv1d_verify(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    intermediate_windows: torch.Tensor,
    *,
    state_indices: torch.Tensor | None = None,
    intermediate_indices: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """The conv of drafted tokens, with the pool left alone: the window after each token goes to a buffer.

    Args:
        x: ``[N, t, D]``, the drafted tokens.
        conv_state: ``[S, D, W - 1]``, read only.
        intermediate_windows: ``[M, >= t, D, W - 1]`` by strides, written: ``[m, i]`` is the window after token i.
        intermediate_indices: ``[N]``, the row m of each sequence; default n. Outside the buffer: nothing is stored.
        parents: ``[N, t]`` int32 or int64: token i follows token ``parents[n, i]``, or the slot's window where that is
            outside ``[0, i)``. Default: token i follows token i - 1.
        weight, bias, state_indices, activation, pad_slot_id: as for :func:`causal_conv1d`.

    Returns:
        ``[N, t, D]`` in the dtype of ``x``, contiguous; zero in padding rows.
    """
    return torch.ops.gdn.causal_conv1d_verify(
        x,
        weight,
        bias,
        conv_state,
        intermediate_windows,
        state_indices=state_indices,
        intermediate_indices=intermediate_indices,
        parents=parents,
        activation=activation,
        pad_slot_id=pad_slot_id,
    )


def _warm(shapes: launch.ModelShapes, device: torch.device) -> None:
    channels, width, drafts = shapes.conv_channels, shapes.conv_width, shapes.draft_tokens
    x = torch.zeros(2, channels, dtype=shapes.dtype, device=device)
    weight = torch.zeros(channels, width, dtype=shapes.dtype, device=device)

    def pool(columns: int = width - 1) -> torch.Tensor:
        return torch.zeros(2, columns, channels, dtype=shapes.dtype, device=device).transpose(1, 2)

    slots = torch.arange(2, dtype=shapes.index_dtype, device=device)
    offsets = torch.arange(3, dtype=shapes.index_dtype, device=device)
    for fresh in (None, torch.ones(2, dtype=torch.bool, device=device)):
        causal_conv1d(x, weight, None, pool(), offsets, state_indices=slots, has_initial_state=fresh)
    causal_conv1d_update(x, weight, None, pool(), state_indices=slots)
    if drafts:
        rows = x[:, None].expand(2, drafts, channels).contiguous()
        windows = torch.zeros(2, drafts, channels, width - 1, dtype=shapes.dtype, device=device)
        columns = width - 2 + drafts
        causal_conv1d_update(rows, weight, None, pool(columns), state_indices=slots, num_accepted_tokens=slots)
        for tree in (None, torch.zeros(2, drafts, dtype=shapes.index_dtype, device=device)):
            causal_conv1d_verify(rows, weight, None, pool(), windows, state_indices=slots, parents=tree)


launch.register_warmup("causal_conv1d", _warm)
