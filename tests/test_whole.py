"""A model run whole on a plan: prefill, mixed and decode batches, verification with accepted counts, and its faults."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from test_graphs import HIDDEN, SLOTS, Model, pools
from test_piecewise import Recorder, padded, stand_in, tokens
from token_cases import assert_same_bits

from gdn_kernels import graphs

SIZES, DECODE_ROWS, VERIFY_ROWS, DRAFTS = (4, 8, 24), (1, 2, 4), (1, 2), 3


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def states(model: Model, draft_tokens: int = 1, slots: int = SLOTS) -> dict[int, graphs.LayerState]:
    """As ``Model.states``, whose conv columns a wider pool holds first."""
    narrow = model.states()
    layers = {i: mixer.allocate_states(slots, draft_tokens=draft_tokens) for i, mixer in enumerate(model.mixers)}
    for pool, filled in zip(pools(layers), pools(narrow), strict=True):
        pool.fill_(7.0)
        pool[tuple(slice(size) for size in filled.shape)] = filled
    return layers


def whole(model: Model, plan: graphs.BatchPlan, layers: dict[int, graphs.LayerState]) -> graphs.WholeRunner:
    wide = layers[0].conv_state.shape[2] > layers[0].conv_windows.shape[2]
    runner = graphs.WholeRunner(model, plan, SIZES, decode_rows=DECODE_ROWS, verify_rows=VERIFY_ROWS if wide else ())
    runner.capture(layers, tokens(1))
    return runner


def plan_of(sequences: int = 6, tokens: int = 40) -> graphs.BatchPlan:
    return graphs.BatchPlan(sequences, tokens, draft_tokens=DRAFTS)


# lengths, slots, known states; the states go on from batch to batch
BATCHES = (
    ([3, 1], [2, 0], [False, False]),
    ([1, 1, 1], [0, 5, 2], None),
    ([1, 6, 0, 1], [5, 3, 1, 0], [True, False, True, True]),
    ([1], [4], None),
    ([20], [1], [True]),
    ([30, 3], [3, 0], [False, True]),
    ([1, 1], [3, -1], None),
    ([], [], None),
    ([1] * 5, [0, 1, 2, 3, 4], None),
)


@pytest.mark.parametrize("draft_tokens", [1, DRAFTS], ids=["conv-pool", "wider-conv-pool"])
def test_one_plan_serves_prefill_mixed_and_decode_batches_with_the_bits_of_the_model(draft_tokens: int) -> None:
    model, plan = Model(), plan_of()
    ours, theirs = states(model, draft_tokens), model.states()
    runner = whole(model, plan, ours)
    assert runner.captured == {
        **{("prefill", size): 1 for size in SIZES},
        **{("decode", size): 1 for size in DECODE_ROWS},
        **{("verify", size): 1 for size in VERIFY_ROWS if draft_tokens > 1},
    }
    assert_same_bits([p for layer in ours.values() for p in (layer.conv_windows, layer.recurrent_state)],
                     pools(theirs), "captured")  # fmt: skip
    for number, (lengths, slots, known) in enumerate(BATCHES):
        count = sum(lengths)
        plan.fill(lengths, slots, has_initial_state=known)
        x = tokens(count, number)
        decode = plan.kind == "decode"
        sizes = DECODE_ROWS if decode else SIZES
        size = next((size for size in sizes if size >= count), count + number)
        integers = torch.tensor(slots, dtype=torch.int32)
        alone = graphs.BatchMetadata(integers)
        if not decode:
            offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            alone = graphs.BatchMetadata(integers, offsets, None if known is None else torch.tensor(known))
        with graphs.forward_context(theirs, alone):
            wanted = model(torch.cat([x, x.new_zeros(size - count, HIDDEN)]))[:count]
        runner.input.fill_(torch.nan)
        found = runner(padded(x, count + number))
        assert not found[count:].any() and torch.isfinite(found).all()
        kept = [pool for layer in ours.values() for pool in (layer.conv_windows, layer.recurrent_state)]
        assert_same_bits([found[:count], *kept], [wanted, *pools(theirs)], f"batch {number}")
    assert (runner.replays, runner.eager) == (len(BATCHES) - 2, 2)


def test_prefill_graphs_hold_so_many_sequences_and_more_run_eagerly() -> None:
    model, plan = Model(), plan_of()
    ours, theirs = model.states(), model.states()
    runner = graphs.WholeRunner(model, plan, (8,), prefill_rows=2)
    runner.capture(ours, tokens(1))
    for lengths, counts in (([3, 2], (1, 0)), ([2, 2, 2], (1, 1)), ([4, 1], (2, 1))):
        plan.fill(lengths, range(len(lengths)))
        x = tokens(sum(lengths))
        size = 8 if len(lengths) == 2 else len(x)
        with graphs.forward_context(theirs, plan.batch(len(lengths))):
            wanted = model(torch.cat([x, x.new_zeros(size - len(x), HIDDEN)]))[: len(x)]
        assert_same_bits([runner(x), *pools(ours)], [wanted, *pools(theirs)], str(lengths))
        assert (runner.replays, runner.eager) == counts


@pytest.mark.parametrize("kind", graphs.KINDS)
def test_a_null_slot_full_of_nan_is_neither_read_nor_written(kind: str) -> None:
    """Slot 0 as the null slot of an engine: unused entries, and a dummy sequence in the batch, stand in it."""
    model = Model()
    ours, theirs = states(model, DRAFTS, 12), states(model, DRAFTS, 12)
    for pool in pools(ours):
        pool[0] = torch.nan
    plan = graphs.BatchPlan(4, 40, draft_tokens=DRAFTS, pad_slot_id=0)
    runner, null = whole(model, plan, ours), graphs.BatchPlan(4, 40, draft_tokens=DRAFTS)
    for each, pad in ((plan, 0), (null, -1)):
        if kind == "verify":
            each.fill_verify([[2, 4, 6], [pad] * DRAFTS], [1, 1])
        else:
            each.fill([1, 1] if kind == "decode" else [3, 0], [2, pad])
    x = tokens(plan.tokens)
    size = {"prefill": 4, "decode": 2, "verify": 2 * DRAFTS}[kind]
    with graphs.forward_context(theirs, null.batch(2, kind=kind)):
        wanted = model(torch.cat([x, x.new_zeros(size - len(x), HIDDEN)]))[: len(x)]
    found = runner(x)
    assert all(torch.isnan(pool[0]).all() for pool in pools(ours))
    kept = ([pool[1:] for pool in pools(layers)] for layers in (ours, theirs))
    assert_same_bits([found, *next(kept)], [wanted, *next(kept)], kind)


def test_a_captured_model_replays_over_its_memory_and_the_plan_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, recorder = Model(), plan_of(), Recorder(cores=True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", stand_in(recorder))
    ours, theirs = states(model), model.states()
    runner = graphs.WholeRunner(model, plan, SIZES, decode_rows=DECODE_ROWS)
    runner._pool = "pool"
    with recorder:
        runner.capture(ours, tokens(1))
    assert recorder.begun == len(SIZES) + len(DECODE_ROWS)
    runner.call = None  # from here on nothing of the model's Python runs
    for number, (lengths, slots, known) in enumerate(BATCHES[:5]):
        count = sum(lengths)
        plan.fill(lengths, slots, has_initial_state=known)
        sizes = DECODE_ROWS if plan.kind == "decode" else SIZES
        x, size = tokens(count, number), next(size for size in sizes if size >= count)
        with graphs.forward_context(theirs, plan.batch(len(lengths), kind=plan.kind)):
            wanted = model(torch.cat([x, x.new_zeros(size - count, HIDDEN)]))[:count]
        runner.input.fill_(torch.nan)
        assert_same_bits([runner(x), *pools(ours)], [wanted, *pools(theirs)], f"batch {number}")


def verified(serve, text: list[torch.Tensor], accepted: list[list[int]], wrong: float) -> list[torch.Tensor]:
    """The outputs of the accepted tokens of each sequence: ``serve(x, counts)`` verifies DRAFTS tokens of each,
    of which ``accepted[step][n]`` are the text's and the others are not."""
    positions, last, outputs = [0] * len(text), [1] * len(text), [[] for _ in text]
    for step in accepted:
        x = torch.full((len(text), DRAFTS, HIDDEN), wrong)
        for n, count in enumerate(step):
            x[n, :count] = text[n][positions[n] : positions[n] + count]
        y = serve(x.flatten(0, 1), last)
        for n, count in enumerate(step):
            outputs[n].append(y[n * DRAFTS : n * DRAFTS + count])
            positions[n] += count
        last = step
    return [torch.cat(rows) for rows in outputs]


