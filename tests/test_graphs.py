"""The forward context and the split point: errors, threads, and graphs cut at the operator."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from token_cases import assert_same_bits
from torch.fx.passes.split_module import split_module

from gdn_kernels import graphs, nn

HIDDEN, H, HV, K, V = 24, 1, 2, 64, 64
SLOTS, TOKENS = 6, 9
SPLIT = "gdn.linear_attention_with_output"


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
        self.norms = torch.nn.ModuleList(nn.RMSNormGated(HIDDEN) for _ in range(2))
        self.mixers = torch.nn.ModuleList(nn.GatedDeltaNet(HIDDEN, H, HV, K, V, layer_id=i) for i in range(2))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x

    def states(self) -> dict[int, graphs.LayerState]:
        generator = torch.Generator().manual_seed(1)
        layers = {i: mixer.allocate_states(SLOTS) for i, mixer in enumerate(self.mixers)}
        for pool in pools(layers):
            pool.copy_(torch.randn(pool.shape, generator=generator))
        return layers


def pools(layers: dict[int, graphs.LayerState]) -> list[torch.Tensor]:
    return [pool for layer in layers.values() for pool in (layer.conv_state, layer.recurrent_state)]


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BATCHES = {
    "prefill": graphs.BatchMetadata(integers(3, 0), integers(0, 4, 7), torch.tensor([True, False])),
    "other-lengths": graphs.BatchMetadata(integers(1, 2), integers(0, 0, 9), torch.tensor([False, True])),
    "decode": graphs.BatchMetadata(integers(5, -1, 2)),
}


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def run(model, layers, metadata, x):
    with graphs.forward_context(layers, metadata):
        return model(x)


# ---------------------------------------------------------------------------------------------------------------
# The context
# ---------------------------------------------------------------------------------------------------------------


def split_arguments() -> list:
    generator = torch.Generator().manual_seed(2)
    shapes = (TOKENS, 2 * H * K + HV * V), (TOKENS, HV), (TOKENS, HV), (TOKENS, HV, V)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def refused(tensors: list, layer_id: int, match: str) -> None:
    before = [x.clone() for x in tensors]
    with pytest.raises(RuntimeError, match=match):
        graphs.linear_attention_with_output(*tensors, layer_id)
    assert_same_bits(tensors, before, "refused")


def test_without_a_context_the_split_point_refuses_and_writes_nothing() -> None:
    refused(split_arguments(), 0, r"must run inside graphs\.forward_context of this thread, got none$")
    with graphs.forward_context(Model().states(), BATCHES["prefill"]):
        pass
    refused(split_arguments(), 0, r"must run inside graphs\.forward_context of this thread, got none$")


def test_an_unknown_layer_is_refused_and_nothing_written() -> None:
    layers = Model().states()
    before = [x.clone() for x in pools(layers)]
    with graphs.forward_context(layers, BATCHES["prefill"]):
        refused(split_arguments(), 2, r"^layer_id must be a layer of the forward context, \[0, 1\], got 2$")
    assert_same_bits(pools(layers), before, "refused")


def test_contexts_do_not_nest_and_the_outer_one_stays() -> None:
    layers = Model().states()
    with graphs.forward_context(layers, BATCHES["prefill"]) as outer:
        with pytest.raises(RuntimeError, match="forward_context must not be nested, got one that is already set"):
            with graphs.forward_context({}, BATCHES["decode"]):
                pass
        assert graphs.current_context() is outer
        assert outer.metadata is BATCHES["prefill"] and outer.layers is layers
        graphs.linear_attention_with_output(*split_arguments(), 0)
    assert graphs.current_context() is None


def test_an_exception_inside_leaves_the_context_usable() -> None:
    model = Model()
    with pytest.raises(KeyError), graphs.forward_context(model.states(), BATCHES["prefill"]):
        raise KeyError("inside")
    assert graphs.current_context() is None
    wanted = run(model, model.states(), BATCHES["prefill"], inputs())
    with pytest.raises(ValueError, match="output must have shape"):
        with graphs.forward_context(model.states(), BATCHES["prefill"]):
            *tensors, output = split_arguments()
            graphs.linear_attention_with_output(*tensors, output[1:], 0)
    assert_same_bits([run(model, model.states(), BATCHES["prefill"], inputs())], [wanted], "after an exception")


def test_a_context_can_be_entered_again() -> None:
    model = Model()
    first, second = (run(model, model.states(), BATCHES["decode"], inputs()) for _ in range(2))
    assert_same_bits([second], [first], "entered again")


def in_thread(function):
    """What ``function`` returned or raised in another thread."""
    found = []

    def call() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0]


def test_a_context_is_its_threads_own() -> None:
    tensors = split_arguments()
    before = [x.clone() for x in tensors]
    with graphs.forward_context(Model().states(), BATCHES["prefill"]):
        assert in_thread(graphs.current_context) is None
        error = in_thread(lambda: graphs.linear_attention_with_output(*tensors, 0))
    assert isinstance(error, RuntimeError) and "of this thread, got none" in str(error)
    assert_same_bits(tensors, before, "refused in another thread")


def test_two_threads_run_their_own_batches_at_once() -> None:
    model, both = Model(), threading.Barrier(2, timeout=30)
    names = ("prefill", "decode")

    def serve(name: str) -> list[torch.Tensor]:
        layers, found = model.states(), []
        with torch.no_grad(), graphs.forward_context(layers, BATCHES[name]):
            for seed in range(3):
                both.wait()
                found.append(model(inputs(seed)))
        return [*found, *pools(layers)]

    found = {}
    threads = [threading.Thread(target=lambda name=name: found.update({name: serve(name)})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        layers = model.states()
        wanted = [run(model, layers, BATCHES[name], inputs(seed)) for seed in range(3)]
        assert_same_bits(found[name], [*wanted, *pools(layers)], name)


@pytest.mark.parametrize("kind", [graphs.BatchMetadata, graphs.LayerState, graphs.ForwardContext])
def test_what_a_context_holds_is_frozen(kind: type) -> None:
    assert kind.__dataclass_params__.frozen
    with pytest.raises(dataclasses.FrozenInstanceError):
        BATCHES["decode"].pad_slot_id = 0


@pytest.mark.parametrize("phase", BATCHES)
def test_what_the_batch_leaves_of_the_output_is_zero(phase: str) -> None:
    *tensors, output = split_arguments()
    output.fill_(torch.nan)
    metadata = BATCHES[phase]
    with graphs.forward_context(Model().states(), metadata):
        graphs.linear_attention_with_output(*tensors, output, 0)
    end = 3 if metadata.cu_seqlens is None else int(metadata.cu_seqlens[-1])
    assert not output[end:].any() and torch.isfinite(output).all() and output[:end].any()


@pytest.mark.parametrize("phase", BATCHES)
def test_an_output_of_wider_rows_has_the_bits_of_a_contiguous_one(phase: str) -> None:
    found = []
    for columns in (HV, HV + 1):
        *tensors, output = split_arguments()
        output = torch.full((TOKENS, columns, V), torch.nan)[:, :HV]
        layers = Model().states()
        with graphs.forward_context(layers, BATCHES[phase]):
            graphs.linear_attention_with_output(*tensors, output, 0)
        found.append([output, *pools(layers)])
    assert_same_bits(*found, phase)


def test_a_batch_of_no_sequences_is_all_padding() -> None:
    for metadata in (graphs.BatchMetadata(integers()), graphs.BatchMetadata(integers(), integers(0))):
        *tensors, output = split_arguments()
        layers = Model().states()
        before = [x.clone() for x in pools(layers)]
        with graphs.forward_context(layers, metadata):
            graphs.linear_attention_with_output(*tensors, output, 0)
        assert not output.any()
        assert_same_bits(pools(layers), before, "no sequences")


# ---------------------------------------------------------------------------------------------------------------
# Cut at the operator
# ---------------------------------------------------------------------------------------------------------------


class Frozen:
    """A piece of a graph as a CUDA graph would run it: inputs are copied into buffers of its own, which it alone reads,
    and its results stay where they were on the first call."""

    def __init__(self, piece: torch.nn.Module) -> None:
        self.piece, self.inputs, self.results, self.replays = piece, None, None, 0

    def __call__(self, *args):
        if self.inputs is None:
            self.inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        for buffer, x in zip(self.inputs, args, strict=True):
            if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter):
                buffer.copy_(x)
        found = self.piece(*self.inputs)
        found = found if isinstance(found, tuple) else (found,)
        if self.results is None:
            self.results = [x.clone() for x in found]
        else:
            self.replays += 1
            for buffer, x in zip(self.results, found, strict=True):
                buffer.copy_(x)
        return self.results[0] if len(self.results) == 1 else tuple(self.results)


class PiecewiseBackend:
    """Cuts Dynamo's graph before and after each split point, as engines do, and freezes the pieces in between."""

    def __init__(self) -> None:
        self.frozen, self.cores = [], 0

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list) -> torch.fx.GraphModule:
        part, parts = 0, {}
        for node in module.graph.nodes:
            if node.op == "call_function" and str(node.target) == SPLIT:
                parts[node] = part + 1
                part += 2
            elif node.op not in ("placeholder", "output"):
                parts[node] = part
        cut = split_module(module, None, lambda node: parts[node], keep_original_order=True)
        for name, piece in list(cut.named_children()):
            if any(str(node.target) == SPLIT for node in piece.graph.nodes):
                self.cores += 1
                continue
            frozen = Frozen(piece)
            self.frozen.append(frozen)
            setattr(cut, name, _Module(frozen))
        return cut


