"""The causal convolution kernels in Triton's interpreter, against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, assert_close, column_view, normal

from gdn_kernels import launch
from gdn_kernels.kernels.conv import causal_conv1d, causal_conv1d_update, causal_conv1d_verify

pytestmark = pytest.mark.interpreter

# Roundings of fp32 on the way: five terms, sigmoid and quotient.
ROUNDINGS = 16
D = 24
LENGTHS = (5, 0, 1, 17, 2, 0, 3)


@pytest.fixture(autouse=True)
def small_tiles():
    """Tiles smaller than the inputs, so that sequences and channels cross them."""
    with launch.pinned("causal_conv1d", launch.ConvConfig(block_t=8, block_d=16, num_warps=1, group=4)):
        with launch.pinned("causal_conv1d_update", launch.ConvConfig(block_t=1, block_d=16, num_warps=1)):
            yield


def pool(seed, slots, columns, dtype=torch.float32, channel_last=False):
    """States ``[slots, D, columns]`` in either layout, with room between slots."""
    values = normal(seed, slots, D, columns, dtype=dtype)
    if channel_last:
        wide = torch.full((slots, columns + 1, D), torch.nan, dtype=dtype)[:, :columns].transpose(1, 2)
    else:
        wide = torch.full((slots, D + 1, columns), torch.nan, dtype=dtype)[:, :D]
    return wide.copy_(values)


def path_outputs(path, weight, bias, activation):
    """fp64 outputs for the tokens after the first W-1 columns of ``path [D, W-1+L]``, and the sum of magnitudes."""
    W = weight.shape[1]
    windows = path.unfold(1, W, 1)
    y = (windows * weight.double()[:, None]).sum(-1)
    size = (windows.abs() * weight.double().abs()[:, None]).sum(-1)
    if bias is not None:
        y, size = y + bias.double()[:, None], size + bias.double().abs()[:, None]
    if activation is not None:
        y = y * y.sigmoid()
        # The slope of silu is at most 1.1.
        size = 1.1 * size
    return y.t(), size.t()


def check_conv(lengths, x, weight, bias, state, *, padding=0, slots=None, keeps=None, activation="silu", **options):
    """Run ``causal_conv1d`` on a copy of the pool; check outputs and every slot against the formula."""
    W, index_dtype = weight.shape[1], options.pop("index_dtype", torch.int32)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=index_dtype)
    pad = options.get("pad_slot_id", -1)
    before = state.clone()
    tensors = {
        "state_indices": None if slots is None else torch.tensor(slots, dtype=index_dtype),
        "has_initial_state": None if keeps is None else torch.tensor(keeps),
    }
    y = causal_conv1d(x, weight, bias, state, cu_seqlens, activation=activation, **tensors, **options)
    assert y.dtype == x.dtype and y.is_contiguous()

    expected, size = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    after = before.clone()
    for n, length in enumerate(lengths):
        slot = n if slots is None else slots[n]
        if length == 0 or not 0 <= slot < state.shape[0] or (slots is not None and slot == pad):
            continue
        start = int(cu_seqlens[n])
        window = before[slot] if keeps is None or keeps[n] else torch.zeros_like(before[slot])
        tokens = x[start : start + length].t()
        path = torch.cat([window.double(), tokens.double()], 1)
        expected[start : start + length], size[start : start + length] = path_outputs(path, weight, bias, activation)
        after[slot] = torch.cat([window, tokens.to(window.dtype)], 1)[:, 1 - W :]
    assert_close(y, expected, ROUNDINGS, size)
    assert torch.equal(state, after)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channel_last", [True, False], ids=["channel-last", "time-last"])
@pytest.mark.parametrize("W", [2, 3, 4], ids=lambda W: f"width-{W}")
def test_ragged_batch_matches_the_formula(W, channel_last, dtype):
    x, weight, bias = normal(0, sum(LENGTHS), D, dtype=dtype), normal(1, D, W, dtype=dtype), normal(2, D, dtype=dtype)
    check_conv(LENGTHS, x, weight, bias, pool(3, 8, W - 1, dtype, channel_last))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("activation", ["silu", "swish", None], ids=str)
def test_slots_recycled_slots_and_padding_slots(activation, index_dtype):
    x, weight = normal(0, sum(LENGTHS), D), normal(1, D, 4)
    # Slot -1, one past the pool, and a negative one are padding; sequences 0 and 4 start afresh.
    options = {"slots": [6, -1, 8, 2, 0, -5, 3], "keeps": [False, True, True, True, False, True, True]}
    y = check_conv(LENGTHS, x, weight, None, pool(3, 8, 3), activation=activation, index_dtype=index_dtype, **options)
    assert torch.equal(y[5:6], torch.zeros(1, D))


def test_the_padding_slot_may_be_slot_zero():
    x, weight = normal(0, 9, D), normal(1, D, 4)
    check_conv((4, 5), x, weight, None, pool(2, 3, 3), slots=[0, 2], pad_slot_id=0)


def test_without_indices_no_sequence_is_padding():
    x, weight = normal(0, 9, D), normal(1, D, 4)
    check_conv((4, 5), x, weight, None, pool(2, 3, 3), pad_slot_id=0)


def test_padding_tokens_full_of_nan_give_zeros():
    x = normal(0, 25, D)
    x[6:] = torch.nan
    x[0:3] = torch.nan
    y = check_conv((3, 3), x, normal(1, D, 4), normal(2, D), pool(3, 4, 3), slots=[-1, 2])
    assert torch.equal(y[:3], torch.zeros(3, D)) and torch.equal(y[6:], torch.zeros(19, D))


def test_a_recycled_slot_of_nan_does_not_leak():
    state = pool(2, 3, 3)
    state[1] = torch.nan
    check_conv((2, 4), normal(0, 6, D), normal(1, D, 4), None, state, slots=[1, 0], keeps=[False, False])
    assert state[1].isfinite().all()


def test_strided_tokens_and_weights_are_read_in_place():
    x, weight = column_view(normal(0, sum(LENGTHS), D)), normal(1, 4, D).t()
    check_conv(LENGTHS, x, weight, None, pool(2, 7, 3))
    check_conv(LENGTHS, column_view(normal(0, sum(LENGTHS), D), before=3), weight, None, pool(2, 7, 3))


@pytest.mark.parametrize("W", [2, 4], ids=lambda W: f"width-{W}")
def test_16_bit_weights_may_start_anywhere(W):
    x, state = normal(0, sum(LENGTHS), D, dtype=torch.float16), pool(2, 7, W - 1, torch.float16)
    storage = normal(1, D * W + 1, dtype=torch.float16)
    check_conv(LENGTHS, x, storage[1:].view(D, W), None, state)


@pytest.mark.parametrize("W", [3, 4], ids=lambda W: f"width-{W}")
def test_windows_may_be_strided_both_ways(W):
    state, windows = (torch.full((*shape, D, 2, W), torch.nan)[..., 0, 1:] for shape in [(7,), (3, 5)])
    state.copy_(pool(2, 7, W - 1))
    check_conv(LENGTHS, normal(0, sum(LENGTHS), D), normal(1, D, W), None, state)
    check_update(normal(3, 7, D), normal(1, D, W), None, state)
    check_verify(normal(4, 3, 5, D), normal(1, D, W), None, state, windows)


def test_the_state_may_have_another_dtype():
    x, weight = normal(0, sum(LENGTHS), D, dtype=torch.bfloat16), normal(1, D, 4)
    check_conv(LENGTHS, x, weight, None, pool(2, 7, 3, torch.float32))


def test_no_sequences_give_zeros():
    check_conv((), normal(0, 9, D), normal(1, D, 4), None, pool(2, 3, 3))


def test_no_tokens_leave_the_states_alone():
    check_conv((0, 0), torch.empty(0, D), normal(1, D, 4), None, pool(2, 3, 3))


def test_many_sequences_are_found():
    lengths = [(3 * n) % 5 for n in range(33)]
    x = normal(0, sum(lengths), D)
    check_conv(lengths, x, normal(1, D, 4), None, pool(2, 33, 3))


def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch():
    x, weight, bias, state = normal(0, sum(LENGTHS), D), normal(1, D, 4), normal(2, D), pool(3, 7, 3)
    alone = state[3:4].clone()
    y = check_conv(LENGTHS, x, weight, bias, state)
    cu_seqlens = torch.tensor([0, 17], dtype=torch.int32)
    assert torch.equal(causal_conv1d(x[6:23], weight, bias, alone, cu_seqlens), y[6:23])
    assert torch.equal(alone, state[3:4])


def update_oracle(x, weight, bias, before, slots, accepted, activation, pad):
    """Outputs, magnitudes and states after an update of ``x [N, t, D]``."""
    W, L, t = weight.shape[1], before.shape[2], x.shape[1]
    y, size = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    after = before.clone()
    for n in range(x.shape[0]):
        slot = n if slots is None else slots[n]
        first = 0 if accepted is None else accepted[n] - 1
        if not 0 <= slot < before.shape[0] or (slots is not None and slot == pad) or not 0 <= first <= L - W + 1:
            continue
        tokens = x[n].t()
        path = torch.cat([before[slot][:, first : first + W - 1].double(), tokens.double()], 1)
        y[n], size[n] = path_outputs(path, weight, bias, activation)
        if accepted is None:
            after[slot] = torch.cat([before[slot], tokens.to(before.dtype)], 1)[:, 1 - W :]
        else:
            zeros = torch.zeros_like(before[slot])
            kept = torch.cat([before[slot], zeros], 1)[:, first + 1 : first + 1 + L - t]
            after[slot] = torch.cat([kept, tokens.to(before.dtype)], 1)
    return y, size, after


def check_update(
    x, weight, bias, state, *, slots=None, accepted=None, activation="silu", index_dtype=torch.int32, pad=-1
):
    before = state.clone()
    tokens = x if x.dim() == 3 else x[:, None]
    y = causal_conv1d_update(
        x,
        weight,
        bias,
        state,
        state_indices=None if slots is None else torch.tensor(slots, dtype=index_dtype),
        num_accepted_tokens=None if accepted is None else torch.tensor(accepted, dtype=index_dtype),
        activation=activation,
        pad_slot_id=pad,
    )
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    expected, size, after = update_oracle(tokens, weight, bias, before, slots, accepted, activation, pad)
    assert_close(y.view(tokens.shape), expected, ROUNDINGS, size)
    assert torch.equal(state, after)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channel_last", [True, False], ids=["channel-last", "time-last"])
@pytest.mark.parametrize("W", [2, 3, 4], ids=lambda W: f"width-{W}")
def test_update_by_one_token(W, channel_last, dtype):
    x, weight, bias = normal(0, 4, D, dtype=dtype), normal(1, D, W, dtype=dtype), normal(2, D, dtype=dtype)
    check_update(x, weight, bias, pool(3, 6, W - 1, dtype, channel_last), slots=[5, 0, -1, 2])


@pytest.mark.parametrize("tokens", [1, 2, 3, 5], ids=lambda t: f"{t}-tokens")
@pytest.mark.parametrize("W", [2, 3, 4], ids=lambda W: f"width-{W}")
def test_update_by_a_few_tokens(W, tokens):
    x = column_view(normal(0, 3, tokens, D))
    check_update(x, normal(1, D, W), None, pool(2, 3, W - 1), activation=None)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("columns", [5, 8], ids=["tight-state", "roomy-state"])
def test_update_continues_after_the_accepted_tokens(columns, index_dtype):
    # Three drafts of width 4 need 5 columns. Counts below 1 and above L - W + 2 make a row inert.
    accepted = [1, 2, 3, 0, columns - 2, columns - 1, -7]
    x = normal(0, len(accepted), 3, D)
    slots = [6, 5, 4, 3, 2, 1, 0]
    check_update(
        x, normal(1, D, 4), normal(2, D), pool(3, 7, columns), slots=slots, accepted=accepted, index_dtype=index_dtype
    )


def test_update_leaves_padding_rows_alone():
    x = normal(0, 5, 2, D)
    x[1], x[3] = torch.nan, torch.nan
    check_update(x, normal(1, D, 4), normal(2, D), pool(3, 4, 3), slots=[3, 0, 1, 4, 2], pad=0)


def test_update_finds_its_slots_in_a_column_of_a_table():
    x, weight, bias, state = normal(0, 3, D), normal(1, D, 4), normal(2, D), pool(3, 5, 3)
    slots, wanted_state = torch.tensor([[3, 1, 1], [0, 2, 2], [4, 1, 2]]), state.clone()
    wanted = causal_conv1d_update(x, weight, bias, wanted_state, state_indices=slots[:, 0].contiguous())
    assert torch.equal(causal_conv1d_update(x, weight, bias, state, state_indices=slots[:, 0]), wanted)
    assert torch.equal(state, wanted_state)


def test_update_of_an_empty_batch():
    check_update(torch.empty(0, D), normal(1, D, 4), None, pool(2, 3, 3))


def test_update_gives_the_bits_of_the_packed_convolution():
    x, weight, bias, state = normal(0, 2, 5, D), normal(1, D, 4), normal(2, D), pool(3, 2, 3)
    packed_state = state.clone()
    cu_seqlens = torch.tensor([0, 5, 10], dtype=torch.int32)
    packed = causal_conv1d(x.flatten(0, 1), weight, bias, packed_state, cu_seqlens)
    for i in range(5):
        assert torch.equal(causal_conv1d_update(x[:, i], weight, bias, state), packed.view(2, 5, D)[:, i])
    assert torch.equal(state, packed_state)


def check_verify(x, weight, bias, state, windows, *, slots=None, rows=None, parents=None, index_dtype=torch.int32):
    N, t, _ = x.shape
    before, expected_windows = state.clone(), windows.clone()
    expected, size = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for n in range(N):
        slot, m = n if slots is None else slots[n], n if rows is None else rows[n]
        if not 0 <= slot < state.shape[0]:
            continue
        after = {}
        for i in range(t):
            parent = i - 1 if parents is None else parents[n][i]
            window = after[parent] if 0 <= parent < i else before[slot].double()
            path = torch.cat([window, x[n, i, :, None].double()], 1)
            y, magnitude = path_outputs(path, weight, bias, "silu")
            expected[n, i], size[n, i] = y[0], magnitude[0]
            after[i] = path[:, 1:]
            if 0 <= m < windows.shape[0]:
                expected_windows[m, i] = after[i].to(windows.dtype)
    y = causal_conv1d_verify(
        x,
        weight,
        bias,
        state,
        windows,
        state_indices=None if slots is None else torch.tensor(slots, dtype=index_dtype),
        intermediate_indices=None if rows is None else torch.tensor(rows, dtype=index_dtype),
        parents=None if parents is None else torch.tensor(parents, dtype=index_dtype),
    )
    assert y.is_contiguous()
    assert_close(y, expected, ROUNDINGS, size)
    assert torch.equal(state, before)
    assert torch.equal(windows.nan_to_num(nan=123.0), expected_windows.nan_to_num(nan=123.0))


def poisoned(M, t, W, dtype=torch.float32, channel_last=False):
    if channel_last:
        return torch.full((M, t, W - 1, D), torch.nan, dtype=dtype).transpose(2, 3)
    return torch.full((M, t, D, W - 1), torch.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channel_last", [True, False], ids=["channel-last", "time-last"])
@pytest.mark.parametrize("W", [2, 3, 4], ids=lambda W: f"width-{W}")
def test_verify_of_a_chain_stores_each_window(W, channel_last, dtype):
    x = column_view(normal(0, 3, 5, D, dtype=dtype))
    state, windows = pool(3, 4, W - 1, dtype, channel_last), poisoned(3, 6, W, dtype, channel_last)
    check_verify(x, normal(1, D, W, dtype=dtype), normal(2, D, dtype=dtype), state, windows)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("W", [2, 3, 4], ids=lambda W: f"width-{W}")
def test_verify_of_a_tree_follows_parents(W, index_dtype):
    # The second row: parents that are the token itself, a later one or far out of range mean the slot's window.
    parents = [[-1, 0, 0, 1, 1, 3, 5], [0, -9, 2, 6, 99, 4, 0], [-1, 0, 1, 2, 3, 4, 5]]
    x = normal(0, 3, 7, D)
    check_verify(
        x, normal(1, D, W), None, pool(2, 3, W - 1), poisoned(3, 7, W), parents=parents, index_dtype=index_dtype
    )


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_verify_masks_padding_slots_and_rows_outside_the_buffer(index_dtype):
    x = normal(0, 5, 2, D)
    x[1] = torch.nan
    check_verify(
        x,
        normal(1, D, 4),
        None,
        pool(2, 4, 3),
        poisoned(3, 2, 4),
        slots=[3, -1, 0, 4, 2],
        rows=[2, 1, -1, 0, 3],
        index_dtype=index_dtype,
    )


def test_verify_of_an_empty_batch():
    check_verify(torch.empty(0, 3, D), normal(1, D, 4), None, pool(2, 3, 3), poisoned(2, 3, 4))
