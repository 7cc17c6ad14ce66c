"""The quantised norm: the bits of the norm followed by the quantisation, and the architectures that it refuses."""

from __future__ import annotations

import operator_cases
import pytest
import torch
from oracle import quantised
from token_cases import Make, Sizes, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import gdn_kernels
from gdn_kernels import contracts, environment, launch
from gdn_kernels.launch import Target

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CALLS = [call.id for call in operator_cases.calls() if call.operator == "layer_norm_gated_fp8"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def check_bits(args: tuple, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator's results, compared with those of the norm and a quantisation after it."""
    values, scales = gdn_kernels.layer_norm_gated_fp8(*args, **options)
    y = gdn_kernels.layer_norm_gated(*args, **{name: x for name, x in options.items() if name != "quant_group_size"})
    assert values.is_contiguous() and scales.is_contiguous()
    assert_same_bits([values, scales], list(quantised(y)), "values and scales")
    return values, scales


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_are_those_of_the_norm_quantised_after_it(device, name, dtype):
    call = operator_cases.call(name, device, dtype)
    if call.tensors[0].numel():
        check_bits(call.args, **call.kwargs)
    else:
        values, scales = call.run()
        assert values.shape == (0, operator_cases.HV, 128) and scales.shape == (0, operator_cases.HV)


@pytest.mark.parametrize("columns", [128, 256, 384, 1024, 4096, 8192, 20096])
@pytest.mark.parametrize(
    "options",
    [
        {"norm_before_gate": True},
        {"norm_before_gate": True, "is_rms_norm": False},
        {"norm_before_gate": False, "is_rms_norm": False},
    ],
    ids=["rms", "layer", "layer-gate-first"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_row_size_has_the_bits_of_the_norm(device, dtype, options, columns):
    """The sums of both kernels must be taken in one order and rounded alike, whatever is stored."""
    m = Make(Sizes(), device, dtype, columns)
    rows = 67 if device == "cuda" else 3
    args = m.normal(rows, columns), m.normal(columns), m.normal(columns), m.normal(rows, columns)
    check_bits(args, **options)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1.0, 1e4, 1e30], ids="{:g}".format)
@pytest.mark.parametrize("device", DEVICES)
def test_small_and_large_values_have_the_bits_of_the_unfused_form(device, scale):
    m = Make(Sizes(), device, torch.float32, 1)
    x = m.normal(64, 256)
    # columns from tiny to large in one group: subnormal e4m3 values, and ties between two of them
    weight = scale * 2.0 ** torch.linspace(-16, 0, 256, device=device).round()
    values, _ = check_bits((x, weight), norm_before_gate=True)
    assert not values.float().isnan().any()
    check_bits((torch.arange(-64.0, 64.0, device=device).repeat(3, 1), torch.full((128,), scale, device=device)),
               norm_before_gate=True)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_a_group_of_zeros_has_the_least_scale_and_zeros(device):
    x = torch.zeros(3, 2, 256, device=device)
    x[1, 0] = 1.0
    weight = torch.ones(256, device=device)
    weight[128:] = 0
    values, scales = check_bits((x, weight), norm_before_gate=True)
    assert scales.shape == (3, 4)
    least = torch.tensor(1e-10) / torch.tensor(448.0)
    expected = least.expand(3, 4).clone()
    expected[1, 0] = scales[1, 0].cpu()
    assert torch.equal(scales.cpu(), expected) and scales[1, 0] > 1e-4
    assert values.double().count_nonzero() == 128


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_that_is_not_finite_spoils_no_other(device, bad):
    m = Make(Sizes(), device, torch.bfloat16, 2)
    x, weight = m.normal(5, 2, 128), m.normal(128)
    clean = gdn_kernels.layer_norm_gated_fp8(x, weight, norm_before_gate=True)
    x[2, 1, 7] = bad
    values, scales = gdn_kernels.layer_norm_gated_fp8(x, weight, norm_before_gate=True)
    y = gdn_kernels.layer_norm_gated(x, weight, norm_before_gate=True)
    wanted_values, wanted_scales = quantised(y)
    # a NaN's sign may differ
    assert torch.equal(values.float().isnan(), wanted_values.float().isnan())
    assert torch.equal(scales.isnan(), wanted_scales.isnan())
    assert values[2, 1].float().isnan().any()
    values[2, 1], scales[2, 1] = clean[0][2, 1], clean[1][2, 1]
    assert_same_bits([values, scales], list(clean), "the other rows")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, fraction_bits, exponent", [(torch.bfloat16, 7, 0), (torch.float16, 10, 10)], ids=str)
def test_every_quotient_of_16_bit_numbers_is_rounded_as_by_a_division(dtype, fraction_bits, exponent):
    """The kernel divides by a reciprocal and a correction: tried for every mantissa of the largest value of a group,
    and every value under it that does not become zero. A power of two in both changes no bit of a quotient."""
    mantissas = 1 + torch.arange(2**fraction_bits, device="cuda", dtype=torch.float64) / 2**fraction_bits
    under = torch.cat([mantissas * 2.0 ** (exponent - power) for power in range(20)]).to(dtype)
    under = torch.nn.functional.pad(under, (0, -len(under) % 127)).view(-1, 127)
    for largest in (mantissas * 2.0**exponent).to(dtype):
        # groups of the largest value and 127 others; a row of ones has the norm 1, so the weight is what is quantised
        groups = under.where(under <= largest, 0.0)
        weight = torch.cat([largest.expand(len(groups), 1), groups], 1).flatten()
        check_bits((torch.ones(1, len(weight), device="cuda", dtype=dtype), weight), norm_before_gate=True, eps=0.0)


def test_values_times_scales_are_the_norm():
    m = Make(Sizes(), "cpu", torch.float32, 3)
    x, weight, z = m.normal(9, 4, 128), m.normal(128), m.normal(9, 4, 128)
    values, scales = gdn_kernels.layer_norm_gated_fp8(x, weight, None, z, norm_before_gate=True)
    y = gdn_kernels.layer_norm_gated(x.double(), weight.double(), None, z.double(), norm_before_gate=True)
    assert values.dtype is torch.float8_e4m3fn and scales.dtype is torch.float32
    # half a unit of three mantissa bits, or of the smallest subnormal, 2^-9; 1e-6 for the norm in fp32
    budget = y.abs() * (2**-4 + 1e-6) + scales[..., None].double() * 2**-10
    assert ((values.double() * scales[..., None] - y).abs() <= budget).all()


# ---------------------------------------------------------------------------------------------------------------
# Architectures
# ---------------------------------------------------------------------------------------------------------------


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    "target, text",
    [
        (Target("cuda", 80), "cuda 80"),
        (Target("cuda", 86), "cuda 86"),
        (Target("hip", "gfx90a"), "hip gfx90a"),
        (Target("hip", "gfx942"), "hip gfx942"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_architecture_without_e4m3_is_refused(target, text):
    assert not launch.has_fp8(target)
    message = f"^layer_norm_gated_fp8 must run on an architecture with e4m3, got {text}$"
    with launch.compile_only(target), pytest.raises(RuntimeError, match=message):
        contracts.layer_norm_gated_fp8(ones(4, 128), ones(128), norm_before_gate=True)
    with launch.compile_only(target):  # which warms up all the same
        launch._warmups["layer_norm_gated_fp8"](launch.ModelShapes(1, 2), torch.device("cpu"))


@pytest.mark.parametrize(
    "target",
    [*(Target("cuda", arch) for arch in (89, 90, 100, 103, 120)), Target("hip", "gfx950"), Target("interpreter", 0)],
    ids=lambda target: f"{target.backend}-{target.arch}",
)
def test_an_architecture_with_e4m3_is_accepted(target):
    assert launch.has_fp8(target)
    with launch.compile_only(target):
        contracts.layer_norm_gated_fp8(ones(4, 128), ones(128), norm_before_gate=True)


def test_fakes_of_a_gpu_need_no_gpu():
    with FakeTensorMode():
        try:
            x, weight = torch.empty(4, 6, 128, device="cuda"), torch.empty(128, device="cuda")
        except (AssertionError, RuntimeError) as error:
            pytest.skip(f"this torch makes no fake tensor for a GPU it has not: {error}")
        values, scales = torch.ops.gdn.layer_norm_gated_fp8(x, weight, norm_before_gate=True)
    assert (values.shape, values.dtype, values.stride()) == (x.shape, torch.float8_e4m3fn, x.stride())
    assert (scales.shape, scales.dtype, scales.stride()) == ((4, 6), torch.float32, (6, 1))
    assert values.device == scales.device == x.device


def test_the_report_says_which_gpu_has_no_e4m3():
    with launch.compile_only(Target("cuda", 80)):
        found = environment.implementation("layer_norm_gated_fp8", torch.device("cuda"))
        assert found == {"implementation": "none", "why": "cuda 80 has no e4m3"}
        assert environment.implementation("layer_norm_gated", torch.device("cuda"))["implementation"] == "triton"


def test_warmup_leaves_out_head_sizes_that_are_refused():
    launch._warmups["layer_norm_gated_fp8"](launch.ModelShapes(1, 2, 64, 64), torch.device("cpu"))
