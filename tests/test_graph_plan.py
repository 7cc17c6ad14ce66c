"""A batch's metadata at a static capacity: what is inert, what is refused, and the bits of a batch of its own size."""

from __future__ import annotations

import pytest
import torch
from token_cases import assert_same_bits

from gdn_kernels import graphs, nn

HIDDEN, H, HV, K, V = 24, 1, 2, 64, 64
SLOTS = 8


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def fields(plan: graphs.BatchPlan) -> dict[str, torch.Tensor]:
    names = "cu_seqlens", "state_indices", "lengths", "num_accepted_tokens", "draft_indices", "has_initial_state"
    return {name: getattr(plan, name) for name in names}


def mixer() -> nn.GatedDeltaNet:
    torch.manual_seed(0)
    return nn.GatedDeltaNet(HIDDEN, H, HV, K, V, layer_id=0).requires_grad_(False)


def states(made: nn.GatedDeltaNet) -> graphs.LayerState:
    found = made.allocate_states(SLOTS)
    generator = torch.Generator().manual_seed(1)
    for pool in (found.conv_state, found.recurrent_state):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    return found


def run(made: nn.GatedDeltaNet, metadata: graphs.BatchMetadata, x: torch.Tensor) -> list[torch.Tensor]:
    """What the layer gives and what it leaves in its pools."""
    layer = states(made)
    with graphs.forward_context({0: layer}, metadata):
        return [made(x), layer.conv_state, layer.recurrent_state]


def test_unused_entries_are_inert() -> None:
    plan = graphs.BatchPlan(5, 20, pad_slot_id=-7)
    plan.fill([3, 0, 4], [6, 1, 2], has_initial_state=[True, False, True])
    found = {name: x.tolist() for name, x in fields(plan).items()}
    assert found == {
        "cu_seqlens": [0, 3, 3, 7, 7, 7],
        "state_indices": [6, 1, 2, -7, -7],
        "lengths": [3, 0, 4, 0, 0],
        "num_accepted_tokens": [1] * 5,
        "draft_indices": [[-7]] * 5,
        "has_initial_state": [True, False, True, False, False],
    }
    assert (plan.count, plan.tokens) == (3, 7)
    plan = graphs.BatchPlan(4, 20, draft_tokens=3, pad_slot_id=-7)
    plan.fill_verify([[6, 1, 2], [3, -7, 5]], [2, 3])
    assert plan.draft_indices.tolist() == [[6, 1, 2], [3, -7, 5], [-7] * 3, [-7] * 3]
    assert plan.state_indices.tolist() == [6, 3, -7, -7] and plan.num_accepted_tokens.tolist() == [2, 3, 1, 1]
    assert plan.cu_seqlens.tolist() == [0, 3, 6, 6, 6] and plan.kind == "verify"
    plan.fill([], [])
    assert (
        set(plan.draft_indices.flatten().tolist()) == {-7}
        and plan.state_indices.tolist() == [-7] * 4
        and not plan.cu_seqlens.any()
        and not plan.has_initial_state.any()
    )


@pytest.mark.parametrize("num_sequences", [1, 3, 4, 5, 64])
def test_the_tensors_stay_where_they_are_at_16_bytes(num_sequences: int) -> None:
    plan = graphs.BatchPlan(num_sequences, 100, draft_tokens=3)
    pointers = [x.data_ptr() for x in fields(plan).values()]
    plan.fill([2] * num_sequences if num_sequences < 50 else [1], range(num_sequences) if num_sequences < 50 else [0])
    assert [x.data_ptr() for x in fields(plan).values()] == pointers
    start = plan.cu_seqlens.data_ptr()
    assert all((pointer - start) % 16 == 0 for pointer in pointers)
    assert {x.dtype for x in fields(plan).values()} == {torch.int32, torch.bool}
    metadata = plan.batch()
    assert metadata.cu_seqlens.data_ptr() == plan.cu_seqlens.data_ptr()
    assert metadata.state_indices.data_ptr() == plan.state_indices.data_ptr()


LARGER = {
    "sequences": ([1] * 4, [0, 1, 2, 3]),
    "tokens": ([6, 5], [0, 1]),
}


@pytest.mark.parametrize("name", LARGER)
def test_a_batch_larger_than_the_plan_is_refused_and_nothing_written(name: str) -> None:
    plan = graphs.BatchPlan(3, 10)
    plan.fill([4, 2], [5, 6])
    before = {key: x.clone() for key, x in fields(plan).items()}
    with pytest.raises(RuntimeError, match=r"^the batch must fit the plan of 3 sequences and 10 tokens, got "):
        plan.fill(*LARGER[name])
    assert all(torch.equal(x, before[key]) for key, x in fields(plan).items())
    assert (plan.count, plan.tokens) == (2, 6)