class _Module(torch.nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args):
        return self.call(*args)


def test_pieces_replayed_over_frozen_buffers_have_eagers_bits() -> None:
    model, backend = Model(), PiecewiseBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    calls = [("prefill", 0), ("prefill", 1), ("decode", 2), ("other-lengths", 3), ("decode", 4), ("prefill", 5)]
    ours, theirs = model.states(), model.states()
    for phase, seed in calls:
        # the states go on from call to call
        found = run(compiled, ours, BATCHES[phase], inputs(seed))
        wanted = run(model, theirs, BATCHES[phase], inputs(seed))
        assert_same_bits([found, *pools(ours)], [wanted, *pools(theirs)], f"{phase} {seed}")
    assert backend.cores == 2 and len(backend.frozen) == 3
    assert [frozen.replays for frozen in backend.frozen] == [len(calls) - 1] * 3


def test_frozen_buffers_would_show_a_stale_input() -> None:
    """The stand-in for a CUDA graph can fail: a piece that keeps its first input gives another result."""
    frozen = Frozen(lambda x: x + 1)
    assert torch.equal(frozen(torch.zeros(2)), torch.ones(2))
    result = frozen(torch.ones(2))
    assert torch.equal(result, torch.full((2,), 2.0)) and result is frozen.results[0]
    assert frozen.inputs[0].data_ptr() != result.data_ptr()


