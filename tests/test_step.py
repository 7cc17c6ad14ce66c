"""The decode step against the separate operators in sequence, bit for bit, on every device, and what it refuses."""

from __future__ import annotations

import pytest
import step_cases
import torch
from token_cases import assert_same_bits

import gdn_kernels
from gdn_kernels import launch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Key and value heads of one rank: Qwen3-Next and Qwen3.5 whole and cut, one and three value heads a key head.
HEADS = [(16, 32), (4, 16), (12, 12), (8, 24)]


def check(case: step_cases.Step, fp8: bool = False) -> None:
    separate = case.clone()
    found = case.run(gdn_kernels, fp8)
    wanted = separate.in_sequence(gdn_kernels, gdn_kernels, gdn_kernels, fp8=fp8)
    assert all(x.is_contiguous() for x in found)
    assert_same_bits([*found, *case.pools], [*wanted, *separate.pools], "the step and the operators in sequence")


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("what", step_cases.VARIANTS)
@pytest.mark.parametrize("device", DEVICES)
def test_variants_have_the_bits_of_the_sequence(device, what, fp8):
    check(step_cases.make(device=device, **{"V": 128, **step_cases.VARIANTS[what]}), fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids="{0[0]}-{0[1]}".format)
def test_models_have_the_bits_of_the_sequence(heads, dtype, state_dtype):
    H, HV = heads
    options = {"H": H, "HV": HV, "K": 128, "V": 128, "dtype": dtype, "state_dtype": state_dtype, "device": "cuda"}
    for rows in (1, 2, 7, 32, 256):
        check(step_cases.make(rows=rows, seed=rows, **options))
    check(step_cases.make(rows=33, layout="time", **options))
    check(step_cases.make(rows=33, **options), fp8=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("V", [64, 128, 256])
def test_head_sizes_have_the_bits_of_the_sequence(K, V, dtype):
    for ratio in (1, 2, 3, 4):
        check(step_cases.make(HV=2 * ratio, K=K, V=V, rows=9, dtype=dtype, state_dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        launch.StepConfig(128, 1, 8),
        launch.StepConfig(64, 1, 8),
        launch.StepConfig(32, 1, 4),
        launch.StepConfig(16, 1, 1),
    ],
    ids=str,
)
def test_every_configuration_has_the_same_bits(config):
    case = step_cases.make(H=4, HV=8, K=128, V=128, rows=9, dtype=torch.bfloat16, device="cuda")
    with launch.pinned("decode_step", config):
        check(case)


@pytest.mark.gpu
def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    case = step_cases.make(H=4, HV=8, K=128, V=128, rows=64, dtype=torch.bfloat16, device="cuda")
    alone = case.clone()
    found = case.run(gdn_kernels)[0]
    per_row = ("mixed_qkv", "a", "b", "z", "state_indices")
    for row in range(64):
        arguments = {name: x[row : row + 1] if name in per_row else x for name, x in alone.arguments.items()}
        one = step_cases.Step(arguments, case.options).run(gdn_kernels)[0]
        assert_same_bits([one], [found[row : row + 1]], f"row {row}")
    assert_same_bits(alone.pools, case.pools, "the pools")


@pytest.mark.parametrize("device", DEVICES)
def test_padding_is_the_norm_of_zeros_and_writes_nothing(device):
    case = step_cases.make(slots=(-1, 99, -7), device=device)
    before = [pool.clone() for pool in case.pools]
    out = case.run(gdn_kernels)[0]
    assert torch.equal(out, torch.zeros_like(out))
    assert_same_bits(case.pools, before, "the pools")
