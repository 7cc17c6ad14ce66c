"""Depthwise causal convolution over a packed batch and its updates, in plain PyTorch.

``y[t, d] = act(bias[d] + sum_j weight[d, j] x[t - (W - 1) + j, d])``, where the columns before a sequence's first token
come from its slot of the conv state, newest last. State columns are moved in the state's own dtype, so that those
which are kept keep their bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_kernels.reference import _math

BLOCK = 64  # tokens filtered at once, so that the passes over them stay in the cache


def _filter(columns: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """columns [..., W - 1 + L, D], time before channel -> [..., L, D]."""
    W = weight.shape[1]
    L = columns.shape[-2] - (W - 1)
    taps = weight.to(columns.dtype).t().contiguous()
    y = columns[..., :L, :] * taps[0]
    if bias is not None:
        y += bias.to(columns.dtype)
    for j in range(1, W):
        y.addcmul_(columns[..., j : j + L, :], taps[j])
    return _math.activate(y, activation)


def _columns(state: Tensor, first: Tensor, count: int) -> Tensor:
    """Columns first .. first + count - 1 of each row of [rows, L, D]; zero past L."""
    index = first + torch.arange(count)
    inside = index < state.shape[1]
    picked = state[torch.arange(len(state))[:, None], torch.where(inside, index, 0)]
    return picked.masked_fill_(~inside[..., None], 0)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    cu_seqlens: Tensor,
    *,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> Tensor:
    """The convolution of each sequence of a packed batch; use it for prefill.

    x ``[T, D]``, weight ``[D, W]``, bias ``[D]``, conv_state ``[S, D, W-1]`` (each sequence's slot gets the last W-1
    columns of its old state and tokens), cu_seqlens ``[N+1]``. Returns ``[T, D]``, zero for padding.
    """
    sequences = _math.spans(x.shape[0], cu_seqlens)
    slots = _math.own_slots(state_indices, len(sequences), conv_state.shape[0], pad_slot_id).tolist()
    keeps = _math.flags(has_initial_state, len(sequences))
    dtype, width = _math.compute_dtype(x), weight.shape[1] - 1

    y = x.new_zeros(x.shape)
    for (_, start, end), slot, keep in zip(sequences, slots, keeps, strict=True):
        if slot < 0 or start == end:
            continue
        state = conv_state[slot].t()  # [W-1, D]
        window = state.clone() if keep else torch.zeros_like(state)
        columns = torch.cat([window.to(dtype), x[start:end].to(dtype)])
        for i in range(0, end - start, BLOCK):
            part = _filter(columns[i : i + BLOCK + width], weight, bias, activation)
            y[start + i : start + i + len(part)] = part
        state.copy_(torch.cat([window, x[max(start, end - width) : end].to(window.dtype)])[-width:])
    return y


def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    *,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> Tensor:
    """The convolution of one or a few new tokens a row, after the row's state; use it for decode.

    x ``[N, D]`` or ``[N, t, D]``, conv_state ``[S, D, W-1]``, which gets the last W-1 columns of itself and x.
    With num_accepted_tokens ``[N]`` it is ``[S, D, L]``, L >= W-2+t: the window starts at column accepted - 1, and
    the columns after that one move to the front and are followed by x. Returns the shape of x, zero for padding rows
    and for accepted counts outside 1..L-W+2, whose states stay as they are.
    """
    tokens = x.unsqueeze(1) if x.dim() == 2 else x  # [N, t, D]
    t, L, width = tokens.shape[1], conv_state.shape[2], weight.shape[1] - 1
    dtype = _math.compute_dtype(x)
    slot = _math.own_slots(state_indices, x.shape[0], conv_state.shape[0], pad_slot_id)
    first = torch.zeros_like(slot) if num_accepted_tokens is None else num_accepted_tokens.long() - 1
    rows = ((slot >= 0) & (first >= 0) & (first + width <= L)).nonzero().squeeze(1)
    slot, first, fresh = slot[rows], first[rows, None], tokens[rows]

    old = conv_state[slot].transpose(1, 2)  # [rows, L, D]
    window = kept = old
    if num_accepted_tokens is not None:
        window = _columns(old, first, width)
        kept = _columns(old, first + 1, L - t)
    y = tokens.new_zeros(tokens.shape)
    y[rows] = _filter(torch.cat([window.to(dtype), fresh.to(dtype)], 1), weight, bias, activation).to(y.dtype)
    conv_state[slot] = torch.cat([kept, fresh.to(kept.dtype)], 1)[:, -L:].transpose(1, 2)
    return y.view(x.shape)


def causal_conv1d_verify(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    intermediate_windows: Tensor,
    *,
    state_indices: Tensor | None = None,
    intermediate_indices: Tensor | None = None,
    parents: Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> Tensor:
    """The convolution of draft tokens, a chain or a tree, that leaves conv_state alone; use it for verify.

    x ``[N, t, D]``, conv_state ``[S, D, W-1]``, intermediate_windows ``[M, >=t, D, W-1]``: row
    intermediate_indices[n] (or n) gets, for each token, the last W-1 columns of its path. parents ``[N, t]``: the
    token that each one follows; outside 0..i-1 it follows the state. Returns ``[N, t, D]``, zero for padding rows.
    """
    N, t, D = x.shape
    dtype, width = _math.compute_dtype(x), weight.shape[1] - 1
    slot = _math.own_slots(state_indices, N, conv_state.shape[0], pad_slot_id)
    target = _math.own_slots(intermediate_indices, N, intermediate_windows.shape[0])
    rows = (slot >= 0).nonzero().squeeze(1)
    each, fresh, target = torch.arange(rows.numel()), x[rows].to(dtype), target[rows]

    windows = fresh.new_empty(rows.numel(), t + 1, width, D)  # 0: the state's; i + 1: after token i
    windows[:, 0] = conv_state[slot[rows]].transpose(1, 2).to(dtype)
    y = x.new_zeros(x.shape)
    for i in range(t):
        parent = torch.full_like(each, i - 1) if parents is None else parents[rows, i].long()
        before = windows[each, torch.where((parent >= 0) & (parent < i), parent + 1, 0)]
        path = torch.cat([before, fresh[:, i : i + 1]], 1)
        windows[:, i + 1] = path[:, 1:]
        y[rows, i] = _filter(path, weight, bias, activation).squeeze(1).to(y.dtype)

    stored = target >= 0
    after = windows[stored, 1:].transpose(2, 3).to(intermediate_windows.dtype)
    intermediate_windows[:, :t][target[stored]] = after
    return y
