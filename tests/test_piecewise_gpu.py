"""On a GPU: pieces captured for a list of token counts, models captured whole, padding of NaN, two streams."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from test_capture_gpu import no_synchronisation, poison
from token_cases import assert_same_bits

from gdn_kernels import graphs, launch, nn

pytestmark = pytest.mark.gpu

HIDDEN, H, HV, K, V = 256, 2, 4, 128, 128
SLOTS, SIZES = 12, (1, 8, 64, 150)
CUTS = ("operator", "segments")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Model(torch.nn.Module):
    """Two mixers with a norm and a residual around each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        factory = {"device": "cuda", "dtype": torch.bfloat16}
        self.norms = torch.nn.ModuleList(nn.RMSNormGated(HIDDEN, **factory) for _ in range(2))
        self.mixers = torch.nn.ModuleList(
            nn.GatedDeltaNet(HIDDEN, H, HV, K, V, layer_id=i, **factory) for i in range(2)
        )
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x

    def states(self, draft_tokens: int = 1) -> dict[int, graphs.LayerState]:
        generator = torch.Generator(device="cuda").manual_seed(1)
        layers = {i: mixer.allocate_states(SLOTS, draft_tokens=draft_tokens) for i, mixer in enumerate(self.mixers)}
        for pool in pools(layers):
            pool.copy_(torch.randn(pool.shape, generator=generator, device="cuda"))
        return layers


def pools(layers: dict[int, graphs.LayerState]) -> list[torch.Tensor]:
    return [pool for layer in layers.values() for pool in (layer.conv_state, layer.recurrent_state)]


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=generator, device="cuda").bfloat16()


def captured(model: Model, cut: str) -> graphs.PiecewiseRunner:
    runner = graphs.PiecewiseRunner(model, SIZES, cut=cut)
    runner.capture(model.states(), tokens(2))
    return runner


# lengths, slots, whether it is a decode; the states go on from batch to batch
BATCHES = (
    ([3, 1], [2, 0], False),
    ([1] * 7, [0, 5, 2, -1, 9, 11, 4], True),
    ([1, 60, 0, 65], [5, 3, 1, 7], False),
    ([1], [4], True),
    ([130, 20], [1, 6], False),
    ([1, 40, 1], [8, 3, 10], False),
    ([200, 3], [3, 0], False),
    ([1] * 8, [7, 6, 5, 4, 3, 2, 1, 0], True),
    ([150], [2], False),
)


@pytest.mark.parametrize("cut", CUTS)
def test_replays_have_the_bits_of_the_model_whatever_fills_the_padding(cut):
    model = Model()
    runner = captured(model, cut)
    assert runner.captured == dict.fromkeys(SIZES, 3)
    # what a replay reads of freed memory shows
    poison()
    ours, theirs, plan = model.states(), model.states(), graphs.BatchPlan(10, 300, device="cuda")
    for number, (lengths, slots, decode) in enumerate(BATCHES):
        count = sum(lengths)
        x = tokens(count, number)
        plan.fill(lengths, slots, has_initial_state=[decode or bool((number + i) % 2) for i in range(len(lengths))])
        metadata = plan.batch(len(lengths), kind="decode") if decode else plan.batch()
        past = count > SIZES[-1]
        size = count + number if past else next(size for size in SIZES if size >= count)
        # what the model gives at the same number of rows: a projection's kernel, and so its rounding, follows it
        with graphs.forward_context(theirs, metadata):
            wanted = model(torch.cat([x, x.new_zeros(size - count, HIDDEN)]))[:count]
        runner.input.fill_(torch.nan)
        with graphs.forward_context(ours, metadata):
            found = runner(torch.cat([x, x.new_full((number, HIDDEN), torch.nan)]), count)
        assert len(found) == count + number and not found[count:].any() and torch.isfinite(found).all()
        assert_same_bits([found[:count], *pools(ours)], [wanted, *pools(theirs)], f"batch {number}")
    assert (runner.replays, runner.eager) == (len(BATCHES) - 1, 1)
    assert runner.graphs == (cut == "operator")


