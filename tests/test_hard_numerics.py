"""The numerics that must not break, through the operators, chunked and recurrent, on a CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from delta_cases import HARD, HARD_BUDGETS, REFLECTION, REFLECTION_BUDGETS, assert_close, delta_inputs, oracle

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPERATORS = pytest.mark.parametrize("operator", ["chunk_gated_delta_rule", "recurrent_gated_delta_rule"])


def check(operator, device, dtype, arguments, options, budget):
    inputs = delta_inputs(**arguments, dtype=dtype, device=device)
    options = {"initial_state": inputs.initial_state, **options}
    if device == "cuda":
        # freed memory that is full of NaN: what a kernel leaves unwritten shows
        torch.full((1 << 22,), torch.nan, device=device)
    o, state = getattr(torch.ops.gdn, operator)(*inputs.tensors, cu_seqlens=inputs.cu_seqlens, **options)
    wanted_o, wanted_state = oracle(inputs, **options)
    real = inputs.real_tokens
    assert_close(o[:, :real], wanted_o[:, :real], budget, "o")
    assert_close(state, wanted_state, budget, "state")
    assert torch.equal(o[:, real:], torch.zeros_like(o[:, real:]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HARD_BUDGETS, ids=str)
@pytest.mark.parametrize("name", HARD)
@OPERATORS
def test_hard_numerics_match_fp64(operator, name, dtype, device):
    arguments, options = HARD[name]
    check(operator, device, dtype, arguments, options, HARD_BUDGETS[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", REFLECTION_BUDGETS, ids=str)
@OPERATORS
def test_undamped_reflections_match_fp64(operator, dtype, device):
    check(operator, device, dtype, REFLECTION, {}, REFLECTION_BUDGETS[dtype])