BAD = {
    "few-slots": (([1, 1], [0]), {}, r"slots must have an entry for each of the 2 sequences, got 1"),
    "flags": (([1], [0]), {"has_initial_state": []}, r"has_initial_state must have an entry for each of the 1"),
    "negative": (([2, -1], [0, 1]), {}, r"lengths must not be negative, got -1"),
    "one-slot": (([1, 1], [2, 2]), {}, r"slots must name each slot once, got \[2, 2\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_batch_can_be_is_refused_and_nothing_written(name: str) -> None:
    arguments, options, message = BAD[name]
    plan = graphs.BatchPlan(3, 10)
    plan.fill([4, 2], [5, 6])
    before = {key: x.clone() for key, x in fields(plan).items()}
    with pytest.raises(ValueError, match=message):
        plan.fill(*arguments, **options)
    assert all(torch.equal(x, before[key]) for key, x in fields(plan).items())


BAD_VERIFICATIONS = {
    "short": (([[0, 1]], [1]), r"slots must have 3 entries for each sequence, got \[2\]"),
    "none-accepted": (([[0, 1, 2]], [0]), r"num_accepted_tokens must lie between 1 and 3, got \[0\]"),
    "too-many-accepted": (([[0, 1, 2]], [4]), r"num_accepted_tokens must lie between 1 and 3, got \[4\]"),
    "few-counts": (([[0, 1, 2]], []), r"num_accepted_tokens must have an entry for each of the 1"),
    "one-slot": (([[0, 1, 2], [3, 4, 0]], [1, 1]), r"slots must name each slot once"),
}


@pytest.mark.parametrize("name", BAD_VERIFICATIONS)
def test_what_no_verification_can_be_is_refused_and_nothing_written(name: str) -> None:
    arguments, message = BAD_VERIFICATIONS[name]
    plan = graphs.BatchPlan(3, 10, draft_tokens=3)
    plan.fill_verify([[5, 6, 7]], [2])
    before = {key: x.clone() for key, x in fields(plan).items()}
    with pytest.raises(ValueError, match=message):
        plan.fill_verify(*arguments)
    assert all(torch.equal(x, before[key]) for key, x in fields(plan).items()) and plan.kind == "verify"
    with pytest.raises(RuntimeError, match="must fit the plan of 3 sequences and 10 tokens, got 4 and 12"):
        plan.fill_verify([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]], [1] * 4)


def test_a_plan_holds_at_least_one_sequence_and_token() -> None:
    with pytest.raises(ValueError, match=r"^num_sequences must be at least 1, got 0$"):
        graphs.BatchPlan(0, 4)
    with pytest.raises(ValueError, match=r"^num_tokens must be at least 1, got 0$"):
        graphs.BatchPlan(4, 0)


def test_a_decode_takes_one_token_of_each_sequence_and_rows_that_fit() -> None:
    plan = graphs.BatchPlan(4, 16)
    plan.fill([1, 1], [3, 0])
    assert (
        plan.batch(3, kind="decode").state_indices.tolist() == [3, 0, -1]
        and plan.batch(3, kind="decode").cu_seqlens is None
    )
    assert plan.batch(3, kind="decode").state_indices.data_ptr() == plan.state_indices.data_ptr()
    for rows in (1, 5):
        with pytest.raises(RuntimeError, match=f"rows must lie between .* 2 sequences .* 4, got {rows}$"):
            plan.batch(rows, kind="decode")
    with pytest.raises(RuntimeError, match="the batch must be a verify, got a decode"):
        plan.batch(3, kind="verify")
    # a sequence of two tokens, and one whose slot holds another's state
    for lengths, known in (([1, 2], [True, True]), ([1, 1], [True, False])):
        plan.fill(lengths, [3, 0], has_initial_state=known)
        with pytest.raises(RuntimeError, match="the batch must be a decode, got a prefill"):
            plan.batch(3, kind="decode")
    plan.fill_verify([[1], [0]], [1, 1])
    with pytest.raises(RuntimeError, match="the batch must be a prefill, got a verify"):
        plan.batch()
    with pytest.raises(ValueError, match="kind must be one of 'prefill', 'decode', 'verify', got 'train'"):
        plan.batch(kind="train")


@pytest.mark.parametrize("phase", ["prefill", "mixed", "decode", "empty"])
def test_a_plan_gives_the_bits_of_a_batch_of_its_own_size(phase: str) -> None:
    lengths, slots, known = {
        "prefill": ([4, 0, 3], [3, 5, 0], [True, True, False]),
        "mixed": ([1, 5, 1], [3, 5, 0], [True, False, True]),
        "decode": ([1, 1, 1], [3, -1, 0], [True, True, True]),
        "empty": ([], [], []),
    }[phase]
    made, tokens = mixer(), 9
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(3))
    x[sum(lengths) :] = torch.nan
    plan = graphs.BatchPlan(6, 20)
    plan.fill([7, 8, 5], [1, 2, 4])  # an earlier batch
    plan.fill(lengths, slots, has_initial_state=known)
    slots = torch.tensor(slots, dtype=torch.int32)
    if phase == "decode":
        found, wanted = run(made, plan.batch(6, kind="decode"), x), run(made, graphs.BatchMetadata(slots), x)
    else:
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        alone = graphs.BatchMetadata(slots, offsets, torch.tensor(known, dtype=torch.bool))
        found, wanted = run(made, plan.batch(), x), run(made, alone, x)
    end = sum(lengths)
    assert_same_bits([found[0][:end], *found[1:]], [wanted[0][:end], *wanted[1:]], phase)
    assert torch.isfinite(found[0][:end]).all() and all(torch.isfinite(pool).all() for pool in found[1:])


def test_an_exception_inside_the_core_leaves_context_and_plan_usable() -> None:
    made, x = mixer(), torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3))
    plan = graphs.BatchPlan(3, 9)
    plan.fill([4, 5], [3, 0], has_initial_state=[True, False])
    wanted = run(made, plan.batch(), x)
    layer = states(made)
    broken = graphs.LayerState(
        H, layer.conv_weight, None, layer.A_log, layer.dt_bias, layer.conv_state, layer.recurrent_state[..., :32]
    )
    before = [layer.conv_state.clone(), layer.recurrent_state.clone()]
    with pytest.raises(ValueError), graphs.forward_context({0: broken}, plan.batch()):
        made(x)
    assert_same_bits([layer.conv_state, layer.recurrent_state], before, "refused inside the core")
    assert graphs.current_context() is None
    assert_same_bits(run(made, plan.batch(), x), wanted, "after an exception")
