"""The gating kernel in Triton's interpreter, against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, assert_close, column_view, normal

from gdn_kernels.kernels.gating import gating

pytestmark = pytest.mark.interpreter

# Roundings of fp32 on the way: exp of an argument of up to 25 loses 25 of them, the rest is a dozen operations.
ROUNDINGS = 40


def formula(a, b, A_log, dt_bias, beta_scale=1.0):
    x = a.double() + dt_bias.double()
    softplus = torch.where(x > 20, x, torch.log1p(torch.exp(x)))
    return -A_log.double().exp() * softplus, beta_scale * b.double().sigmoid()


def check(a, b, A_log, dt_bias, **options):
    g, beta = gating(a, b, A_log, dt_bias, **options)
    for result, expected in zip((g, beta), formula(a, b, A_log, dt_bias, **options), strict=True):
        assert result.dtype == torch.float32 and result.is_contiguous() and result.shape == a.shape
        assert_close(result, expected, ROUNDINGS)
    return g, beta


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=lambda dtype: f"A_log-{dtype}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_match_the_formula(dtype, parameters):
    a, b = 3 * normal(0, 5, 16).to(dtype), 3 * normal(1, 5, 16).to(dtype)
    check(a, b, normal(2, 16, dtype=parameters), torch.zeros(16, dtype=parameters))


@pytest.mark.parametrize("heads", [1, 3, 12, 48], ids=lambda heads: f"{heads}-heads")
def test_any_number_of_heads(heads):
    check(normal(0, 3, heads), normal(1, 3, heads), normal(2, heads), torch.zeros(heads))


@pytest.mark.parametrize("shape", [(1, 12), (70, 12), (2, 3, 12), (3, 1, 12)], ids=str)
def test_strided_columns_are_read_in_place(shape):
    a, b = column_view(normal(0, *shape), before=3), column_view(normal(1, *shape), before=7, after=2)
    check(a, b, normal(2, 12), torch.zeros(12))


def test_beta_may_be_scaled():
    _, beta = check(normal(0, 4, 8), 20 * normal(1, 4, 8), normal(2, 8), torch.zeros(8), beta_scale=2.0)
    assert beta.max() > 1.9


def test_softplus_is_accurate_from_the_smallest_to_the_largest_gate():
    # Around 0.5 = exp(-0.693) the formula of log1p changes, at 20 that of softplus.
    a = torch.cat([torch.linspace(-40, 25, 400), torch.tensor([-0.6932, -0.6931, 20.0, 20.01])])[:, None]
    check(a, torch.zeros_like(a), torch.zeros(1), torch.zeros(1))


def test_infinite_gates_give_the_limits():
    a = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30])[:, None]
    g, beta = gating(a, a, torch.zeros(1), torch.zeros(1))
    assert g.flatten().tolist() == [-torch.inf, 0.0, (-a[2]).item(), 0.0]
    assert beta.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (2, 0, 4)], ids=str)
def test_an_empty_batch_gives_empty_gates(shape):
    g, beta = gating(torch.empty(shape), torch.empty(shape), torch.zeros(4), torch.zeros(4))
    assert g.shape == beta.shape == shape


def test_rows_of_nan_leave_their_neighbours_alone():
    a, b, A_log, dt_bias = normal(0, 6, 4), normal(1, 6, 4), normal(2, 4), normal(3, 4)
    clean = gating(a, b, A_log, dt_bias)
    a[1::2], b[1::2] = torch.nan, torch.nan
    for result, expected in zip(gating(a, b, A_log, dt_bias), clean, strict=True):
        assert torch.equal(result[::2], expected[::2])
