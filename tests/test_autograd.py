"""Gradients: of the operators that have a backward, against numbers and against autograd through the reference."""

from __future__ import annotations

from unittest import mock

import operator_cases
import pytest
import torch
import torch.nn.functional as F

import gdn_kernels
from gdn_kernels.integrations import causal_conv1d, fla
from gdn_kernels.reference import _math
from gdn_kernels.reference import gating as reference_gating
from gdn_kernels.reference import norm as reference_norm

FORMULAS = {
    "layer_norm_gated": reference_norm.layer_norm_gated,
    "l2norm": reference_norm.l2norm,
    "gating": reference_gating.gating,
}
NORMS = [
    pytest.param({"norm_before_gate": before, "is_rms_norm": rms, "activation": activation}, bias, gate, id=name)
    for name, before, rms, activation, bias, gate in [
        ("rms-then-silu", True, True, "silu", False, True),
        ("silu-then-rms-bias", False, True, "swish", True, True),
        ("layer-then-sigmoid-bias", True, False, "sigmoid", True, True),
        ("sigmoid-then-layer", False, False, "sigmoid", False, True),
        ("layer-no-gate", True, False, "silu", False, False),
    ]
]


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def norm_inputs(bias: bool, gate: bool, dtype: torch.dtype = torch.float64, columns: int = 8) -> tuple:
    x, z = numbers(2, 3, columns, seed=0, dtype=dtype), numbers(2, 3, columns, seed=1, dtype=dtype)
    weight, shift = numbers(columns, seed=2, dtype=dtype), numbers(columns, seed=3, dtype=dtype)
    return x, weight, shift if bias else None, z if gate else None


def gate_inputs(dtype: torch.dtype = torch.float64) -> tuple:
    """Two tokens of three heads; one ``a`` is above the threshold of softplus."""
    a, b = numbers(2, 3, seed=0, dtype=dtype), numbers(2, 3, seed=1, dtype=dtype)
    with torch.no_grad():
        a[1, 2] = 25.0
    return a, b, numbers(3, seed=2, dtype=dtype), numbers(3, seed=3, dtype=dtype)


def check(call, inputs: tuple, twice: bool = True) -> None:
    assert torch.autograd.gradcheck(call, inputs)
    if twice:
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("options, bias, gate", NORMS)
def test_gradcheck_of_the_gated_norm(options, bias, gate, group_size):
    check(
        lambda *inputs: gdn_kernels.layer_norm_gated(*inputs, eps=1e-3, group_size=group_size, **options),
        norm_inputs(bias, gate),
        twice=group_size is not None,
    )


def test_gradcheck_of_l2norm():
    check(lambda x: gdn_kernels.l2norm(x, eps=1e-3), (numbers(2, 3, 8, seed=0),))


@pytest.mark.parametrize("beta_scale", [1.0, 2.0])
def test_gradcheck_of_gating(beta_scale):
    check(lambda *inputs: gdn_kernels.gating(*inputs, beta_scale=beta_scale), gate_inputs())


