"""Pieces captured for a list of token counts: padding, what falls through, faults, and the bits of the model."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from test_graphs import HIDDEN, SLOTS, Model, in_thread, pools
from token_cases import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdn_kernels import graphs

SIZES = (1, 4, 8, 24)
CUTS = ("operator", "segments")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def captured(model: Model, cut: str, sizes: tuple[int, ...] = SIZES) -> graphs.PiecewiseRunner:
    runner = graphs.PiecewiseRunner(model, sizes, cut=cut)
    runner.capture(model.states(), tokens(2))
    return runner


def padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([x, x.new_full((rows - len(x), *x.shape[1:]), torch.nan)])


# lengths, slots, whether it is a decode; the states go on from batch to batch
BATCHES = (
    ([3, 1], [2, 0], False),
    ([1, 1, 1], [0, 5, 2], True),
    ([1, 6, 0], [5, 3, 1], False),
    ([1], [4], True),
    ([20], [1], False),
    ([8], [4], False),
    ([30, 3], [3, 0], False),
    ([1, 1], [3, -1], True),
)


@pytest.mark.parametrize("cut", CUTS)
def test_replays_have_the_bits_of_the_model_whatever_fills_the_padding(cut: str) -> None:
    model = Model()
    runner = captured(model, cut)
    assert runner.captured == dict.fromkeys(SIZES, 3)
    call = runner.call
    ours, theirs = model.states(), model.states()
    plan = graphs.BatchPlan(4, 40)
    for number, (lengths, slots, decode) in enumerate(BATCHES):
        count = sum(lengths)
        x = tokens(count, number)
        known = [decode or bool((number + i) % 2) for i in range(len(lengths))]
        plan.fill(lengths, slots, has_initial_state=known)
        metadata = plan.batch(len(lengths), kind="decode") if decode else plan.batch()
        size = next((size for size in SIZES if size >= count), count)
        # what the model gives at the same number of rows, whose projections may round by it
        with graphs.forward_context(theirs, metadata):
            wanted = model(torch.cat([x, x.new_zeros(size - count, HIDDEN)]))[:count]
        runner.input.fill_(torch.nan)
        # a replay of a compiled model runs neither the model nor Dynamo
        runner.call = None if cut == "operator" and count <= SIZES[-1] else call
        with graphs.forward_context(ours, metadata):
            found = runner(padded(x, count + number), count)
        assert not found[count:].any() and len(found) == count + number
        assert torch.isfinite(found).all()
        if cut == "operator" and count > SIZES[-1]:
            torch.testing.assert_close(found[:count], wanted)
            for ours_pool, theirs_pool in zip(pools(ours), pools(theirs), strict=True):
                torch.testing.assert_close(ours_pool, theirs_pool)
                theirs_pool.copy_(ours_pool)
        else:
            assert_same_bits([found[:count], *pools(ours)], [wanted, *pools(theirs)], f"batch {number}")
    assert (runner.replays, runner.eager) == (len(BATCHES) - 1, 1)
    assert runner.graphs == (cut == "operator")


@pytest.mark.parametrize("cut", CUTS)
def test_capture_writes_no_state(cut: str) -> None:
    model = Model()
    layers = model.states()
    before = [pool.clone() for pool in pools(layers)]
    graphs.PiecewiseRunner(model, SIZES, cut=cut).capture(layers, tokens(1))
    assert_same_bits(pools(layers), before, "captured")


@pytest.mark.parametrize("cut", CUTS)
def test_a_decode_of_more_rows_than_tokens_takes_a_size_that_holds_its_rows(cut: str) -> None:
    model = Model()
    runner, plan = captured(model, cut), graphs.BatchPlan(6, 6)
    plan.fill([1, 1], [3, 0])
    layers, alone = model.states(), model.states()
    with graphs.forward_context(layers, plan.batch(6, kind="decode")):
        found = runner(tokens(2))
    with graphs.forward_context(alone, plan.batch(2, kind="decode")):
        wanted = model(tokens(2))
    torch.testing.assert_close([found, *pools(layers)], [wanted, *pools(alone)])


def test_the_backend_serves_a_model_that_is_compiled_elsewhere() -> None:
    model = Model()
    runner = graphs.PiecewiseRunner(model, (8, 16))
    # dynamic: numbers of the model come to the pieces as new tensors of no dimensions
    runner.call = torch.compile(model, backend=graphs.piecewise_backend(runner), fullgraph=True, dynamic=True)
    runner.capture(model.states(), tokens(2))
    layers, alone = model.states(), model.states()
    for seed in range(2):
        with graphs.forward_context(layers, prefill()):
            found = runner(tokens(6, seed))
        with graphs.forward_context(alone, prefill()):
            wanted = model(torch.cat([tokens(6, seed), torch.zeros(2, HIDDEN)]))[:6]
        assert_same_bits([found, *pools(layers)], [wanted, *pools(alone)], f"call {seed}")
    assert runner.captured == {8: 3, 16: 3} and runner.graphs == 1


def test_pieces_compiled_by_inductor_are_the_model_up_to_rounding() -> None:
    model = Model()
    runner = graphs.PiecewiseRunner(model, (1, 8, 16), inner="inductor")
    runner.capture(model.states(), tokens(2))
    layers, alone = model.states(), model.states()
    for seed in range(3):
        with graphs.forward_context(layers, prefill()):
            found = runner(tokens(6, seed))
        with graphs.forward_context(alone, prefill()):
            wanted = model(tokens(6, seed))
        torch.testing.assert_close([found, *pools(layers)], [wanted, *pools(alone)])
    assert runner.captured == dict.fromkeys((1, 8, 16), 3) and runner.graphs == 1


def test_partitions_of_inductors_replay_in_order_and_are_the_model_up_to_rounding(monkeypatch) -> None:
    from torch._inductor import config, scheduler

    # Inductor cuts graphs for GPUs only: its nodes are made to look like a GPU's
    monkeypatch.setattr(scheduler.BaseSchedulerNode, "is_gpu", lambda self: True)
    model = Model()
    with config.patch(force_disable_caches=True):
        runner = captured(model, "partition", (1, 8, 16))
    assert runner.captured == dict.fromkeys((1, 8, 16), 3) and runner.graphs == 1
    assert torch._inductor.utils._unstable_customized_partition_wrapper.wrapper is None
    compiled, runner.call = runner.call, None  # a replay runs nothing of the model
    ours, theirs, plan = model.states(), model.states(), graphs.BatchPlan(4, 40)
    for number, (lengths, slots, decode) in enumerate(BATCHES[:4]):
        plan.fill(lengths, slots)
        metadata, x = plan.batch(len(lengths), kind="decode") if decode else plan.batch(), tokens(sum(lengths), number)
        with graphs.forward_context(theirs, metadata):
            wanted = model(x)
        runner.input.fill_(torch.nan)
        with graphs.forward_context(ours, metadata):
            found = runner(x)
        torch.testing.assert_close([found, *pools(ours)], [wanted, *pools(theirs)])
    plan.fill([20], [1])
    runner.call = compiled
    with graphs.forward_context(theirs, plan.batch()):
        wanted = model(tokens(20))
    with graphs.forward_context(ours, plan.batch()):
        torch.testing.assert_close(runner(tokens(20)), wanted)
    assert (runner.replays, runner.eager, runner.graphs) == (4, 1, 1)


def test_without_a_gpu_inductor_makes_no_partitions_and_the_runner_says_so() -> None:
    runner = graphs.PiecewiseRunner(Model(), (8,), cut="partition")
    with pytest.raises(RuntimeError, match="^cut 'partition' must have a GPU"):
        runner.capture(Model().states(), tokens(2))
    assert not runner.captured


def test_no_tokens_are_no_rows() -> None:
    model = Model()
    runner, plan = captured(model, "segments"), graphs.BatchPlan(2, 4)
    with graphs.forward_context(model.states(), plan.batch()):
        assert runner(tokens(0)).shape == (0, HIDDEN)
        assert not runner(padded(tokens(0), 3), 0).any()


def test_a_piece_reads_its_arguments_where_they_were_and_writes_its_results_there() -> None:
    held = graphs._Held(None, graphs.BatchMetadata(torch.empty(0, dtype=torch.int32)))
    result = held.piece(lambda args: args.pop() + 1, [x := torch.zeros(2)])
    x.fill_(4)
    held.replay()
    assert torch.equal(result, torch.full((2,), 5.0)) and held.pieces == 1


def test_a_split_operator_with_results_is_refused() -> None:
    held = graphs._Held(None, graphs.BatchMetadata(torch.empty(0, dtype=torch.int32)))
    with pytest.raises(RuntimeError, match="a split operator must write a caller's tensor and return nothing"):
        held.between(torch.sin, torch.zeros(2))


class Recorder(TorchDispatchMode):
    """Stands for the capture of CUDA graphs: the operators run between begin and end, over the memory they had."""

    def __init__(self, cores: bool = False) -> None:
        super().__init__()
        self.graph, self.begun, self.cores = None, 0, cores

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        graph, result = self.graph, func(*args, **(kwargs or {}))
        if graph is not None and (self.cores or "linear_attention_with_output" not in str(func)):
            graph.operators.append((func, args, kwargs or {}, result))
        return result


def stand_in(recorder: Recorder) -> type:
    class Graph:
        def __init__(self) -> None:
            self.operators = []

        def capture_begin(self, pool, capture_error_mode) -> None:
            assert recorder.graph is None and pool == "pool" and capture_error_mode == "thread_local"
            recorder.graph, recorder.begun = self, recorder.begun + 1

        def capture_end(self) -> None:
            assert recorder.graph is self
            recorder.graph = None

        def replay(self) -> None:
            assert recorder.graph is None
            for func, args, kwargs, result in self.operators:
                found = func(*args, **kwargs)
                for kept, new in zip(tree_leaves(result), tree_leaves(found), strict=True):
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)

    return Graph


def test_segments_begin_and_end_around_each_core_and_replay_over_their_memory(monkeypatch) -> None:
    model, recorder = Model(), Recorder()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", stand_in(recorder))
    runner = graphs.PiecewiseRunner(model, SIZES, cut="segments")
    runner._pool = "pool"
    with recorder:
        runner.capture(model.states(), tokens(2))
    assert recorder.begun == 3 * len(SIZES) and runner.captured == dict.fromkeys(SIZES, 3)
    # from here on nothing of the model's Python runs
    runner.call = None
    ours, theirs, plan = model.states(), model.states(), graphs.BatchPlan(4, 24)
    for number, (lengths, slots, decode) in enumerate(BATCHES):
        count = sum(lengths)
        if count > SIZES[-1]:
            continue
        x, size = tokens(count, number), next(size for size in SIZES if size >= count)
        plan.fill(lengths, slots)
        metadata = plan.batch(len(lengths), kind="decode") if decode else plan.batch()
        with graphs.forward_context(theirs, metadata):
            wanted = model(torch.cat([x, x.new_zeros(size - count, HIDDEN)]))[:count]
        runner.input.fill_(torch.nan)
        with graphs.forward_context(ours, metadata):
            found = runner(x)
        assert_same_bits([found, *pools(ours)], [wanted, *pools(theirs)], f"batch {number}")


def test_an_exception_in_a_segment_ends_its_capture(monkeypatch) -> None:
    model, recorder = Model(), Recorder()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", stand_in(recorder))

    def breaks(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        if recorder.graph is not None:
            raise KeyError("inside")
        return y

    runner = graphs.PiecewiseRunner(breaks, SIZES, cut="segments")
    runner._pool = "pool"
    with recorder, pytest.raises(KeyError):
        runner.capture(model.states(), tokens(2))
    assert recorder.graph is None and not runner.captured and graphs.current_context() is None


# ---------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------


def prefill() -> graphs.BatchMetadata:
    plan = graphs.BatchPlan(2, 6)
    plan.fill([4, 2], [3, 0])
    return plan.batch()


@pytest.mark.parametrize("cut", CUTS)
def test_what_a_runner_cannot_serve_is_refused_and_nothing_written(cut: str) -> None:
    model, x = Model(), tokens(6)
    layers = model.states()
    before = [pool.clone() for pool in pools(layers)]
    fresh = graphs.PiecewiseRunner(model, SIZES, cut=cut)
    with pytest.raises(RuntimeError, match="must be captured before it is called"):
        fresh(x)
    with graphs.forward_context(layers, prefill()), pytest.raises(RuntimeError, match="must run outside"):
        fresh.capture(layers, x)
    assert not fresh.captured
    runner = captured(model, cut)
    with pytest.raises(RuntimeError, match="must run once"):
        runner.capture(layers, x)
    with pytest.raises(RuntimeError, match=r"of this thread, got none$"):
        runner(x)
    with graphs.forward_context(layers, prefill()):
        error = in_thread(lambda: runner(x))
        assert isinstance(error, RuntimeError) and "of this thread, got none" in str(error)
        for bad, match in ((x[:, 1:], r"\[T, 24\] of torch.float32 on cpu, got \[6, 23\]"), (x.half(), "float16")):
            with pytest.raises(ValueError, match=match):
                runner(bad)
        for count in (-1, 7):
            with pytest.raises(ValueError, match=f"tokens must lie between 0 and the 6 rows of x, got {count}"):
                runner(x, count)
    # the second layer is missing: the first must not have run
    with graphs.forward_context({0: layers[0]}, prefill()):
        with pytest.raises(RuntimeError, match=r"^layer_id must be a layer of the forward context, \[0\], got 1$"):
            runner(x)
    assert_same_bits(pools(layers), before, "refused")
    assert (runner.replays, runner.eager) == (0, 0)


def test_unknown_cuts_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^cut must be one of 'operator', 'partition', 'segments', got 'layers'$"):
        graphs.PiecewiseRunner(Model(), SIZES, cut="layers")
    for sizes, message in (((), "sizes must hold a token count"), ((0, 4), "sizes must be counts of at least 1")):
        with pytest.raises(ValueError, match=message):
            graphs.PiecewiseRunner(Model(), sizes)


@pytest.mark.parametrize("cut", CUTS)
def test_an_exception_inside_the_core_leaves_runner_and_plan_usable(cut: str) -> None:
    model, x = Model(), tokens(6)
    runner, metadata = captured(model, cut), prefill()

    def serve() -> list[torch.Tensor]:
        layers = model.states()
        with graphs.forward_context(layers, metadata):
            return [runner(x), *pools(layers)]

    wanted, layers = serve(), model.states()
    broken = {i: dataclasses.replace(layer, num_k_heads=2) for i, layer in layers.items()}
    before = [pool.clone() for pool in pools(layers)]
    with pytest.raises(ValueError), graphs.forward_context(broken, metadata):
        runner(x)
    assert_same_bits(pools(layers), before, "refused inside the core")
    assert graphs.current_context() is None
    assert_same_bits(serve(), wanted, "after an exception")


@pytest.mark.parametrize("cut", CUTS)
def test_an_exception_at_capture_leaves_nothing_captured(cut: str) -> None:
    model = Model()
    layers, runner = model.states(), graphs.PiecewiseRunner(model, SIZES, cut=cut)
    with pytest.raises(RuntimeError, match="layer_id must be a layer"):
        runner.capture({0: layers[0]}, tokens(2))
    assert not runner.captured and graphs.current_context() is None
    runner.capture(layers, tokens(2))
    assert runner.captured == dict.fromkeys(SIZES, 3)


def test_a_runner_serves_one_thread_at_a_time() -> None:
    model, x = Model(), tokens(6)
    runner, found = captured(model, "segments"), []
    layers = model.states()

    def inside(*args) -> None:
        def call() -> torch.Tensor:
            with graphs.forward_context(layers, prefill()):
                return runner(x)

        found.append(in_thread(call))

    with graphs.forward_context(layers, prefill()), graphs._watching(inside):
        runner(x)
    assert all("must serve one thread at a time" in str(error) for error in found) and len(found) == 2


@pytest.mark.parametrize("cut", CUTS)
def test_two_runners_in_two_threads_serve_their_own_batches(cut: str) -> None:
    model, both = Model(), threading.Barrier(2, timeout=60)
    runners = [captured(model, cut) for _ in range(2)]

    def serve(which: int, wait) -> list[torch.Tensor]:
        layers, plan, found = model.states(), graphs.BatchPlan(3, 8), []
        for step in range(3):
            wait()
            plan.fill([2 + which, 3], [(which + step) % SLOTS, 5 - which])
            with torch.no_grad(), graphs.forward_context(layers, plan.batch()):
                found.append(runners[which](tokens(5 + which, step)))
        return [*found, *pools(layers)]

    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: serve(i, both.wait)}), name=f"runner {i}")
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        assert_same_bits(found[which], serve(which, lambda: None), f"runner {which}")
