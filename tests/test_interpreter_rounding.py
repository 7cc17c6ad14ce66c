"""Stochastic rounding in Triton's interpreter: the numbers and the rounding are the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from delta_cases import delta_inputs
from rounding_cases import HARD_VALUES, expected, octets_differ

from gdn_kernels import launch
from gdn_kernels.kernels import decode, recurrent
from gdn_kernels.kernels._math import round_stochastically, rounding_bits
from gdn_kernels.reference import _math

pytestmark = pytest.mark.interpreter

DTYPES = [torch.bfloat16, torch.float16]
SEEDS = [0, 7, -1, 2**31, 0x0123456789ABCDEF, -(2**62)]


@triton.jit
def bits_kernel(seed_ptr, out_ptr, slot, token, first, K: tl.constexpr, ROWS: tl.constexpr):
    rows = first + tl.arange(0, ROWS)
    bits = rounding_bits(tl.load(seed_ptr).to(tl.int64), slot, token, rows, K)
    tl.store(out_ptr + rows[:, None] * K + tl.arange(0, K)[None, :], bits)


@triton.jit
def round_kernel(x_ptr, bits_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, bits = tl.load(x_ptr + at), tl.load(bits_ptr + at)
    tl.store(out_ptr + at, round_stochastically(x, bits, out_ptr.dtype.element_ty))


@pytest.mark.parametrize("seed_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_numbers_are_the_references(seed, seed_dtype):
    if not torch.iinfo(seed_dtype).min <= seed <= torch.iinfo(seed_dtype).max:
        pytest.skip("past int32")
    seeds = torch.tensor([seed], dtype=seed_dtype)
    for K in (64, 128, 256):
        for slot, token in ((0, 0), (5, 1), (2**31 - 1, 15)):
            out = torch.full((16, K), -1, dtype=torch.int32)
            for first in (0, 8):
                bits_kernel[(1,)](seeds, out, slot, token, first, K, 8)
            assert torch.equal(out, _math.draw(seeds, slot, token).bits(out.shape))
            assert octets_differ(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_the_rounding_is_the_references(dtype, bits):
    x = HARD_VALUES[: len(HARD_VALUES) // 64 * 64]
    size = triton.next_power_of_2(len(x))
    x = torch.nn.functional.pad(x, (0, size - len(x)))
    numbers = torch.full_like(x, bits, dtype=torch.int32)
    out = torch.empty_like(x, dtype=dtype)
    round_kernel[(1,)](x, numbers, out, size)
    wanted = _math.round_stochastically(x, numbers, dtype)
    same = (out.view(torch.int16) == wanted.view(torch.int16)) | (out.isnan() & wanted.isnan())
    assert same.all(), x[~same]


# ---------------------------------------------------------------------------------------------------------------
# The operators: what they store is the fp32 state, rounded with the reference's numbers
# ---------------------------------------------------------------------------------------------------------------


def pools(dtype, *lead, K=64, V=64, HV=2):
    """The same numbers as a 16-bit and as an fp32 pool."""
    random = torch.Generator().manual_seed(3)
    narrow = torch.randn(*lead, HV, V, K, generator=random).to(dtype)
    return narrow, narrow.float()


def rows(inputs, count):
    return [x.reshape(count, -1, *x.shape[2:]) for x in inputs.tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_v", [4, 16, 64])
def test_decode_and_the_paged_form_round_with_the_numbers_of_the_slot(dtype, block_v):
    inputs = rows(delta_inputs((2, 2, 2), dtype=torch.float32), 3)
    seed, slots = torch.tensor([99]), torch.tensor([4, -1, 0])
    narrow, exact = pools(dtype, 5)
    before = narrow.clone()
    with launch.pinned("recurrent", launch.RecurrentConfig(block_v, 1)):
        o = recurrent.recurrent_gated_delta_rule_paged(*inputs, narrow, slots, rounding_seed=seed)
        wanted_o = recurrent.recurrent_gated_delta_rule_paged(*inputs, exact, slots)
    assert torch.equal(o, wanted_o)
    for slot in (4, 0):
        assert torch.equal(narrow[slot], expected(exact[slot], dtype, 99, slot, token=1))
        assert not torch.equal(narrow[slot], exact[slot].to(dtype))
    assert torch.equal(narrow[1:4], before[1:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slot_for_each_token_is_rounded_with_its_token(dtype):
    inputs = rows(delta_inputs((3, 3)), 2)
    seed, table = torch.tensor(5, dtype=torch.int32), torch.tensor([[3, 1, 0], [2, -1, 5]])
    narrow, exact = pools(dtype, 6)
    recurrent.recurrent_gated_delta_rule_paged(*inputs, narrow, table, rounding_seed=seed)
    recurrent.recurrent_gated_delta_rule_paged(*inputs, exact, table)
    for row in table.tolist():
        for token, slot in enumerate(row):
            if slot >= 0:
                assert torch.equal(narrow[slot], expected(exact[slot], dtype, 5, slot, token))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_buffer_is_rounded_with_its_rows_and_steps(dtype, tree):
    inputs = rows(delta_inputs((3, 3)), 2)
    _, pool = pools(dtype, 2)
    narrow, exact = pools(dtype, 4, 3)
    options = {"intermediate_indices": torch.tensor([3, 1])}
    if tree:
        # every token follows the slot: what is stored is read by none
        options["parents"] = torch.full((2, 3), -1)
    slots, seed = torch.tensor([1, 0]), torch.tensor([-8])
    recurrent.recurrent_gated_delta_rule_verify(*inputs, pool, narrow, slots, rounding_seed=seed, **options)
    recurrent.recurrent_gated_delta_rule_verify(*inputs, pool, exact, slots, **options)
    for row in (3, 1):
        for step in range(3):
            assert torch.equal(narrow[row, step], expected(exact[row, step], dtype, -8, row, step))


def test_decode_has_the_bits_of_a_verification_of_one_token_with_a_seed():
    HV, K, V = 2, 64, 64
    random = torch.Generator().manual_seed(4)
    mixed, a, b = (torch.randn(2, width, generator=random) for width in (2 * K + HV * V, HV, HV))
    gates = {"A_log": torch.randn(HV, generator=random), "dt_bias": torch.randn(HV, generator=random)}
    narrow, _ = pools(torch.bfloat16, 2)
    pool, kept, seed = narrow.clone(), torch.empty(2, 1, HV, V, K, dtype=torch.bfloat16), torch.tensor([11])
    slots = torch.tensor([0, 1])
    options = {**gates, "rounding_seed": seed}
    o = decode.packed_decode(mixed, a, b, state=narrow, state_indices=slots, num_k_heads=1, **options)
    q, k, v = (x.unflatten(-1, (-1, 64)).unsqueeze(1) for x in mixed.split((K, K, HV * V), dim=-1))
    verified = recurrent.recurrent_gated_delta_rule_verify(
        q, k, v, a.unsqueeze(1), b.unsqueeze(1), pool, kept, slots, use_qk_l2norm=True, **options
    )
    assert torch.equal(o, verified.squeeze(1)) and torch.equal(kept[:, 0], narrow)