@pytest.mark.parametrize("options", [{"inner": "inductor"}, {"cut": "partition"}], ids=lambda x: "-".join(x))
def test_pieces_compiled_by_inductor_replay_with_their_own_bits(options):
    """Against the same compiled pieces outside a graph: what replays is what was compiled."""
    model = Model()
    runner = graphs.PiecewiseRunner(model, SIZES, **options)
    runner.capture(model.states(), tokens(2))
    assert runner.captured == dict.fromkeys(SIZES, 3)
    poison()
    ours, theirs, plan = model.states(), model.states(), graphs.BatchPlan(4, 150, device="cuda")
    for seed, lengths in enumerate(([30, 20], [64, 0, 1], [150], [1])):
        count = sum(lengths)
        size = next(size for size in SIZES if size >= count)
        plan.fill(lengths, range(seed, seed + len(lengths)))
        x = tokens(count, seed)
        runner.input.fill_(torch.nan)
        with graphs.forward_context(ours, plan.batch()):
            found = runner(x)
        with graphs.forward_context(theirs, plan.batch()):
            wanted = runner.call(torch.cat([x, x.new_zeros(size - count, HIDDEN)]))[:count]
        assert_same_bits([found, *pools(ours)], [wanted, *pools(theirs)], f"call {seed}")
    assert runner.graphs == 1


@pytest.mark.parametrize("cut", CUTS)
def test_capture_writes_no_state(cut):
    model = Model()
    layers = model.states()
    before = [pool.clone() for pool in pools(layers)]
    graphs.PiecewiseRunner(model, SIZES, cut=cut).capture(layers, tokens(1))
    assert_same_bits(pools(layers), before, "captured")


def graph_pools() -> dict[tuple[int, int], int]:
    """Bytes reserved in each pool of graphs; the common one also holds a workspace for each stream's products."""
    sizes: Counter[tuple[int, int]] = Counter()
    for segment in torch.cuda.memory_snapshot():
        sizes[segment["segment_pool_id"]] += segment["total_size"]
    del sizes[0, 0]
    return dict(sizes)


@pytest.mark.parametrize("cut", CUTS)
def test_sizes_share_one_pool_of_memory(cut):
    """Captured after a larger size, smaller ones take next to no memory of their own."""
    model, taken = Model(), []
    layers = model.states()
    for sizes in ((4096,), (512, 1024, 2048, 3072, 4096)):
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        before = graph_pools().keys()
        runner = graphs.PiecewiseRunner(model, sizes, cut=cut)
        runner.capture(layers, tokens(2))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append(sum(size for pool, size in graph_pools().items() if pool not in before))
        del runner
    print(f"bytes reserved by one size and by five: {taken}")
    assert 0 < taken[1] <= 1.5 * taken[0]


@pytest.mark.parametrize("cut", CUTS)
def test_a_call_and_a_fill_never_synchronise(cut):
    model = Model()
    runner, plan, layers = captured(model, cut), graphs.BatchPlan(4, 150, device="cuda"), model.states()
    x = tokens(100)
    plan.fill([60, 40], [0, 1])
    with graphs.forward_context(layers, plan.batch()):
        runner(x)
    with no_synchronisation():
        plan.fill([30, 70], [2, 1])
        with graphs.forward_context(layers, plan.batch()):
            runner(x)


def test_fills_that_follow_at_once_do_not_overwrite_what_is_on_its_way():
    plan = graphs.BatchPlan(64, 4096, device="cuda")
    torch.cuda._sleep(200_000_000)
    found = []
    for step in range(50):
        plan.fill([step + 1] * 64, range(step, step + 64))
        found.append([plan.cu_seqlens.clone(), plan.state_indices.clone()])
    torch.cuda.synchronize()
    for step, (offsets, slots) in enumerate(found):
        assert offsets.tolist() == [i * (step + 1) for i in range(65)]
        assert slots.tolist() == list(range(step, step + 64))


def test_a_plan_is_not_filled_inside_a_capture():
    plan = graphs.BatchPlan(4, 16, device="cuda")
    x, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        with pytest.raises(RuntimeError, match="must run outside capture"):
            plan.fill([1], [0])
    graph.replay()
    assert not plan.lengths.any() and x.item() == 1


DRAFTS = 3


def whole(model: Model, layers: dict[int, graphs.LayerState], call=None) -> graphs.WholeRunner:
    plan = graphs.BatchPlan(10, 300, draft_tokens=DRAFTS, device="cuda")
    runner = graphs.WholeRunner(model if call is None else call, plan, SIZES, decode_rows=(1, 8), verify_rows=(2, 4))
    runner.capture(layers, tokens(2))
    return runner


