"""Gradients: of the operators that have a backward, against numbers and against autograd through the reference."""

from __future__ import annotations

from unittest import mock

import operator_cases
import pytest
import torch

import gdn_kernels
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


FORMS = ("column-views", "no-gate", "bias", "gate-first-sigmoid", "empty", "column-view", "16-bit-parameters")
DIFFERENTIABLE = [c.id for c in operator_cases.calls() if c.operator in FORMULAS and c.name in FORMS]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name):
    call = next(call for call in operator_cases.calls() if call.id == name)
    call = call.map(lambda x: x.detach().requires_grad_())
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


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "recurrent_gated_delta_rule", "causal_conv1d"])
def test_what_has_no_backward_says_so(name):
    call = next(call for call in operator_cases.calls() if call.operator == name)
    with pytest.raises(NotImplementedError, match="the operator has no backward"):
        getattr(torch.ops.gdn, name)(call.args[0].detach().requires_grad_(), *call.args[1:], **call.kwargs)