def through_formula(name: str, inputs: tuple, options: dict, weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """fp64 gradients by autograd through the reference's formula; its sigmoid works in place, so another one serves."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    with mock.patch.object(_math, "sigmoid", torch.sigmoid):
        results = FORMULAS[name](*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    sum((r * w.double()).sum() for r, w in zip(results, weights, strict=True)).backward()
    return [None if x is None else x.grad for x in leaves]


CASES = [
    ("layer_norm_gated", lambda dtype: norm_inputs(True, True, dtype, 64), {"norm_before_gate": True}),
    ("layer_norm_gated", lambda dtype: norm_inputs(True, True, dtype, 64), {"norm_before_gate": False}),
    ("l2norm", lambda dtype: (numbers(5, 64, seed=0, dtype=dtype),), {}),
    ("gating", gate_inputs, {"beta_scale": 2.0}),
]


# A gradient is computed in fp32 from inputs in dtype and rounded to it once; sums over 6 rows add some fp32 units.
@pytest.mark.parametrize("dtype, budget", [(torch.float32, 4e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name, make, options", CASES, ids=["norm-gate", "gate-norm", "l2norm", "gating"])
def test_gradients_are_those_of_the_reference_formula(name, make, options, dtype, budget):
    check_against_formula("cpu", name, make, options, dtype, budget)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, budget", [(torch.float32, 4e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name, make, options", CASES, ids=["norm-gate", "gate-norm", "l2norm", "gating"])
def test_gradients_are_those_of_the_reference_formula_on_a_gpu(name, make, options, dtype, budget):
    check_against_formula("cuda", name, make, options, dtype, budget)


def check_against_formula(device, name, make, options, dtype, budget):
    inputs = tuple(None if x is None else x.detach().to(device).requires_grad_() for x in make(dtype))
    results = getattr(torch.ops.gdn, name)(*inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    weights = [numbers(*r.shape, seed=9 + i, dtype=r.dtype).detach() for i, r in enumerate(results)]
    sum((r * w.to(device)).sum() for r, w in zip(results, weights, strict=True)).backward()
    wanted = through_formula(name, tuple(None if x is None else x.cpu() for x in inputs), options, weights)
    for i, (x, expected) in enumerate(zip(inputs, wanted, strict=True)):
        assert x.grad.dtype is dtype and x.grad.shape == x.shape
        error = (x.grad.cpu().double() - expected).abs().max() / expected.abs().max()
        print(f"{name} input {i}: {error:.2e} of {budget:.2e}")
        assert error <= budget


# The convolution -------------------------------------------------------------------------------------------------

LENGTHS, CHANNELS = (5, 0, 1, 2, 4), 3
#: Slots of a pool of six, one of padding; the third sequence starts from nothing; two tokens past the last offset.
OFFSETS, SLOTS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)]), torch.tensor([4, 1, 0, -1, 3])
FRESH = torch.tensor([True, True, False, True, True])
POOLS = {
    "own-slots": {},
    "slots-and-padding": {"state_indices": SLOTS},
    "fresh": {"state_indices": SLOTS, "has_initial_state": FRESH},
}
pools = pytest.mark.parametrize("pool", POOLS)
widths = pytest.mark.parametrize("width", [2, 3, 4])
activations = pytest.mark.parametrize("activation", [None, "silu"])


def conv_inputs(width: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """x, weight, bias, the pool."""
    tokens = sum(LENGTHS) + 2
    shapes = (tokens, CHANNELS), (CHANNELS, width), (CHANNELS,), (6, CHANNELS, width - 1)
    return tuple(numbers(*s, seed=i, dtype=dtype).detach().to(device) for i, s in enumerate(shapes))


def plain_conv(x, weight, bias, pool, activation, state_indices=None, has_initial_state=None) -> torch.Tensor:
    """What the operator computes, sequence by sequence with torch's convolution, which autograd differentiates."""
    parts, width = [], weight.shape[1] - 1
    for n, length in enumerate(LENGTHS):
        start = int(OFFSETS[n])
        slot = n if state_indices is None else int(state_indices[n])
        if slot < 0:
            parts.append(x.new_zeros(length, CHANNELS))
            continue
        fresh = has_initial_state is not None and not has_initial_state[n]
        window = torch.zeros_like(pool[slot]) if fresh else pool[slot]
        columns = torch.cat([window, x[start : start + length].t()], 1)
        part = F.conv1d(columns[None], weight[:, None], bias, groups=CHANNELS)[0] if length else columns[:, width:]
        parts.append((part if activation is None else F.silu(part)).t())
    return torch.cat([*parts, x.new_zeros(x.shape[0] - int(OFFSETS[-1]), CHANNELS)])


@pools
@widths
@activations
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradcheck_of_causal_conv1d(pool, width, activation, bias):
    x, weight, shift, states = conv_inputs(width)
    leaves = [t.requires_grad_() for t in ((x, weight, shift) if bias else (x, weight))]

    def call(x, weight, shift=None):
        return gdn_kernels.causal_conv1d(
            x, weight, shift, states.clone(), OFFSETS, activation=activation, **POOLS[pool]
        )

    check(call, tuple(leaves), twice=bias and width == 4)


def check_conv(device: str, dtype: torch.dtype, pool: str, width: int, activation: str | None, budget: float) -> None:
    """Gradients and the pool against autograd through torch's convolution, fp64, from the same rounded numbers."""
    x, weight, bias, states = conv_inputs(width, dtype, device)
    leaves, options = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()], POOLS[pool]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    before = states.cpu().double()
    placed = {name: value.to(device) for name, value in options.items()}
    y = torch.ops.gdn.causal_conv1d(*leaves, states, OFFSETS.to(device), activation=activation, **placed)
    wanted = plain_conv(*exact, before, activation, **options)
    upstream = numbers(*y.shape, seed=9, dtype=dtype).detach()
    upstream[int(OFFSETS[-1]) :] = torch.nan  # of padding nobody reads the gradient
    y.backward(upstream.to(device))
    wanted.backward(upstream.double().nan_to_num())
    for name, leaf, expected in zip(("x", "weight", "bias"), leaves, exact, strict=True):
        assert leaf.grad.dtype is dtype
        error = (leaf.grad.cpu().double() - expected.grad).abs().max() / expected.grad.abs().max()
        print(f"{name}: {error:.2e} of {budget:.2e}")
        assert error <= budget
    slot = 0 if pool == "own-slots" else int(SLOTS[0])  # of the first sequence, longer than the window
    assert torch.equal(states[slot].cpu(), x.detach().cpu()[LENGTHS[0] - width + 1 : LENGTHS[0]].t())


