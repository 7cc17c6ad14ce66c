"""Graphs cut at an operator by its name: pieces, order, what Dynamo and AOTAutograd give, and unchanged results."""

from __future__ import annotations

import functools

import pytest
import torch
from test_graphs import BATCHES, Model, inputs, pools, run
from token_cases import assert_same_bits

from gdn_kernels import graphs

SPLIT = "gdn.linear_attention_with_output"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def targets(module: torch.nn.Module) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def cutting(found: list, names=graphs.SPLIT_OPERATORS):
    """A backend that cuts and runs the cut graph as it is."""

    def backend(module: torch.fx.GraphModule, example_inputs: list) -> torch.nn.Module:
        cut, pieces = graphs.split_by_operator(module, names)
        found.append((module, cut, pieces))
        return cut

    return backend


@pytest.mark.parametrize("names", [graphs.SPLIT_OPERATORS, (SPLIT,)], ids=["colons", "dot"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_pieces_lie_around_each_call_and_change_no_bit(names: tuple[str, ...], dynamic: bool) -> None:
    model, found = Model(), []
    compiled = torch.compile(model, backend=cutting(found, names), fullgraph=True, dynamic=dynamic)
    for phase in BATCHES:
        ours, theirs = model.states(), model.states()
        y = run(compiled, ours, BATCHES[phase], inputs())
        assert_same_bits([y, *pools(ours)], [run(model, theirs, BATCHES[phase], inputs()), *pools(theirs)], phase)
    ((module, cut, pieces),) = found
    assert targets(module).count(SPLIT) == 2, "the graph that is cut stays as it is"
    assert pieces == ["submod_0", "submod_2", "submod_4"]
    children = dict(cut.named_children())
    assert list(children) == [f"submod_{i}" for i in range(5)]
    for name, child in children.items():
        assert targets(child).count(SPLIT) == (name not in pieces)
    assert targets(children["submod_1"]) == targets(children["submod_3"]) == [SPLIT]


def test_what_aot_autograd_makes_of_the_operator_is_cut_as_well() -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    def make(module: torch.fx.GraphModule, example_inputs: list):
        cut, pieces = graphs.split_by_operator(module)
        found.append((module, pieces))
        return make_boxed_func(cut)

    model, found = Model(), []
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=make), fullgraph=True, dynamic=False)
    ours, theirs = model.states(), model.states()
    y = run(compiled, ours, BATCHES["prefill"], inputs())
    wanted = run(model, theirs, BATCHES["prefill"], inputs())
    torch.testing.assert_close([y, *pools(ours)], [wanted, *pools(theirs)])
    ((module, pieces),) = found
    assert len(pieces) == 3 and SPLIT not in targets(module)


def test_a_graph_without_the_operator_is_one_piece() -> None:
    found = []
    compiled = torch.compile(lambda x: x.sin() + 1, backend=cutting(found), fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.ones(3).sin() + 1)
    assert found[0][2] == ["submod_0"]


def test_a_graph_may_begin_and_end_with_the_operator() -> None:
    def cut_at(names, x):
        found = []
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: torch.sin(x).cos(), backend=backend(found, names), fullgraph=True)
        assert torch.equal(compiled(x), x.sin().cos())
        return found[0]

    def backend(found, names):
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func

        def make(module, example_inputs):
            cut, pieces = graphs.split_by_operator(module, names)
            found.append(pieces)
            return make_boxed_func(cut)

        return aot_autograd(fw_compiler=make)

    cut = functools.partial(cut_at, x=torch.ones(3))
    assert cut(("aten::sin",)) == ["submod_2"]
    assert cut(("aten::cos",)) == ["submod_0"]
    assert cut(("aten::sin", "aten::cos")) == []


def test_a_name_without_a_namespace_is_refused() -> None:
    module = torch.fx.symbolic_trace(torch.nn.Identity())
    with pytest.raises(ValueError, match=r"^names must be of operators, namespace::name, got 'sin'$"):
        graphs.split_by_operator(module, ["sin"])
