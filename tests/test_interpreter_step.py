"""The decode step in Triton's interpreter: the bits of the separate kernels, and near the fp64 reference."""

from __future__ import annotations

import pytest
import step_cases
import torch
from delta_cases import assert_close
from token_cases import assert_same_bits

from gdn_kernels import launch
from gdn_kernels.kernels import conv, decode, norm, step
from gdn_kernels.reference import step as reference

pytestmark = pytest.mark.interpreter

# Three roundings to the output's dtype: of conv, recurrence and norm.
BUDGETS = {torch.float32: 5e-6, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-8}
STATES = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
KERNELS = (conv, decode, norm)


def check(case: step_cases.Step, fp8: bool = False) -> None:
    """Output and both pools of the kernel: those of the separate kernels, and near the reference in fp64."""
    separate, oracle, dtype = case.clone(), case.double(), case.mixed_qkv.dtype
    found, wanted = case.run(step, fp8), separate.in_sequence(*KERNELS, fp8=fp8)
    assert_same_bits([*found, *case.pools], [*wanted, *separate.pools], "the step and the separate kernels")
    exact = oracle.run(reference)[0]
    if not fp8:
        assert_close(found[0], exact, BUDGETS[dtype], "out")
    assert_close(case.state, oracle.state, max(BUDGETS[dtype], STATES[case.state.dtype]), "state")


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
def test_every_dtype(dtype, state_dtype):
    check(step_cases.make(dtype=dtype, state_dtype=state_dtype))


@pytest.mark.parametrize(
    "ratio, K, V",
    [
        *((ratio, 64, 64) for ratio in (1, 2, 3, 4)),
        *((3, K, V) for K, V in ((64, 128), (128, 64), (128, 128), (256, 64), (64, 256))),
    ],
)
def test_head_sizes_and_ratios(ratio, K, V):
    check(step_cases.make(H=1, HV=ratio, K=K, V=V, rows=2))


@pytest.mark.parametrize("what", step_cases.VARIANTS)
def test_variants(what):
    check(step_cases.make(**step_cases.VARIANTS[what]))


def test_a_state_in_row_blocks():
    with launch.pinned("decode_step", launch.StepConfig(block_v=16, ahead=1, num_warps=4)):
        check(step_cases.make(K=64, V=64, HV=6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_e4m3(dtype):
    check(step_cases.make(dtype=dtype, V=128), fp8=True)


def test_padding_rows_leave_the_pools_alone():
    case = step_cases.make(slots=(-1, 99, -7))
    case.mixed_qkv.fill_(torch.nan)
    before = [pool.clone() for pool in case.pools]
    out = case.run(step)[0]
    assert torch.equal(out, torch.zeros_like(out))
    assert_same_bits(case.pools, before, "the pools")
