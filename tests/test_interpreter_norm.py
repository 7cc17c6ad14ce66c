"""The norm kernels in Triton's interpreter, against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, assert_close, column_view, normal, quantised
from token_cases import assert_same_bits

from gdn_kernels import launch
from gdn_kernels.kernels import norm

pytestmark = pytest.mark.interpreter

# Tiles of a few rows and 64 columns: groups of more than 64 columns are walked.
SMALL_TILE = launch.NormConfig(block_rows=2, block_cols=64, num_warps=1)
# Roundings of fp32 on the way: the mean of up to 200 squares, root, quotient, weight, bias, sigmoid and products.
ROUNDINGS = 24


def formula(x, weight, bias, z, norm_before_gate, is_rms_norm=True, eps=1e-6, group_size=None, activation="silu"):
    """fp64 result, and the sum of the absolute values that make it up."""
    x, weight = x.double(), weight.double()
    gate = torch.ones_like(x)
    if z is not None:
        gate = z.double().sigmoid() if activation == "sigmoid" else z.double() * z.double().sigmoid()
    u = x if norm_before_gate else x * gate
    groups = u.unflatten(-1, (-1, group_size or x.shape[-1]))
    mean = 0 if is_rms_norm else groups.mean(-1, keepdim=True)
    scale = ((groups - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = ((groups - mean) * scale).flatten(-2) * weight
    size = ((groups.abs() + abs(mean)) * scale).flatten(-2) * weight.abs()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return (y * gate, size * gate.abs()) if norm_before_gate else (y, size)


def check(x, weight, bias, z, **options):
    y = norm.layer_norm_gated(x, weight, bias, z, **options)
    assert y.dtype == x.dtype and y.is_contiguous()
    expected, size = formula(x, weight, bias, z, **options)
    assert_close(y, expected, ROUNDINGS, size)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm-first", "gate-first"])
def test_norm_matches_the_formula_in_both_gate_orders(norm_before_gate, is_rms_norm, dtype):
    x, z = normal(0, 5, 64, dtype=dtype) + 1, normal(1, 5, 64, dtype=dtype)
    weight, bias = normal(2, 64), normal(3, 64)
    check(x, weight, bias, z, norm_before_gate=norm_before_gate, is_rms_norm=is_rms_norm)


@pytest.mark.parametrize("activation", ["silu", "swish", "sigmoid"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_each_activation_with_and_without_bias(with_bias, activation):
    x, z, weight = normal(0, 3, 48), 4 * normal(1, 3, 48), normal(2, 48, dtype=torch.bfloat16)
    bias = normal(3, 48, dtype=torch.bfloat16) if with_bias else None
    check(x, weight, bias, z, norm_before_gate=True, activation=activation)


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm-first", "gate-first"])
def test_without_z_the_gate_order_does_not_matter(norm_before_gate):
    x, weight = normal(0, 3, 32), normal(1, 32)
    y = check(x, weight, None, None, norm_before_gate=norm_before_gate)
    assert torch.equal(y, norm.layer_norm_gated(x, weight, norm_before_gate=not norm_before_gate))


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm-first", "gate-first"])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("size", [128, 200], ids=["whole-tiles", "ragged-tile"])
def test_a_row_longer_than_a_tile_is_walked(size, is_rms_norm, norm_before_gate):
    x, z = normal(0, 3, size, dtype=torch.float16) + 2, normal(1, 3, size, dtype=torch.float16)
    with launch.pinned("layer_norm_gated", SMALL_TILE):
        check(
            x, normal(2, size), normal(3, size), z, norm_before_gate=norm_before_gate, is_rms_norm=is_rms_norm, eps=1e-5
        )


@pytest.mark.parametrize("group_size", [16, 24, 48, 96], ids=lambda size: f"group-{size}")
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_groups_are_normalised_apart(is_rms_norm, group_size):
    x, z = normal(0, 3, 96) * torch.arange(1, 97), normal(1, 3, 96)
    with launch.pinned("layer_norm_gated", SMALL_TILE):
        check(
            x, normal(2, 96), normal(3, 96), z, norm_before_gate=False, is_rms_norm=is_rms_norm, group_size=group_size
        )


@pytest.mark.parametrize("heads", [1, 3], ids=["one-head", "three-heads"])
@pytest.mark.parametrize("tokens", [1, 5], ids=["one-token", "five-tokens"])
def test_column_views_of_a_wider_matrix_are_read_in_place(tokens, heads):
    x, z = normal(0, tokens, heads, 16), column_view(normal(1, tokens, heads, 16))
    check(x, normal(2, 16), None, z, norm_before_gate=True)
    check(z, normal(2, 16), None, x, norm_before_gate=False)


@pytest.mark.parametrize("offset", [0, 1, 3], ids=lambda offset: f"offset-{offset}")
def test_rows_that_do_not_start_on_16_bytes_are_right(offset):
    x = normal(0, 7, 37, dtype=torch.bfloat16)[:, offset : offset + 32]
    check(x, normal(1, 32), None, x.clone(), norm_before_gate=True)


def test_four_dimensions_collapse_where_strides_allow():
    x, z = normal(0, 2, 3, 4, 16), normal(1, 2, 3, 4, 16)
    check(x, normal(2, 16), None, z, norm_before_gate=True)
    check(x.transpose(0, 1).contiguous().transpose(0, 1)[:, :, :1], normal(2, 16), None, None, norm_before_gate=True)


def test_one_dimension_is_one_row():
    check(normal(0, 32), normal(1, 32), None, normal(2, 32), norm_before_gate=True)


def test_three_separate_row_dimensions_are_refused():
    x = normal(0, 2, 6, 4, 16)[:, ::2].transpose(0, 2)
    with pytest.raises(NotImplementedError, match="at most two row dimensions"):
        norm.layer_norm_gated(x, normal(1, 16), norm_before_gate=True)


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm-first", "gate-first"])
@pytest.mark.parametrize("size", [32, 100], ids=["one-tile", "two-tiles"])
def test_out_may_be_x_itself(size, norm_before_gate):
    x, z, weight = normal(0, 5, size), normal(1, 5, size), normal(2, size)
    with launch.pinned("layer_norm_gated", SMALL_TILE):
        expected = norm.layer_norm_gated(x, weight, None, z, norm_before_gate=norm_before_gate)
        norm.layer_norm_gated_out(x, weight, None, z, x, norm_before_gate=norm_before_gate)
    assert torch.equal(x, expected)


def test_out_is_written_through_its_strides_and_nowhere_else():
    x, z, weight = normal(0, 5, 2, 16), normal(1, 5, 2, 16), normal(2, 16)
    wide = torch.full((5, 64), torch.nan)
    out = wide[:, 8:40].unflatten(1, (2, 16))
    assert norm.layer_norm_gated_out(x, weight, None, z, out, norm_before_gate=True) is None
    assert torch.equal(out, norm.layer_norm_gated(x, weight, None, z, norm_before_gate=True))
    assert wide[:, :8].isnan().all() and wide[:, 40:].isnan().all()


def test_rows_of_nan_leave_their_neighbours_alone():
    x, z = normal(0, 6, 64), normal(1, 6, 64)
    clean = norm.layer_norm_gated(x, normal(2, 64), None, z, norm_before_gate=True)
    x[1::2], z[1::2] = torch.nan, torch.nan
    y = norm.layer_norm_gated(x, normal(2, 64), None, z, norm_before_gate=True)
    assert torch.equal(y[::2], clean[::2])


@pytest.mark.parametrize("shape", [(0, 16), (0, 2, 16), (3, 0, 16)], ids=str)
def test_an_empty_batch_gives_an_empty_result(shape):
    assert norm.layer_norm_gated(torch.empty(shape), normal(0, 16), norm_before_gate=True).shape == shape


def test_a_row_of_zeros_stays_zero():
    y = norm.layer_norm_gated(torch.zeros(2, 32), normal(0, 32), norm_before_gate=True)
    assert torch.equal(y, torch.zeros(2, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 48, 64], ids=lambda size: f"size-{size}")
def test_l2norm_divides_by_the_root_of_the_sum_of_squares(size, dtype):
    x = column_view(normal(0, 5, 3, size, dtype=dtype))
    y = norm.l2norm(x)
    expected = x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, expected, ROUNDINGS)


def test_l2norm_walks_a_long_row():
    x = normal(0, 3, 200)
    with launch.pinned("l2norm", SMALL_TILE):
        y = norm.l2norm(x, eps=1.0)
    assert_close(y, x.double() / (x.double().square().sum(-1, keepdim=True) + 1.0).sqrt(), ROUNDINGS)


def test_l2norm_of_zeros_is_zero():
    assert torch.equal(norm.l2norm(torch.zeros(2, 16)), torch.zeros(2, 16))


# ---------------------------------------------------------------------------------------------------------------
# Quantised
# ---------------------------------------------------------------------------------------------------------------


def check_fp8(*args, **options):
    values, scales = norm.layer_norm_gated_fp8(*args, **options)
    y = norm.layer_norm_gated(*args, **options)
    assert values.is_contiguous() and scales.is_contiguous()
    assert_same_bits([values, scales], list(quantised(y)), "values and scales")
    return values, scales


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm-first", "gate-first"])
def test_fp8_is_the_norm_quantised_after_it(norm_before_gate, is_rms_norm, dtype):
    x, z = column_view(normal(0, 5, 3, 128, dtype=dtype)), column_view(normal(1, 5, 3, 128, dtype=dtype))
    check_fp8(x, normal(2, 128), normal(3, 128), z, norm_before_gate=norm_before_gate, is_rms_norm=is_rms_norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, group", [(256, None), (384, None), (768, 256), (1152, 384)], ids=str)
@pytest.mark.parametrize("block_cols", [128, 256, 512])
def test_fp8_rows_of_several_groups_and_tiles(block_cols, size, group, dtype):
    x, z = 2 + normal(0, 3, size, dtype=dtype), normal(1, 3, size, dtype=dtype)
    with launch.pinned("layer_norm_gated", launch.NormConfig(block_rows=2, block_cols=block_cols, num_warps=1)):
        check_fp8(x, normal(2, size), None, z, norm_before_gate=True, is_rms_norm=False, group_size=group)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30], ids="{:g}".format)
def test_fp8_of_small_and_large_values(scale):
    weight = scale * 2.0 ** torch.linspace(-16, 0, 256).round()
    values, _ = check_fp8(normal(0, 8, 256), weight, norm_before_gate=True)
    assert not values.float().isnan().any()


def test_fp8_of_zeros_and_of_nan():
    x = normal(0, 3, 2, 128)
    x[0, 1], x[2, 0] = 0, torch.nan
    values, scales = norm.layer_norm_gated_fp8(x, torch.ones(128), norm_before_gate=True)
    wanted = quantised(norm.layer_norm_gated(x, torch.ones(128), norm_before_gate=True))
    assert torch.equal(values.double().nan_to_num(9e9), wanted[0].double().nan_to_num(9e9))
    assert torch.equal(scales.nan_to_num(9e9), wanted[1].nan_to_num(9e9))
    assert scales[2, 0].isnan() and values[2, 0].float().isnan().all()
    assert scales[0, 1] == torch.tensor(1e-10) / torch.tensor(448.0) and not values[0, 1].double().any()


@pytest.mark.parametrize("shape", [(0, 128), (0, 2, 128), (3, 0, 128)], ids=str)
def test_fp8_of_an_empty_batch_is_empty(shape):
    values, scales = norm.layer_norm_gated_fp8(torch.empty(shape), normal(0, 128), norm_before_gate=True)
    assert values.shape == shape and scales.shape == (shape[0], 0 if 0 in shape[1:] else len(shape) - 1)