def alone(plan: graphs.BatchPlan, lengths, slots, known) -> graphs.BatchMetadata:
    """The batch in tensors of its own size."""
    integers = [torch.tensor(values, dtype=torch.int32, device="cuda") for values in (slots, [0, *lengths])]
    if plan.kind == "decode":
        return graphs.BatchMetadata(integers[0])
    return graphs.BatchMetadata(
        integers[0], integers[1].cumsum(0, dtype=torch.int32), torch.tensor(known, device="cuda")
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
def test_a_model_captured_whole_serves_every_batch_of_a_plan(compiled):
    """Prefill, mixed and decode; against the same callable outside a graph, on metadata of its own size."""
    model = Model()
    call = torch.compile(model, fullgraph=True, dynamic=True) if compiled else model
    ours, theirs = model.states(DRAFTS), model.states(DRAFTS)
    runner = whole(model, ours, call)
    assert_same_bits(pools(ours), pools(theirs), "captured")
    poison()
    for number, (lengths, slots, decode) in enumerate(BATCHES):
        count = sum(lengths)
        known = [decode or bool((number + i) % 2) for i in range(len(lengths))]
        runner.plan.fill(lengths, slots, has_initial_state=known)
        sizes = (1, 8) if decode else SIZES
        size = next((size for size in sizes if size >= count), count + number)
        x = tokens(count, number)
        with graphs.forward_context(theirs, alone(runner.plan, lengths, slots, known)):
            wanted = call(torch.cat([x, x.new_zeros(size - count, HIDDEN)]))[:count]
        runner.input.fill_(torch.nan)
        found = runner(torch.cat([x, x.new_full((number, HIDDEN), torch.nan)]))
        assert len(found) == count + number and not found[count:].any() and torch.isfinite(found).all()
        assert_same_bits([found[:count], *pools(ours)], [wanted, *pools(theirs)], f"batch {number}")
    assert (runner.replays, runner.eager) == (len(BATCHES) - 1, 1)


def test_accepted_tokens_are_those_of_a_prefill_whatever_was_rejected():
    """Verification captured whole and at the split point: the bits of eager, NaN in rejected tokens."""
    model, accepted = Model(), [[1, 3], [3, 1], [2, 2], [1, 1], [3, 3], [2, 3]]
    lengths, slots = [70, 5], [[2, 4, 6], [3, 5, 7]]
    text = [tokens(lengths[n] + sum(step[n] for step in accepted), n) for n in range(2)]
    layers = {name: model.states(DRAFTS) for name in ("prefill", "eager", "whole", "split")}
    plan = graphs.BatchPlan(4, 300, draft_tokens=DRAFTS, device="cuda")
    pieces = graphs.PiecewiseRunner(model, (2 * DRAFTS,), cut="segments")
    pieces.capture(model.states(DRAFTS), tokens(2))
    runner = whole(model, layers["whole"])

    def prefill(name, rows):
        plan.fill([*map(len, rows)], [0, 1] if name == "prefill" else [2, 3], has_initial_state=[False, False])
        with graphs.forward_context(layers[name], plan.batch()):
            return model(torch.cat(rows)).split([*map(len, rows)])

    wanted = prefill("prefill", text)
    for name in ("eager", "whole", "split"):
        prefill(name, [x[:length] for x, length in zip(text, lengths, strict=True)])
    positions, last, found = list(lengths), [1, 1], [[], []]
    for number, step in enumerate(accepted):
        x = torch.full((2, DRAFTS, HIDDEN), torch.nan, device="cuda", dtype=torch.bfloat16)
        for n, count in enumerate(step):
            x[n, :count] = text[n][positions[n] : positions[n] + count]
        x = x.flatten(0, 1)
        plan.fill_verify(slots, last)
        runner.plan.fill_verify(slots, last)
        with graphs.forward_context(layers["eager"], plan.batch(2, kind="verify")):
            eager = model(x).unflatten(0, (2, DRAFTS))
        with graphs.forward_context(layers["split"], plan.batch(2, kind="verify")):
            split = pieces(x).unflatten(0, (2, DRAFTS))
        captured = runner(x).unflatten(0, (2, DRAFTS))
        for n, count in enumerate(step):
            assert_same_bits([captured[n, :count], split[n, :count]], [eager[n, :count]] * 2, f"step {number} of {n}")
            found[n].append(eager[n, :count])
            positions[n] += count
        last = step
    for n, length in enumerate(lengths):
        actual, expected = torch.cat(found[n]).double(), wanted[n][length:].double()
        error = ((actual - expected).norm() / expected.norm()).item()
        print(f"sequence {n}: {error:.1e} from a prefill")
        assert error <= 2e-2  # bf16 projections of other row counts, and the chunked form


def test_after_warm_up_captures_and_batches_build_no_binary():
    model = Model()
    launch.warmup(launch.ModelShapes(H, HV, K, V, draft_tokens=DRAFTS), "cuda")
    model.norms[0](tokens(2))  # the model's own width is none of the shapes
    layers, plan = model.states(DRAFTS), graphs.BatchPlan(10, 300, draft_tokens=DRAFTS, device="cuda")
    built = launch.binaries()
    runner, pieces = whole(model, layers), captured(model, "segments")
    for lengths, slots, decode in BATCHES:
        for each in (runner.plan, plan):
            each.fill(lengths, slots)
        x = tokens(sum(lengths))
        runner(x)
        with graphs.forward_context(layers, plan.batch(len(lengths), kind="decode" if decode else "prefill")):
            pieces(x)
    runner.plan.fill_verify([[0, 1, 2], [3, 4, 5]], [1, 3])
    runner(tokens(2 * DRAFTS))
    assert launch.binaries() == built


@pytest.mark.parametrize("kind", graphs.KINDS)
def test_a_null_slot_full_of_nan_is_neither_read_nor_written(kind):
    model = Model()
    ours, theirs = model.states(DRAFTS), model.states(DRAFTS)
    for pool in pools(ours):
        pool[0] = torch.nan
    plan, null = (graphs.BatchPlan(4, 40, draft_tokens=DRAFTS, pad_slot_id=pad, device="cuda") for pad in (0, -1))
    runner = graphs.WholeRunner(model, plan, (4,), decode_rows=(2,), verify_rows=(2,))
    runner.capture(ours, tokens(2))
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


def test_a_replay_of_a_whole_model_never_synchronises():
    model = Model()
    runner, x = whole(model, model.states(DRAFTS)), tokens(100)
    runner.plan.fill([60, 40], [0, 1])
    runner(x)
    with no_synchronisation():
        runner.plan.fill([30, 70], [2, 1])
        runner(x)


def test_an_exception_while_capturing_leaves_stream_plan_and_context_usable():
    model = Model()
    layers, plan = model.states(DRAFTS), graphs.BatchPlan(10, 300, draft_tokens=DRAFTS, device="cuda")
    before = [pool.clone() for pool in pools(layers)]

    def breaks(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("inside")
        return y

    for runner in (graphs.WholeRunner(breaks, plan, SIZES), graphs.PiecewiseRunner(breaks, SIZES, cut="segments")):
        with pytest.raises(KeyError):
            runner.capture(layers, tokens(2))
        assert not runner.captured and not torch.cuda.is_current_stream_capturing()
        assert graphs.current_context() is None
    assert_same_bits(pools(layers), before, "nothing written")
    plan.fill([3], [0])
    with graphs.forward_context(layers, plan.batch()):
        assert torch.isfinite(model(tokens(3))).all()
    torch.cuda.synchronize()


@pytest.mark.parametrize("cut", [*CUTS, "whole"])
def test_two_runners_on_two_streams_in_two_threads(cut):
    model, both = Model(), threading.Barrier(2, timeout=60)
    layers = [model.states(DRAFTS) for _ in range(2)]
    before = [[pool.clone() for pool in pools(each)] for each in layers]
    runners = [whole(model, each) if cut == "whole" else captured(model, cut) for each in layers]
    torch.cuda.synchronize()

    def serve(which: int, wait) -> list[torch.Tensor]:
        runner = runners[which]
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for pool, saved in zip(pools(layers[which]), before[which], strict=True):
                pool.copy_(saved)
            plan, found = graphs.BatchPlan(3, 150, device="cuda"), []
            plan = runner.plan if cut == "whole" else plan
            for step in range(8):
                wait()
                plan.fill([20 + which, 100], [(which + step) % SLOTS, (which + step + 5) % SLOTS])
                x = tokens(120 + which, step)
                if cut == "whole":
                    found.append(runner(x))
                    continue
                with graphs.forward_context(layers[which], plan.batch()):
                    found.append(runner(x))
            torch.cuda.current_stream().synchronize()
        return [*found, *(pool.clone() for pool in pools(layers[which]))]

    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: serve(i, both.wait)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        assert_same_bits(found[which], serve(which, lambda: None), f"runner {which}")