CONV_BUDGETS = [(torch.float32, 4e-6), (torch.bfloat16, 2**-8)]


@pools
@activations
@pytest.mark.parametrize("dtype, budget", CONV_BUDGETS, ids=["fp32", "bf16"])
def test_gradients_of_causal_conv1d_are_those_of_torch(pool, activation, dtype, budget):
    check_conv("cpu", dtype, pool, 4, activation, budget)


@pytest.mark.gpu
@pools
@widths
@activations
@pytest.mark.parametrize("dtype, budget", CONV_BUDGETS, ids=["fp32", "bf16"])
def test_gradients_of_causal_conv1d_are_those_of_torch_on_a_gpu(pool, width, activation, dtype, budget):
    check_conv("cuda", dtype, pool, width, activation, budget)


def test_a_conv_state_that_requires_grad_is_refused_and_nothing_written():
    x, weight, bias, states = conv_inputs(4)
    leaf, before = states.requires_grad_(), states.detach().clone()
    with pytest.raises(NotImplementedError, match="conv_state of gdn::causal_conv1d must not require grad"):
        gdn_kernels.causal_conv1d(x.requires_grad_(), weight, bias, leaf, OFFSETS)
    with pytest.raises(NotImplementedError, match="conv_state of gdn::causal_conv1d must not require grad"):
        gdn_kernels.causal_conv1d(x.detach(), weight, bias, leaf, OFFSETS)
    assert torch.equal(leaf.detach(), before)


def test_wrong_input_that_requires_grad_is_told_as_without():
    x, weight, bias, states = conv_inputs(4)
    with pytest.raises(ValueError, match="conv_state must hold W - 1 = 3 columns"):
        gdn_kernels.causal_conv1d(x.requires_grad_(), weight, bias, states[..., :2], OFFSETS)


def test_a_compiled_step_through_the_convolution_has_its_gradients_and_writes_the_pool():
    def loss(x, weight, bias, states):
        y = torch.ops.gdn.causal_conv1d(x, weight, bias, states, OFFSETS)
        return (y * y).sum() + states.sum()

    x, weight, bias, states = conv_inputs(4, torch.float32)
    leaves, again = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()), states.clone()
    expected = torch.autograd.grad(loss(*leaves, states), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves, again), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(states, again)


# The drop-in functions: states have gradients too ----------------------------------------------------------------


