"""The chunk kernels in Triton's interpreter, against the fp64 recurrence."""

from __future__ import annotations

import pytest
import torch
from delta_cases import (
    HARD,
    HARD_BUDGETS,
    REFLECTION,
    REFLECTION_BUDGETS,
    assert_close,
    delta_inputs,
    oracle,
)

from gdn_kernels import launch
from gdn_kernels.kernels import chunk

pytestmark = pytest.mark.interpreter

# One value head a program of the preparation, and several; the scan does not depend on it.
PAIRS = {
    "alone": (launch.PrepConfig(1, 1, 4), launch.ScanConfig(32, 4, 2)),
    "shared": (launch.PrepConfig(4, 4, 4), launch.ScanConfig(64, 4, 3)),
}


@pytest.fixture(autouse=True, params=PAIRS)
def pair(request):
    """Every test runs with either pair."""
    preparation, scan = PAIRS[request.param]
    with launch.pinned("chunk_prep", preparation), launch.pinned("chunk_scan", scan):
        yield request.param


# fp32 products and sums over at most 130 tokens; the states grow by rounding of each chunk's inverse.
FP32_BUDGET = 5e-6
# Operands of every product are rounded to 11 (8) bits; the errors of a row of products are independent.
BUDGETS = {torch.float32: FP32_BUDGET, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def run(inputs, **options):
    return chunk.chunk_gated_delta_rule(*inputs.tensors, cu_seqlens=inputs.cu_seqlens, **options)


def check(inputs, dtype=torch.float32, budget=None, initial_state=None, **options):
    budget = BUDGETS[dtype] if budget is None else budget
    o, state = run(inputs, initial_state=initial_state, **options)
    wanted_o, wanted_state = oracle(inputs, initial_state=initial_state, **options)
    assert_close(o[:, : inputs.real_tokens], wanted_o[:, : inputs.real_tokens], budget, "o")
    assert_close(state, wanted_state, budget, "state")
    assert torch.equal(o[:, inputs.real_tokens :], torch.zeros_like(o[:, inputs.real_tokens :]))


@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
def test_ragged_sequences_match_the_recurrence(dtype):
    inputs = delta_inputs((65, 0, 1, 63, 64, 130), dtype=dtype, padding=7)
    check(inputs, dtype, initial_state=inputs.initial_state)


@pytest.mark.parametrize("H, HV", [(1, 1), (1, 3), (2, 4), (1, 4)], ids=["1x", "3x", "2x", "4x"])
def test_value_heads_share_key_heads(H, HV):
    check(delta_inputs((70,), H=H, HV=HV))


@pytest.mark.parametrize("K, V", [(64, 128), (128, 64), (256, 256)])
def test_head_sizes(K, V):
    inputs = delta_inputs((66,), HV=1, K=K, V=V)
    check(inputs, initial_state=inputs.initial_state)


def test_l2norm_folds_in():
    check(delta_inputs((70, 3), normalise=False), use_qk_l2norm=True)


def test_all_zero_keys_with_l2norm():
    check(delta_inputs((70,), keys="zero"), use_qk_l2norm=True)


def test_raw_gates_are_gated_inside():
    inputs = delta_inputs((70, 5))
    parameter = {"A_log": torch.tensor([0.3, -1.0]), "dt_bias": torch.tensor([0.5, -0.5])}
    check(inputs, beta_scale=2.0, **parameter)


@pytest.mark.parametrize("keys", ["positive", "identical"])
@pytest.mark.parametrize("beta", [0.0, 1.0, None], ids=["beta-0", "beta-1", "beta-random"])
def test_correlated_keys(keys, beta):
    check(delta_inputs((130,), keys=keys, beta_value=beta), initial_state=None)


def test_identical_keys_with_beta_near_two():
    inputs = delta_inputs((64,), keys="identical", beta_value=1.98, gates="none")
    o, state = run(inputs)
    wanted_o, wanted_state = oracle(inputs)
    # each token reflects the state: 64 reflections of rounding errors, none of them damped
    assert_close(o, wanted_o, 1e-4, "o")
    assert_close(state, wanted_state, 1e-4, "state")


@pytest.mark.parametrize("gates", ["none", "strong"])
def test_gates_without_decay_and_with_minus_infinity(gates):
    inputs = delta_inputs((130, 3), gates=gates)
    check(inputs, initial_state=inputs.initial_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HARD)
def test_hard_numerics_with_16_bit_operands(name, dtype):
    arguments, options = HARD[name]
    inputs = delta_inputs(**arguments, dtype=dtype)
    check(inputs, dtype, HARD_BUDGETS[dtype], initial_state=inputs.initial_state, **options)


@pytest.mark.parametrize("dtype", REFLECTION_BUDGETS, ids=str)
def test_reflections_with_16_bit_operands(dtype):
    inputs = delta_inputs(**REFLECTION, dtype=dtype)
    check(inputs, dtype, REFLECTION_BUDGETS[dtype], initial_state=inputs.initial_state)


def test_equal_lengths_in_a_batch_match_the_packed_form():
    packed = delta_inputs((70, 70), padding=0)
    batched = [x.reshape(2, 70, *x.shape[2:]) for x in packed.tensors]
    o, state = chunk.chunk_gated_delta_rule(*batched, initial_state=packed.initial_state)
    packed_o, packed_state = run(packed, initial_state=packed.initial_state)
    assert torch.equal(o.flatten(0, 1), packed_o[0])
    assert torch.equal(state, packed_state)


def test_rows_that_do_not_start_on_16_bytes():
    inputs = delta_inputs((70, 3))
    for name in ("q", "k", "v"):
        x = getattr(inputs, name)
        wide = torch.full((*x.shape[:2], x[0, 0].numel() + 1), torch.nan)
        wide[..., 1:] = x.flatten(2)
        setattr(inputs, name, wide[..., 1:].view(x.shape))
    check(inputs, initial_state=inputs.initial_state)


def test_no_tokens_and_no_sequences():
    inputs = delta_inputs((0, 0))
    o, state = run(inputs, initial_state=inputs.initial_state)
    assert o.shape == (1, 0, 2, 64)
    assert torch.equal(state, inputs.initial_state)
    nothing = delta_inputs((), padding=3)
    o, state = run(nothing)
    assert state.shape[0] == 0
    assert torch.equal(o, torch.zeros_like(o))


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch():
    lengths = (33, 70, 64)
    inputs = delta_inputs(lengths)
    o, state = run(inputs, initial_state=inputs.initial_state)
    for n, start in enumerate((0, 33, 103)):
        part = slice(start, start + lengths[n])
        alone_o, alone_state = chunk.chunk_gated_delta_rule(
            *(x[:, part] for x in inputs.tensors), initial_state=inputs.initial_state[n : n + 1]
        )
        assert torch.equal(o[:, part], alone_o)
        assert torch.equal(state[n : n + 1], alone_state)


def paged(inputs, pool, indices, **options):
    out = torch.full_like(inputs.v, torch.nan)
    chunk.chunk_gated_delta_rule_paged(
        *inputs.tensors, pool, out, torch.tensor(indices, dtype=torch.int32), inputs.cu_seqlens, **options
    )
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_pool_is_read_and_written_in_place(dtype):
    inputs = delta_inputs((65, 3, 0, 7), padding=2)
    wide = torch.full((6, 2 * 64 * 64 + 32), torch.nan).to(dtype)
    pool = wide[:, :-32].view(6, 2, 64, 64)
    indices = [4, -1, 1, 2]
    for slot, state in zip(indices, inputs.initial_state, strict=True):
        if slot >= 0:
            pool[slot] = state.to(dtype)
    before = wide.clone()
    fresh = torch.tensor([True, True, True, False])
    out = paged(inputs, pool, indices, has_initial_state=fresh)

    initial = torch.stack([before[4, :-32].view(2, 64, 64), *torch.zeros(3, 2, 64, 64).to(dtype)]).float()
    wanted_o, wanted_state = oracle(inputs, initial_state=initial)
    wanted_o[:, 65:68] = 0
    assert_close(out[:, :75], wanted_o[:, :75], BUDGETS[torch.float32], "o")
    assert torch.equal(out[:, 75:], torch.zeros_like(out[:, 75:]))
    rounding = {torch.float32: FP32_BUDGET, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert_close(pool[4], wanted_state[0], rounding, "slot 4")
    assert_close(pool[2], wanted_state[3], rounding, "slot 2")
    # the empty sequence's slot, the slots of nobody and the padding between slots keep their bits
    untouched = [0, 1, 3, 5]
    assert torch.equal(wide[untouched].view(torch.uint8), before[untouched].view(torch.uint8))
    assert torch.equal(wide[:, -32:].contiguous().view(torch.uint8), before[:, -32:].contiguous().view(torch.uint8))


def test_state_is_written_to_a_slot_of_its_own():
    inputs = delta_inputs((5, 66, 4))
    pool = torch.zeros(6, 2, 64, 64)
    pool[:3] = inputs.initial_state
    before = pool.clone()
    paged(inputs, pool, [0, 1, 2], write_indices=torch.tensor([3, 9, 5]))
    _, wanted = oracle(inputs, initial_state=inputs.initial_state)
    assert_close(pool[3], wanted[0], FP32_BUDGET, "slot 3")
    assert_close(pool[5], wanted[2], FP32_BUDGET, "slot 5")
    assert torch.equal(pool[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


def test_checkpoints_hold_the_states_along_the_way():
    inputs = delta_inputs((200, 64, 63))
    pool = torch.zeros(3, 2, 64, 64)
    checkpoints = torch.full((5, 2, 64, 64), torch.nan)
    out = torch.empty_like(inputs.v)
    chunk.chunk_gated_delta_rule_paged_checkpoints(
        *inputs.tensors,
        pool,
        out,
        checkpoints,
        torch.arange(3, dtype=torch.int32),
        inputs.cu_seqlens,
        torch.tensor([0, 3, 4, 5], dtype=torch.int32),
        checkpoint_interval=64,
    )
    for row, (start, tokens) in enumerate([(0, 64), (0, 128), (0, 192), (200, 64)]):
        part = [x[:, start : start + tokens] for x in inputs.tensors]
        _, wanted = chunk.chunk_gated_delta_rule(*part)
        assert torch.equal(checkpoints[row], wanted[0])
    assert checkpoints[4].isnan().all()
