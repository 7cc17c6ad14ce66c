"""causal-conv1d's names on this package's operators: its signatures, its formulas in fp64, and bad input."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gdn_kernels.integrations.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

B, D = 3, 6
LAYOUTS = {
    "channel-last": lambda x: x.mT.contiguous().mT,
    "time-last": lambda x: x.contiguous(),
    "slice": lambda x: torch.cat([x, x], 1).mT.contiguous().mT[:, : x.shape[1]],
}
widths = pytest.mark.parametrize("width", [2, 3, 4])
activations = pytest.mark.parametrize("activation", [None, "silu", "swish"])


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """fp64 against fp64, five products of order one."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def conv(columns: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, length: int):
    """The last ``length`` outputs of the convolution of ``columns`` ``[B, D, >= length]``, zeros before them."""
    padded = F.pad(columns, (weight.shape[1] - 1, 0))
    y = F.conv1d(padded, weight[:, None], bias, groups=len(weight))
    y = y[..., y.shape[-1] - length :]
    return F.silu(y) if activation else y


@widths
@activations
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("initial", [False, True], ids=["new", "continued"])
def test_fn(width: int, activation: str | None, length: int, layout: str, initial: bool) -> None:
    x, weight, bias, states = rand(B, D, length), rand(D, width), rand(D), rand(B, D, width - 1)
    columns = torch.cat([states if initial else torch.zeros_like(states), x], -1)
    expected, final = conv(columns, weight, bias, activation, length), columns[..., length:]
    given = states.clone() if initial else None
    view = LAYOUTS[layout](x)
    near(causal_conv1d_fn(view, weight, bias, initial_states=given, activation=activation), expected)
    out = torch.full_like(states, 7)
    y, state = causal_conv1d_fn(view, weight, bias, None, given, True, out, activation)
    assert state is out
    near(y, expected)
    near(out, final)
    near(causal_conv1d_fn(view, weight, bias, None, given, True, None, activation)[1], final)
    if initial:
        assert torch.equal(given, states)


def test_the_example_of_the_readme() -> None:
    x, weight, bias = rand(B, D, 5), rand(D, 4), rand(D)
    near(causal_conv1d_fn(x, weight, bias), F.conv1d(x, weight.unsqueeze(1), bias, padding=3, groups=D)[..., :5])


def test_no_bias_no_tokens_and_final_states_that_nobody_asked_for() -> None:
    x, weight, states, out = rand(B, D, 5), rand(D, 4), rand(B, D, 3), torch.full((B, D, 3), 7.0).double()
    near(causal_conv1d_fn(x, weight, final_states_out=out), conv(x, weight, None, None, 5))
    assert bool((out == 7).all())
    y, final = causal_conv1d_fn(x[..., :0], weight, initial_states=states, return_final_states=True)
    assert y.shape == (B, D, 0)
    near(final, states)


@widths
@activations
@pytest.mark.parametrize("tokens", [None, 1, 2, 5], ids=["2d", "1", "2", "5"])
@pytest.mark.parametrize("older", [0, 1, 3])
def test_update(width: int, activation: str | None, tokens: int | None, older: int) -> None:
    x, weight, bias = rand(B, D, tokens or 1), rand(D, width), rand(D)
    for layout in LAYOUTS.values():
        state = layout(rand(B, D, width - 1 + older))
        columns = torch.cat([state, x], -1)
        y = causal_conv1d_update(x if tokens else x[..., 0], state, weight, bias, activation)
        expected = conv(columns, weight, bias, activation, tokens or 1)
        near(y, expected if tokens else expected[..., 0])
        near(state, columns[..., columns.shape[-1] - state.shape[-1] :])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_update_of_slots(dtype: torch.dtype) -> None:
    x, weight, pool = rand(3, D), rand(D, 4), rand(5, D, 3)
    before, slots = pool.clone(), torch.tensor([4, -1, 0], dtype=dtype)
    y = causal_conv1d_update(x, pool, weight, conv_state_indices=slots)
    assert not y[1].any()
    assert torch.equal(pool[1:4], before[1:4])
    for row, slot in ((0, 4), (2, 0)):
        columns = torch.cat([before[slot], x[row, :, None]], -1)
        near(y[row : row + 1], conv(columns[None], weight, None, None, 1)[..., 0])
        near(pool[slot], columns[:, 1:])


def test_updates_continue_a_prefill() -> None:
    x, weight = rand(B, D, 8), rand(D, 4)
    expected, final = causal_conv1d_fn(x, weight, return_final_states=True, activation="silu")
    _, state = causal_conv1d_fn(x[..., :5], weight, return_final_states=True)
    y = [causal_conv1d_update(x[..., t], state, weight, activation="silu") for t in range(5, 8)]
    near(torch.stack(y, -1), expected[..., 5:])
    near(state, final)


X, WEIGHT = torch.zeros(B, D, 5), torch.zeros(D, 4)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"seq_idx": torch.zeros(B, 5, dtype=torch.int32)}, NotImplementedError, "^seq_idx"),
        ({"weight": torch.zeros(D, 5)}, NotImplementedError, "2 to 4"),
        ({"x": X[0]}, ValueError, "x must be"),
        ({"activation": "gelu"}, ValueError, "activation"),
        ({"initial_states": torch.zeros(B, D, 4)}, ValueError, "initial_states"),
        ({"initial_states": torch.zeros(B, D, 3).half()}, TypeError, "initial_states"),
        ({"final_states_out": torch.zeros(B, D, 4)}, ValueError, "final_states_out"),
        ({"x": X.long()}, TypeError, "x must be"),
        ({"activations": "silu"}, TypeError, "activations"),
    ],
)
def test_fn_refuses(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        causal_conv1d_fn(**{"x": X, "weight": WEIGHT, **options})


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"cache_seqlens": torch.zeros(B, dtype=torch.int32)}, NotImplementedError, "^cache_seqlens"),
        ({"conv_state_indices": torch.arange(B)}, NotImplementedError, "^conv_state_indices"),
        ({"conv_state": torch.ones(B, D, 2)}, ValueError, "conv_state"),
        ({"conv_state": torch.ones(B + 1, D, 3)}, ValueError, "conv_state"),
        ({"weight": torch.zeros(D, 5)}, NotImplementedError, "2 to 4"),
        ({"activation": "gelu"}, ValueError, "activation"),
        ({"pad_slot_id": -1}, TypeError, "pad_slot_id"),
    ],
)
def test_update_refuses_and_writes_nothing(options: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"x": X, "conv_state": torch.ones(B, D, 4), "weight": WEIGHT, **options}
    with pytest.raises(error, match=text):
        causal_conv1d_update(**arguments)
    assert bool((arguments["conv_state"] == 1).all())


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_update])
def test_signatures_are_those_of_causal_conv1d(function) -> None:
    # Its wheels and its import need a CUDA build, so the names are also held against what 1.7.0 has.
    names = {
        "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
        "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
    }[function.__name__]
    ours = [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
    assert " ".join(name for name, _ in ours) == names
    library = pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed; it builds for GPUs only")
    theirs = inspect.signature(getattr(library, function.__name__)).parameters.values()
    assert ours == [(p.name, p.default) for p in theirs]