def test_the_operator_is_listed_by_name_and_untagged() -> None:
    operator = torch.ops.gdn.linear_attention_with_output
    assert str(operator) == SPLIT and operator.default.name() == "gdn::linear_attention_with_output"
    # a tag would cut graphs also where the whole of them could be captured
    assert torch.Tag.cudagraph_unsafe not in operator.default.tags
    assert not operator.default._schema.returns
    written = [a.name for a in operator.default._schema.arguments if a.alias_info is not None]
    assert written == ["output"]


def test_inductors_graph_partition_cuts_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, scheduler, utils

    # Inductor cuts graphs for GPUs only: its nodes are made to look like a GPU's
    monkeypatch.setattr(scheduler.BaseSchedulerNode, "is_gpu", lambda self: True)
    pieces = []

    def wrap(call, metadata):
        pieces.append(metadata)
        return call

    model = Model()
    utils.set_customized_partition_wrappers(wrap)
    try:
        with config.patch(
            graph_partition=True,
            custom_should_partition_ops=["gdn::linear_attention_with_output"],
            force_disable_caches=True,
        ):
            compiled = torch.compile(model, backend="inductor", fullgraph=True, dynamic=False)
            ours, theirs = model.states(), model.states()
            for seed, phase in enumerate(BATCHES):
                found = run(compiled, ours, BATCHES[phase], inputs(seed))
                wanted = run(model, theirs, BATCHES[phase], inputs(seed))
                torch.testing.assert_close(found, wanted)
                torch.testing.assert_close(pools(ours), pools(theirs))
    finally:
        utils.set_customized_partition_wrappers(None)
    assert len(pieces) == 3
