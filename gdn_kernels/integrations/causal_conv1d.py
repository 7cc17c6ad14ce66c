"""causal-conv1d's two functions on this package's operators: change the import, keep the calls.

``from causal_conv1d import causal_conv1d_fn, causal_conv1d_update`` becomes ``from
gdn_kernels.integrations.causal_conv1d import ...``; that package need not be installed. Signatures, defaults and
layouts are those of its 1.7.0: ``[B, D, L]`` tensors, ``[B, D, W - 1]`` states, widths 2 to 4; bf16, fp16 or fp32.

What differs, beside running on a CPU too: any number of channels and either layout, wherever it asks for multiples of 8
and channel-last, and an output that is channel-last (a ``[B, D, L]`` view of ``[B, L, D]`` memory) whatever x is. An
option that is not built raises ``NotImplementedError`` naming it, other wrong input what ``gdn_kernels.contracts``
lists.

``causal_conv1d_fn`` is differentiable in every tensor that it takes, in its output and in the final states; the update
refuses an input that requires grad.

Costs to know: channel-last x (``x.stride(1) == 1``, as the transpose of a projection has it) is read as it is;
time-last x (a contiguous ``[B, D, L]`` with L > 1) is copied first, one more pass over it.
"""

from __future__ import annotations

import torch

from gdn_kernels.integrations._common import differentiates, not_built, rows
from gdn_kernels.ops import conv

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]


def _rank(name: str, tensor: torch.Tensor, layout: str, *ranks: int) -> None:
    if tensor.dim() not in ranks:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")