ACCEPTED = [[1, 3], [3, 1], [2, 2], [1, 1], [3, 3]]


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "runner"])
def test_accepted_tokens_have_the_outputs_of_a_prefill_whatever_was_rejected(captured: bool) -> None:
    model, plan = Model(), plan_of()
    lengths = [5, 2]
    text = [tokens(lengths[n] + sum(step[n] for step in ACCEPTED), n) for n in range(2)]
    theirs = states(model, DRAFTS, 12)
    plan.fill([len(x) for x in text], [0, 1], has_initial_state=[False, False])
    with graphs.forward_context(theirs, plan.batch()):
        wanted = model(torch.cat(text)).split([len(x) for x in text])
    slots = [[2, 4, 6], [3, 5, 7]]

    def run(wrong: float) -> list[torch.Tensor]:
        plan.fill([], [])
        layers = states(model, DRAFTS, 12)
        runner = whole(model, plan, layers) if captured else None

        def verify(x: torch.Tensor, last: list[int]) -> torch.Tensor:
            plan.fill_verify(slots, last)
            if runner is not None:
                return runner(x)
            with graphs.forward_context(layers, plan.batch(3, kind="verify")):
                # the third row of the plan holds no sequence
                return model(padded(x, 3 * DRAFTS))[: len(x)]

        plan.fill(lengths, [2, 3], has_initial_state=[False, False])
        with graphs.forward_context(layers, plan.batch()):
            model(torch.cat([x[:length] for x, length in zip(text, lengths, strict=True)]))
        rest = [x[length:] for x, length in zip(text, lengths, strict=True)]
        return verified(verify, rest, ACCEPTED, wrong)

    found, again = run(0.5), run(torch.nan)
    for n, length in enumerate(lengths):
        torch.testing.assert_close(found[n], wanted[n][length:])
    assert_same_bits(found, again, "rejected tokens of other values")