@activations
@pytest.mark.parametrize("length", [1, 2, 6])
def test_gradcheck_of_causal_conv1d_fn_with_states(activation, length):
    x, weight, bias = numbers(2, 3, length, seed=0), numbers(3, 4, seed=1), numbers(3, seed=2)

    def call(x, weight, bias, states):
        return causal_conv1d.causal_conv1d_fn(
            x, weight, bias, initial_states=states, return_final_states=True, activation=activation
        )

    check(call, (x, weight, bias, numbers(2, 3, 3, seed=3)), twice=False)
    check(lambda x, weight, bias: call(x, weight, bias, None), (x, weight, bias), twice=False)
    with torch.no_grad():
        states = numbers(2, 3, 3, seed=3)
        plain = call(x, weight, bias, states)
    for one, other in zip(call(x, weight, bias, states), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@activations
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_gradcheck_of_flas_causal_conv1d_with_states(activation, packed):
    x = numbers(1, 9, 3, seed=0) if packed else numbers(2, 6, 3, seed=0)
    offsets = torch.tensor([0, 5, 5, 7]) if packed else None  # the last two tokens are padding
    weight, bias, states = numbers(3, 4, seed=1), numbers(3, seed=2), numbers(3 if packed else 2, 3, 4, seed=3)

    def call(x, weight, bias, states):
        return fla.causal_conv1d(
            x, weight, bias, initial_state=states, output_final_state=True, activation=activation, cu_seqlens=offsets
        )

    check(call, (x, weight, bias, states), twice=False)
    check(lambda x, weight, bias: call(x, weight, bias, None), (x, weight, bias), twice=False)
    with torch.no_grad():
        plain = call(x, weight, bias, states)
    for one, other in zip(call(x, weight, bias, states), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("module", [fla.FusedRMSNormGated, fla.FusedLayerNormGated, fla.RMSNormGated])
def test_gradcheck_of_flas_norm_modules(module):
    norm = module(8, dtype=torch.float64)
    check(lambda x, g, weight: torch.func.functional_call(norm, {"weight": weight}, (x, g)),
          (numbers(2, 8, seed=0), numbers(2, 8, seed=1), numbers(8, seed=2)), twice=False)  # fmt: skip


def test_gradcheck_of_flas_gates():
    g, A_log, dt_bias = numbers(2, 5, 3, seed=0), numbers(3, seed=1), numbers(3, seed=2)
    check(lambda *inputs: fla.fused_gdn_gate(*inputs, output_dtype=torch.float64), (g, A_log, dt_bias), twice=False)
    check(lambda g, A_log: fla.fused_gdn_gate(g, A_log, output_dtype=torch.float64), (g, A_log), twice=False)
    check(lambda x: fla.fused_beta_sigmoid(x, 2.0), (g,), twice=False)


# What torch sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layer_norm_gated", "l2norm", "gating", "causal_conv1d"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_call_that_needs_no_gradient_records_none(name, mode):
    call = next(call for call in operator_cases.calls() if call.operator == name)
    if mode is not torch.enable_grad:
        call = call.map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)
    with mode():
        results = call.run()
    for result in results if isinstance(results, (tuple, list)) else [results]:
        assert not result.requires_grad and result.grad_fn is None


FORMS = ("column-views", "no-gate", "bias", "gate-first-sigmoid", "empty", "column-view", "16-bit-parameters")
DIFFERENTIABLE = [c.id for c in operator_cases.calls() if c.operator in FORMULAS and c.name in FORMS]
DIFFERENTIABLE += [c.id for c in operator_cases.calls() if c.operator == "causal_conv1d"]
WRITTEN = 3  # conv_state's position in causal_conv1d


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name):
    call = next(call for call in operator_cases.calls() if call.id == name)
    states = call.args[WRITTEN] if call.operator == "causal_conv1d" else None
    differentiable = lambda x: x.is_floating_point() and x is not states  # noqa: E731
    call = call.map(lambda x: x.detach().requires_grad_() if differentiable(x) else x)
    torch.library.opcheck(getattr(torch.ops.gdn, call.operator).default, call.args, call.kwargs)


def test_only_the_weight_may_require_grad():
    x, weight, _, z = norm_inputs(False, True)
    gdn_kernels.layer_norm_gated(x.detach(), weight, None, z.detach(), norm_before_gate=True).sum().backward()
    assert x.grad is None and z.grad is None and weight.grad is not None


def test_a_compiled_training_step_is_one_graph_with_the_eager_gradients():
    def loss(x, weight, z, a, b, A_log, dt_bias):
        g, beta = torch.ops.gdn.gating(a, b, A_log, dt_bias)
        y = torch.ops.gdn.layer_norm_gated(torch.ops.gdn.l2norm(x), weight, None, z, norm_before_gate=True)
        return (y * y).sum() + (g.exp() * beta).sum()

    x, weight, _, z = norm_inputs(False, True, torch.float32, 64)
    inputs = (x, weight, z, *gate_inputs(torch.float32))
    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "recurrent_gated_delta_rule", "causal_conv1d_update"])
def test_what_has_no_backward_says_so(name):
    call = next(call for call in operator_cases.calls() if call.operator == name)
    with pytest.raises(NotImplementedError, match="the operator has no backward"):
        getattr(torch.ops.gdn, name)(call.args[0].detach().requires_grad_(), *call.args[1:], **call.kwargs)