def _like_x(name: str, tensor: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype is not x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution of a batch of equal lengths; ``gdn_kernels.causal_conv1d`` in that package's layout.

    Args:
        x: ``[B, D, L]``, bf16, fp16 or fp32; see the module's text for what a time-last x costs, and batch rows that do
            not follow one another in memory are copied as well.
        weight: ``[D, W]``, W of 2 to 4. bias: ``[D]`` or None.
        seq_idx: not built. Pack the sequences and give ``gdn_kernels.causal_conv1d`` their ``cu_seqlens``.
        initial_states: ``[B, D, W - 1]``, the dtype of x, newest column last; default zeros. Only read.
        return_final_states: also return the last W - 1 columns of (initial_states, x).
        final_states_out: ``[B, D, W - 1]``, the dtype of x, any strides: where the final states are copied. Without
            ``return_final_states`` it is not touched.
        activation: ``"silu"``, ``"swish"`` or None.

    Returns:
        ``[B, D, L]`` in the dtype of x, channel-last; with ``return_final_states`` a pair with the final states, which
        are ``final_states_out`` or new, channel-last.

    Raises:
        NotImplementedError: ``seq_idx``, a width.
        TypeError, ValueError: as ``contracts.causal_conv1d`` lists.

    Source: ``causal_conv1d_interface.py`` of causal-conv1d 1.7.0 for the signature.
    """
    not_built("causal_conv1d_fn", seq_idx=seq_idx)
    _rank("x", x, "[B, D, L]", 3)
    _rank("weight", weight, "[D, W]", 2)
    batch, channels, length = x.shape
    window = (batch, channels, weight.shape[1] - 1)
    for name, tensor in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        if tensor is not None:
            _like_x(name, tensor, x, window)
    if differentiates(x, weight, bias, initial_states) and (initial_states is not None or return_final_states):
        return _as_tokens(x, weight, bias, initial_states, return_final_states, final_states_out, activation)
    state = x.new_zeros(batch, window[2], channels).transpose(1, 2)
    if initial_states is not None:
        state.copy_(initial_states)
    offsets = torch.arange(batch + 1, device=x.device, dtype=torch.int32) * length
    tokens = rows(x.transpose(1, 2)).flatten(0, 1)
    y = conv.causal_conv1d(tokens, weight, rows(bias), state, offsets, activation=activation)
    y = y.view(batch, length, channels).transpose(1, 2)
    if not return_final_states:
        return y
    return y, state if final_states_out is None else final_states_out.copy_(state)


def _as_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    return_final_states: bool,
    final_states_out: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """With the initial states as each sequence's first tokens, so that states have gradients as x does."""
    width = weight.shape[1] - 1
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], x.shape[1], width)
    columns = torch.cat([initial_states.mT, x.mT], 1).mT
    y = causal_conv1d_fn(columns, weight, bias, activation=activation)[..., width:]
    if not return_final_states:
        return y
    final_states = columns[..., columns.shape[-1] - width :]
    return y, final_states.clone() if final_states_out is None else final_states_out.copy_(final_states)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """The convolution of one or a few new tokens a row; ``gdn_kernels.causal_conv1d_update`` in that package's layout.

    Args:
        x: ``[B, D]`` or ``[B, D, L]``, bf16, fp16 or fp32; time-last x of L > 1 is copied first.
        conv_state: ``[B, D, state_len]``, or ``[S, D, state_len]`` with ``conv_state_indices``, any strides,
            ``state_len >= W - 1``, newest column last. Written: the last ``state_len`` columns of (conv_state, x).
            W - 1 columns are the fast case: moving further, older columns costs two small launches a call.
        weight: ``[D, W]``, W of 2 to 4. bias: ``[D]`` or None. activation: ``"silu"``, ``"swish"`` or None.
        cache_seqlens: circular states, not built.
        conv_state_indices: ``[B]`` int32 or int64, the slot of each row; a negative index is padding: output zero,
            nothing written. Only with W - 1 columns.

    Returns:
        The shape and dtype of x; of three dimensions, channel-last.

    Raises:
        NotImplementedError: ``cache_seqlens``; ``conv_state_indices`` with more than W - 1 columns; a width; a tensor
            that requires grad.
        TypeError, ValueError: as ``contracts.causal_conv1d_update`` lists.

    Source: ``causal_conv1d_interface.py`` of causal-conv1d 1.7.0 for the signature.
    """
    not_built("causal_conv1d_update", cache_seqlens=cache_seqlens)
    _rank("x", x, "[B, D] or [B, D, L]", 2, 3)
    _rank("weight", weight, "[D, W]", 2)
    _rank("conv_state", conv_state, "[B, D, state_len]", 3)
    width, columns = weight.shape[1] - 1, conv_state.shape[2]
    older = columns - width
    if older < 0:
        raise ValueError(f"conv_state must hold at least W - 1 = {width} columns, got shape {tuple(conv_state.shape)}")
    if older and conv_state_indices is not None:
        raise NotImplementedError(
            f"conv_state_indices must be None where conv_state holds more than W - 1 = {width} columns, got {columns}"
        )
    if conv_state_indices is None and conv_state.shape[0] != x.shape[0]:
        raise ValueError(f"conv_state must have the {x.shape[0]} rows of x, got shape {tuple(conv_state.shape)}")
    tokens = rows(x.transpose(1, 2)) if x.dim() == 3 else rows(x)
    moved = _moved(x, conv_state, older) if older else None
    y = conv.causal_conv1d_update(
        tokens, weight, rows(bias), conv_state[..., older:], state_indices=conv_state_indices, activation=activation
    )
    if moved is not None:
        conv_state[..., :older].copy_(moved)
    return y.transpose(1, 2) if x.dim() == 3 else y


def _moved(x: torch.Tensor, conv_state: torch.Tensor, older: int) -> torch.Tensor:
    """The ``older`` first columns that the state will have, taken before the operator moves the others."""
    new = x.unsqueeze(-1) if x.dim() == 2 else x
    first = new.shape[2]
    if first + older <= conv_state.shape[2]:
        return conv_state[..., first : first + older].clone()
    return torch.cat([conv_state, new.to(conv_state.dtype)], -1)[..., first : first + older]