def test_a_verification_that_does_not_fit_is_refused_and_writes_nothing() -> None:
    model, plan = Model(), plan_of()
    plan.fill_verify([[0, 1, 2]], [1])
    metadata = plan.batch(1, kind="verify")
    layers, x = states(model, DRAFTS), tokens(6)
    narrow = states(model)
    bad = {
        r"draft_indices must have at most one entry a token, 2, got 3": (layers, metadata, x[:2]),
        r"must come together and without cu_seqlens": (
            layers,
            dataclasses.replace(metadata, num_accepted_tokens=None),
            x,
        ),
        r"draft_indices must have shape \(1, 3\), got \(2, 3\)": (
            layers,
            dataclasses.replace(metadata, draft_indices=plan.draft_indices[:2]),
            x,
        ),
        r"conv_state must hold at least W - 2 \+ t = 5 columns": (narrow, metadata, x),
    }
    for message, (some, wrong, rows) in bad.items():
        before = [pool.clone() for pool in pools(some)]
        with pytest.raises(ValueError, match=message), graphs.forward_context(some, wrong):
            model(rows)
        assert_same_bits(pools(some), before, message)


# ---------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------


def test_what_a_whole_runner_cannot_serve_is_refused_and_nothing_written() -> None:
    model, plan = Model(), plan_of()
    layers = states(model)
    before = [pool.clone() for pool in pools(layers)]
    with pytest.raises(ValueError, match="must hold a count, got none"):
        graphs.WholeRunner(model, plan)
    runner = graphs.WholeRunner(model, plan, SIZES)
    with pytest.raises(RuntimeError, match="^WholeRunner must be captured before it is called"):
        runner(tokens(4))
    plan.fill([3], [2])
    with pytest.raises(RuntimeError, match="must run on an empty plan, got a batch of 1 sequences"):
        runner.capture(layers, tokens(1))
    plan.fill([], [])
    with pytest.raises(RuntimeError, match="must run outside graphs.forward_context, got one with its slots"):
        with graphs.forward_context(layers, plan.batch()):
            runner.capture(layers, tokens(1))
    with pytest.raises(RuntimeError, match=r"^layer_id must be a layer of the forward context, \[0\], got 1$"):
        runner.capture({0: layers[0]}, tokens(1))
    assert not runner.captured and graphs.current_context() is None
    runner.capture(layers, tokens(1))
    with pytest.raises(RuntimeError, match="must run once"):
        runner.capture(layers, tokens(1))
    plan.fill([3], [2])
    with pytest.raises(ValueError, match="x must hold the plan's 3 tokens, got 2 rows"):
        runner(tokens(2))
    with pytest.raises(RuntimeError, match="must not be nested"), graphs.forward_context(layers, plan.batch()):
        runner(tokens(3))
    with pytest.raises(RuntimeError, match="the batch must fit the plan of 6 sequences and 40 tokens, got 1 and 41"):
        plan.fill([41], [0])
    assert_same_bits(pools(layers), before, "refused")
    assert (runner.replays, plan.count) == (0, 1)


def test_an_exception_inside_the_core_leaves_a_whole_runner_usable() -> None:
    model, plan = Model(), plan_of()
    layers = states(model)
    runner, x = whole(model, plan, layers), tokens(6)
    plan.fill([4, 2], [3, 0], has_initial_state=[False, False])
    wanted = runner(x)
    runner.layers = {i: dataclasses.replace(layer, num_k_heads=2) for i, layer in layers.items()}
    before = [pool.clone() for pool in pools(layers)]
    with pytest.raises(ValueError):
        runner(x)
    assert_same_bits(pools(layers), before, "refused inside the core")
    runner.layers = layers
    assert graphs.current_context() is None
    assert_same_bits([runner(x)], [wanted], "after an exception")


def test_two_whole_runners_in_two_threads_serve_their_own_plans() -> None:
    model, both = Model(), threading.Barrier(2, timeout=60)

    def serve(which: int, wait) -> list[torch.Tensor]:
        with torch.no_grad():
            plan, layers = plan_of(), states(model)
            runner, found = whole(model, plan, layers), []
            for step in range(3):
                wait()
                plan.fill([2 + which, 3], [(which + step) % SLOTS, 5 - which], has_initial_state=[False, True])
                found.append(runner(tokens(5 + which, step)))
            return [*found, *pools(layers)]

    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: serve(i, both.wait)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        assert_same_bits(found[which], serve(which, lambda: None), f"runner {which}")
