"""Every operator as torch sees it: opcheck, fakes, refused gradients, and agreement with fp64 on a GPU."""

from __future__ import annotations

import operator_cases
import pytest
import torch
from delta_cases import assert_close

import gdn_kernels
from gdn_kernels.ops import OPERATORS

IDS = [call.id for call in operator_cases.calls()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative RMS against fp64 on the same rounded inputs. The results are rounded once to their dtype; the chunk form also
# rounds the operands of its products (prefill.md's budget for bf16 is 5e-3; fp16 has three more bits).
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# e4m3 rounds to 2^-4; where rounding to the activations' dtype before it crosses a tie, two values are a unit apart.
E4M3_ROUNDING = 2**-4
CHUNKED = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def results(call):
    """The results of a call and the tensors it may have written."""
    found = call.run()
    found = found if isinstance(found, (tuple, list)) else () if found is None else (found,)
    return [*found, *(x for x in call.tensors if x.is_floating_point())]


def test_every_operator_has_a_case():
    assert {call.operator for call in operator_cases.calls()} | {"linear_attention_with_output"} == set(OPERATORS)


@pytest.mark.parametrize("name", IDS)
def test_opcheck(name):
    call = operator_cases.call(name)
    torch.library.opcheck(getattr(torch.ops.gdn, call.operator).default, call.args, call.kwargs)


@pytest.mark.parametrize("name", IDS)
def test_no_result_aliases_an_input(name):
    call = operator_cases.call(name)
    found = call.run()
    inputs = {x.untyped_storage().data_ptr() for x in call.tensors if x.numel()}
    for result in found if isinstance(found, (tuple, list)) else [found]:
        assert result is None or not result.numel() or result.untyped_storage().data_ptr() not in inputs


@pytest.mark.parametrize("name", IDS)
def test_autocast_on_a_cpu_changes_nothing(name):
    call, again = operator_cases.call(name), operator_cases.call(name)
    wanted = results(call)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(again)
    for result, expected in zip(found, wanted, strict=True):
        assert result.dtype is expected.dtype
        assert torch.equal(result.double().nan_to_num(), expected.double().nan_to_num())


HAVE_BACKWARD = ("layer_norm_gated", "l2norm", "gating", "causal_conv1d")  # tests/test_autograd.py
REFUSING = [name for name in OPERATORS if name not in ("linear_attention_with_output", *HAVE_BACKWARD)]


@pytest.mark.parametrize("operator", REFUSING)
def test_an_input_that_wants_a_gradient_is_refused(operator):
    call = next(call for call in operator_cases.calls() if call.operator == operator)
    first = call.args[0].detach().requires_grad_()
    before = [x.clone() for x in call.tensors]
    with pytest.raises(NotImplementedError, match="must not require grad"):
        getattr(torch.ops.gdn, operator)(first, *call.args[1:], **call.kwargs)
    for x, old in zip(call.tensors, before, strict=True):
        assert torch.equal(x.nan_to_num(), old.nan_to_num())
    with torch.no_grad():
        getattr(torch.ops.gdn, operator)(first, *call.args[1:], **call.kwargs)


@pytest.mark.parametrize("name", IDS)
def test_the_python_function_is_the_operator(name):
    call, again = operator_cases.call(name), operator_cases.call(name)
    for result, wanted in zip(results(call), results(_through_python(again)), strict=True):
        assert result.dtype is wanted.dtype
        assert torch.equal(result.double().nan_to_num(), wanted.double().nan_to_num())


class _through_python:
    def __init__(self, call):
        self.call, self.tensors = call, call.tensors

    def run(self):
        return getattr(gdn_kernels, self.call.operator)(*self.call.args, **self.call.kwargs)


def check_against_fp64(name, device, dtype):
    call = operator_cases.call(name, device, dtype)
    if call is None:
        pytest.skip("the chunk operators take no fp32 on a GPU")
    exact = call.map(lambda x: x.detach().cpu().double() if x.is_floating_point() else x.cpu())
    found, wanted = results(call), results(exact)
    for index, (result, expected) in enumerate(zip(found, wanted, strict=True)):
        assert result.shape == expected.shape
        if result.dtype is torch.float8_e4m3fn:
            budget, expected = E4M3_ROUNDING, expected.double()
        elif "decode_step" in name:
            # the outputs of conv, recurrence and norm are rounded to the activations' dtype, states to their own
            budget = 3 * max(ROUNDING[dtype], ROUNDING[result.dtype])
        elif "fp8" in name:
            # the scales are of values rounded to the activations' dtype
            budget = ROUNDING[dtype]
        elif "chunk" in name:
            budget = CHUNKED[dtype]
        else:
            # fp32 results of a recurrence with 16-bit inputs: 200 tokens of fp32 rounding
            budget = 1e-5 if result.dtype is torch.float32 else ROUNDING[result.dtype]
        missing = expected.isnan() | expected.isinf()
        assert torch.equal(result.cpu().double()[missing].nan_to_num(), expected[missing].nan_to_num())
        assert_close(
            result.cpu().double().masked_fill(missing, 0), expected.masked_fill(missing, 0), budget, f"{name}[{index}]"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IDS)
def test_results_and_writes_match_fp64_on_a_cpu(name, dtype):
    check_against_fp64(name, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IDS)
def test_results_and_writes_match_fp64_on_a_gpu(name, dtype):
    # freed memory that is full of NaN: what a kernel leaves unwritten shows
    poison = torch.full((1 << 24,), torch.nan, device="cuda")
    del poison
    check_against_fp64(name, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", IDS)
def test_opcheck_on_a_gpu(name):
    call = operator_cases.call(name, "cuda", torch.bfloat16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.gdn, call.operator).default, call.args, call.kwargs, test_utils=tests)
