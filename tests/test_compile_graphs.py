"""How many graphs Dynamo makes of an operator or a layer over token counts, and that compiling changes no bit.

One for all counts of two or more; one in all where the varying dimension is marked unbacked (a count of 1 is otherwise
specialised by Dynamo itself). A graph is counted once its backend has compiled it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import token_cases
import torch
from operator_cases import Call
from token_cases import CASES, assert_same_bits, outcome

import gdn_kernels
from gdn_kernels import graphs, launch
from gdn_kernels import nn as gdn_nn
from gdn_kernels.ops import OPERATORS

# The first count is no other size of a call, else Dynamo takes the two for one symbol.
COUNTS = (11, 2, 3, 7, 16, 63, 64, 65, 100, 1000, 4096, 8192)
UNBACKED_COUNTS = (11, 1, 2, 64, 8192)
FEW_COUNTS = (11, 2, 65)
FEW_UNBACKED_COUNTS = (11, 1, 65)
# Every token of these is computed on the CPU, token by token or chunk by chunk: shorter, and one long sweep below.
COMPUTED = {"chunk_gated_delta_rule-equal-lengths": 100, "recurrent_gated_delta_rule-equal-lengths": 100}
# One case of each operator for the backends that take longer.
ONE_EACH = list({name.split("-")[0]: name for name in CASES}.values())


class CountingBackend:
    """A backend that counts the graphs it compiled: an attempt that Dynamo restarts is none."""

    def __init__(self, name: str) -> None:
        self.inner, self.graphs = torch._dynamo.lookup_backend(name), 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled = self.inner(module, inputs)
        self.graphs += 1
        return compiled


def compile(function: Callable[..., Any], backend: str = "eager") -> tuple[Callable[..., Any], CountingBackend]:
    torch._dynamo.reset()
    counter = CountingBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=True), counter


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@functools.cache
def varying(name: str) -> list[tuple[tuple[int, ...], list[int]]]:
    """Of each tensor of the call: its strides with several tokens, and the dimensions that follow the count."""
    few, more = (token_cases.make(name, count).tensors for count in (7, 9))
    return [
        (x.stride(), [dim for dim in range(x.dim()) if x.shape[dim] != y.shape[dim]])
        for x, y in zip(few, more, strict=True)
    ]


def mark(call: Call, name: str) -> Call:
    """The call on tensors of the same strides, with the dimensions that follow its count marked unbacked.

    Dynamo ties the strides of a view among a graph's inputs to its base, and torch rewrites the stride of a dimension
    of one token in views; neither is the operator's doing. So these are no views, and one token has the stride of many.
    """
    tensors = {}
    for x, (known, dims) in zip(call.tensors, varying(name), strict=True):
        strides = [a if size != 1 else b for size, a, b in zip(x.shape, x.stride(), known, strict=True)]
        own = torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)
        for dim in dims:
            torch._dynamo.decorators.mark_unbacked(own, dim)
        tensors[id(x)] = own
    return call.map(lambda x: tensors[id(x)])


def sweep(name: str, backend: str, counts: tuple[int, ...], unbacked: bool) -> dict[int, int]:
    """Graphs after each count; each compiled call is compared with eager, results and writes, bit for bit."""
    first = token_cases.make(name, counts[0])
    operator = getattr(gdn_kernels, first.operator)
    constants = {key: x for key, x in first.kwargs.items() if not isinstance(x, torch.Tensor)}
    compiled, counter = compile(lambda args, tensors: operator(*args, **tensors, **constants), backend)
    found = {}
    for count in counts:
        call, eager = (token_cases.make(name, count, seed=count) for _ in range(2))
        if unbacked:
            call = mark(call, name)
        tensors = {key: x for key, x in call.kwargs.items() if isinstance(x, torch.Tensor)}
        got = outcome(call, compiled(call.args, tensors))
        assert_same_bits(got, outcome(eager, eager.run()), f"{name} at {count} under {backend}")
        found[count] = counter.graphs
    return found


def limited(name: str, counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(count for count in counts if count <= COMPUTED.get(name, count))


def test_every_operator_has_a_case() -> None:
    assert {name.split("-")[0] for name in CASES} | {"linear_attention_with_output"} == set(OPERATORS)
    assert {name.split("-")[0] for name in ONE_EACH} == {name.split("-")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_all_counts_from_two_on_share_one_graph(name: str) -> None:
    found = sweep(name, "eager", limited(name, COUNTS), unbacked=False)
    assert set(found.values()) == {1}, f"graphs after each count: {found}"


@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_every_count_of_an_unbacked_dimension(name: str) -> None:
    found = sweep(name, "eager", limited(name, UNBACKED_COUNTS), unbacked=True)
    assert set(found.values()) == {1}, f"graphs after each count: {found}"


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_other_backends_make_one_graph_as_well(backend: str, name: str) -> None:
    for counts, unbacked in ((FEW_COUNTS, False), (FEW_UNBACKED_COUNTS, True)):
        found = sweep(name, backend, limited(name, counts), unbacked)
        assert set(found.values()) == {1}, f"{unbacked=}, graphs after each count: {found}"


def test_a_chunked_prefill_of_8192_tokens_has_the_graph_of_a_short_one() -> None:
    def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
        m = token_cases.Make(token_cases.Sizes(H=1, HV=1, K=64, V=64), "cpu", torch.float32, tokens)
        return m.delta(1, tokens)

    compiled, counter = compile(lambda *x: gdn_kernels.chunk_gated_delta_rule(*x, use_qk_l2norm=True))
    for tokens in (11, 2, 65, 8192):
        tensors = inputs(tokens)
        wanted = gdn_kernels.chunk_gated_delta_rule(*tensors, use_qk_l2norm=True)
        assert_same_bits(list(compiled(*tensors)), list(wanted), f"{tokens} tokens")
    assert counter.graphs == 1


# ---------------------------------------------------------------------------------------------------------------
# The counter can fail
# ---------------------------------------------------------------------------------------------------------------


def test_a_heuristic_on_the_token_count_in_traced_code_makes_more_graphs() -> None:
    def heuristic(x: torch.Tensor) -> torch.Tensor:
        block = 1
        while block < 4 and block * 16 < x.shape[0]:
            block *= 2
        return gdn_kernels.l2norm(x, eps=block * 1e-6)

    compiled, counter = compile(heuristic)
    for count in COUNTS:
        compiled(torch.ones(count, 64))
    # up to 16, up to 32, and above
    assert counter.graphs == 2 + (17 <= min(x for x in COUNTS if x > 16) <= 32)


def test_a_count_of_one_is_another_graph_unless_it_is_unbacked() -> None:
    found = sweep("l2norm-column-view", "eager", (11, 2, 1, 300), unbacked=False)
    assert found == {11: 1, 2: 1, 1: 2, 300: 2}


def test_a_static_size_that_changes_is_seen() -> None:
    compiled, counter = compile(lambda q, k, v, g, beta: gdn_kernels.chunk_gated_delta_rule(q, k, v, g, beta))
    for size in (64, 128):
        sizes = token_cases.Sizes(H=1, HV=2, K=size, V=size)
        compiled(*token_cases.Make(sizes, "cpu", torch.float32, 0).delta(1, 11))
    assert counter.graphs == 2


# ---------------------------------------------------------------------------------------------------------------
# Capture mode
# ---------------------------------------------------------------------------------------------------------------


def test_reading_is_capturing_in_traced_code_adds_no_graph() -> None:
    def branching(x: torch.Tensor) -> torch.Tensor:
        return gdn_kernels.l2norm(x) if launch.is_capturing() else x

    compiled, counter = compile(branching)
    for count in (11, 2, 100):
        x = torch.randn(count, 64)
        outside = compiled(x)
        with launch.capture_mode():
            inside = compiled(x)
        # Dynamo always sees capture mode, so the branch taken is the same
        assert_same_bits([outside, inside], [gdn_kernels.l2norm(x)] * 2, f"{count} rows")
    assert counter.graphs == 1


@pytest.mark.parametrize("name", ["layer_norm_gated-column-views", "chunk_gated_delta_rule_paged-tokens"])
def test_capture_mode_recompiles_nothing_and_changes_no_bit(name: str) -> None:
    first = token_cases.make(name, 11)
    operator = getattr(gdn_kernels, first.operator)
    constants = {key: x for key, x in first.kwargs.items() if not isinstance(x, torch.Tensor)}
    compiled, counter = compile(lambda args, tensors: operator(*args, **tensors, **constants))

    def run(count: int) -> list[torch.Tensor]:
        call = token_cases.make(name, count, seed=count)
        return outcome(
            call, compiled(call.args, {key: x for key, x in call.kwargs.items() if isinstance(x, torch.Tensor)})
        )

    for count in (11, 100):
        outside = run(count)
        with launch.capture_mode():
            assert_same_bits(run(count), outside, f"{name} in capture mode")
        assert_same_bits(run(count), outside, f"{name} after capture mode")
        eager = token_cases.make(name, count, seed=count)
        with launch.capture_mode():
            assert_same_bits(outcome(eager, eager.run()), outside, f"{name} eager in capture mode")
    assert counter.graphs == 1


# ---------------------------------------------------------------------------------------------------------------
# Views made inside the graph
# ---------------------------------------------------------------------------------------------------------------

S = token_cases.CPU


def norms(wide: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> list[torch.Tensor]:
    """Norms of a computed transpose and of slices, with work before and after."""
    heads = (wide * 2.0)[:, : S.HV * S.V].unflatten(1, (S.HV, S.V))
    gate = wide[:, S.HV * S.V : 2 * S.HV * S.V].unflatten(1, (S.HV, S.V))
    y = gdn_kernels.layer_norm_gated(
        heads.transpose(0, 1), pool[0, 0, 0], None, gate.transpose(0, 1), norm_before_gate=True
    )
    return [y.transpose(0, 1) + gate, gdn_kernels.l2norm(heads.transpose(0, 1)) * 2.0]


def gates(wide: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> list[torch.Tensor]:
    """Gates of column slices and of a computed transpose."""
    a, b = wide[:, 3 : 3 + S.HV], (wide[:, :16] + 1.0)[:, 7 : 7 + S.HV]
    return [
        *gdn_kernels.gating(a, b, pool[0, 0, 0, : S.HV], pool[0, 0, 1, : S.HV]),
        *gdn_kernels.gating(
            (wide + 1.0)[:, : 4 * S.HV].unflatten(1, (4, S.HV)).transpose(0, 1),
            wide[:, : 4 * S.HV].unflatten(1, (4, S.HV)).transpose(0, 1),
            pool[0, 0, 0, : S.HV],
            pool[0, 0, 1, : S.HV],
        ),
    ]


def mixer(wide: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> list[torch.Tensor]:
    """Conv and decode on slices of one projection and of the pool; the pool is written through a slice."""
    mixed, a, b = wide[:, : S.D], wide[:, 5 : 5 + S.HV], wide[:, 9 : 9 + S.HV]
    window = (wide[:1, : 3 * S.D] * 0.0).sum() + pool.new_zeros(4, 3, S.D).transpose(1, 2)
    rows = torch.where(slots < 4, slots, -1)
    x = gdn_kernels.causal_conv1d_update(
        mixed * 0.5, pool[0].reshape(-1)[: 4 * S.D].view(4, S.D).t(), None, window, state_indices=rows
    )
    A_log, dt_bias = pool[0, 0, 0, : S.HV], pool[0, 0, 1, : S.HV]
    o = gdn_kernels.packed_decode(x, a, b, A_log, dt_bias, pool[1:], rows, num_k_heads=S.H)
    return [o * 2.0, window, x]


def prefill(wide: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> list[torch.Tensor]:
    """Chunked and recurrent rule on views of one computed tensor, states written through a slice of the pool."""
    q, k, v = (wide * 0.5)[None, :, : S.D].split((S.H * S.K, S.H * S.K, S.HV * S.V), dim=-1)
    q, k, v = q.unflatten(-1, (S.H, S.K)), k.unflatten(-1, (S.H, S.K)), v.unflatten(-1, (S.HV, S.V))
    g, beta = -wide[None, :, :8].abs()[..., 2 : 2 + S.HV], wide[None, :, 1 : 1 + S.HV].sigmoid()
    o, final = gdn_kernels.recurrent_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm=True)
    offsets = torch.zeros_like(slots[:2])
    offsets[1:] = min(wide.shape[0], 50)
    out = wide.new_empty(v.shape)
    gdn_kernels.chunk_gated_delta_rule_paged(q, k, v, g, beta, pool[2:], out, slots[:1], offsets, use_qk_l2norm=True)
    return [o + v, final, out]


@pytest.mark.parametrize("function", [norms, gates, mixer, prefill], ids=lambda f: f.__name__)
def test_views_made_in_the_graph_work_under_inductor(function: Callable[..., list[torch.Tensor]]) -> None:
    generator = torch.Generator().manual_seed(0)

    def inputs(count: int) -> tuple[torch.Tensor, ...]:
        wide = torch.randn(count, S.D + 40, generator=generator)
        pool = torch.randn(9, S.HV, S.V, S.K, generator=generator)
        return wide, pool, torch.randperm(count, generator=generator).to(torch.int32)

    compiled, counter = compile(function, "inductor")
    for count in (11, 2, 60):
        wide, pool, slots = inputs(count)
        theirs = pool.clone()
        wanted = function(wide, theirs, slots)
        found = compiled(wide, pool, slots)
        for ours, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
            assert ours.shape == other.shape
        torch.testing.assert_close(pool, theirs, rtol=1e-5, atol=1e-5)
    assert counter.graphs == 1


# ---------------------------------------------------------------------------------------------------------------
# Layers and the split point
# ---------------------------------------------------------------------------------------------------------------

HIDDEN = 48


def layer(fused: bool) -> gdn_nn.GatedDeltaNet:
    torch.manual_seed(0)
    made = gdn_nn.GatedDeltaNet(HIDDEN, S.H, S.HV, S.K, S.V, S.W, layer_id=3, fused_in_proj=fused)
    return made.requires_grad_(False)


def states(mixer: gdn_nn.GatedDeltaNet) -> graphs.LayerState:
    made = mixer.allocate_states(token_cases.SLOTS)
    m = token_cases.Make(S, "cpu", torch.float32, 0)
    for pool in (made.conv_state, made.recurrent_state):
        pool.copy_(m.normal(*pool.shape))
    return made


def batches(count: int) -> list[graphs.BatchMetadata]:
    """A prefill and a decode of ``count`` padded tokens."""
    m = token_cases.Make(S, "cpu", torch.float32, count)
    prefill = graphs.BatchMetadata(m.slots(token_cases.SEQUENCES), m.offsets(count), m.flags(token_cases.SEQUENCES))
    return [prefill, graphs.BatchMetadata(m.slots(count))]


def layer_sweep(mixer: gdn_nn.GatedDeltaNet, backend: str, counts: tuple[int, ...], unbacked: bool) -> dict[int, int]:
    compiled, counter = compile(mixer, backend)
    found = {}
    for count in counts:
        for metadata in batches(count):
            x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count))
            ours, theirs = states(mixer), states(mixer)
            with graphs.forward_context({3: theirs}, metadata):
                wanted = mixer(x)
            if unbacked:
                torch._dynamo.decorators.mark_unbacked(x, 0)
            with graphs.forward_context({3: ours}, metadata):
                y = compiled(x)
            assert_same_bits(
                [y, ours.conv_state, ours.recurrent_state],
                [wanted, theirs.conv_state, theirs.recurrent_state],
                f"{count} tokens under {backend}",
            )
        found[count] = counter.graphs
    return found


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize(
    "backend, counts, unbacked_counts",
    [
        ("eager", COUNTS, UNBACKED_COUNTS),
        ("aot_eager", FEW_COUNTS, FEW_UNBACKED_COUNTS),
        ("inductor", FEW_COUNTS, FEW_UNBACKED_COUNTS),
    ],
    ids=["eager", "aot_eager", "inductor"],
)
def test_a_layer_is_one_graph_for_prefill_and_decode(
    backend: str, counts: tuple[int, ...], unbacked_counts: tuple[int, ...], fused: bool
) -> None:
    mixer = layer(fused)
    for unbacked, tried in ((False, counts), (True, unbacked_counts)):
        found = layer_sweep(mixer, backend, tried, unbacked)
        assert set(found.values()) == {1}, f"{unbacked=}, graphs after each count: {found}"


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_gated_norm_module_is_one_graph(backend: str) -> None:
    norm = gdn_nn.RMSNormGated(64, eps=1e-5).requires_grad_(False)
    for unbacked, counts in ((False, COUNTS), (True, UNBACKED_COUNTS)):
        compiled, counter = compile(norm, backend)
        for count in counts:
            x, z = torch.randn(count, 3, 64), torch.randn(count, 3, 64)
            wanted = norm(x, z)
            if unbacked:
                for tensor in (x, z):
                    torch._dynamo.decorators.mark_unbacked(tensor, 0)
            assert_same_bits([compiled(x, z)], [wanted], f"{count} tokens")
            assert counter.graphs == 1, f"{unbacked=}, {counter.graphs} graphs at {count}"


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_split_point_is_one_graph_over_token_counts(backend: str) -> None:
    mixer = layer(fused=True)
    operator = gdn_kernels.graphs.linear_attention_with_output
    for unbacked, counts in ((False, COUNTS), (True, UNBACKED_COUNTS)):
        compiled, counter = compile(lambda *args: operator(*args, 3), backend)
        for count in counts if backend == "eager" else counts[:4]:
            for metadata in batches(count):
                m = token_cases.Make(S, "cpu", torch.float32, count)
                args = [m.normal(count, n) for n in (S.D, S.HV, S.HV)]
                args = [*args, m.normal(count, S.HV, S.V)]
                again, ours, theirs = [x.clone() for x in args], states(mixer), states(mixer)
                with graphs.forward_context({3: theirs}, metadata):
                    operator(*again, 3)
                if unbacked:
                    for tensor in args:
                        torch._dynamo.decorators.mark_unbacked(tensor, 0)
                with graphs.forward_context({3: ours}, metadata):
                    compiled(*args)
                assert_same_bits([*args, ours.recurrent_state], [*again, theirs.recurrent_state], f"{count} tokens")
        assert counter.graphs == 1, f"{unbacked=}: {counter.graphs} graphs"
