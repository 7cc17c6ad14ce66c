"""The recurrent kernels, decode and verify, in Triton's interpreter, against the fp64 recurrence and the reference."""

from __future__ import annotations

import pytest
import torch
from delta_cases import assert_close, delta_inputs, oracle

from gdn_kernels.kernels import decode, recurrent
from gdn_kernels.reference import decode as decode_reference
from gdn_kernels.reference import recurrent as reference

pytestmark = pytest.mark.interpreter

# fp32 sums over K = 64 and a few tokens; 16-bit outputs are rounded once.
BUDGETS = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
def test_ragged_sequences_match_the_oracle(dtype):
    inputs = delta_inputs((3, 0, 1, 6), dtype=dtype, padding=2, normalise=False)
    options = {"initial_state": inputs.initial_state, "use_qk_l2norm": True}
    o, state = recurrent.recurrent_gated_delta_rule(*inputs.tensors, cu_seqlens=inputs.cu_seqlens, **options)
    wanted_o, wanted_state = oracle(inputs, **options)
    assert_close(o[:, :10], wanted_o[:, :10], BUDGETS[dtype], "o")
    assert_close(state, wanted_state, BUDGETS[torch.float32], "state")
    assert torch.equal(o[:, 10:], torch.zeros_like(o[:, 10:]))


@pytest.mark.parametrize("gates", ["none", "strong"])
@pytest.mark.parametrize("H, HV, K, V", [(1, 3, 128, 64), (2, 4, 64, 128), (1, 1, 256, 256)])
def test_head_counts_sizes_and_gates(gates, H, HV, K, V):
    inputs = delta_inputs((4,), H=H, HV=HV, K=K, V=V, gates=gates)
    o, state = recurrent.recurrent_gated_delta_rule(*inputs.tensors, initial_state=inputs.initial_state)
    wanted_o, wanted_state = oracle(inputs, initial_state=inputs.initial_state)
    assert_close(o, wanted_o, BUDGETS[torch.float32], "o")
    assert_close(state, wanted_state, BUDGETS[torch.float32], "state")


def rows(inputs, count):
    return [x.reshape(count, -1, *x.shape[2:]) for x in inputs.tensors]


def test_decode_step_in_place_skips_padding():
    inputs = delta_inputs((1, 1, 1, 1))
    pool = torch.randn(5, 2, 64, 64)
    before = pool.clone()
    slots = torch.tensor([3, -1, 7, 0])
    o = recurrent.recurrent_gated_delta_rule_paged(*rows(inputs, 4), pool, slots)
    wanted_pool = before.clone()
    wanted = reference.recurrent_gated_delta_rule_paged(*rows(inputs, 4), wanted_pool, slots)
    assert torch.equal(o[1:3], torch.zeros_like(o[1:3]))
    assert_close(o, wanted.double(), BUDGETS[torch.float32], "o")
    assert_close(pool, wanted_pool.double(), BUDGETS[torch.float32], "pool")
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])


def test_a_fresh_sequence_does_not_see_its_slot():
    inputs = delta_inputs((1, 1))
    pool = torch.full((2, 2, 64, 64), torch.nan)
    fresh = torch.tensor([False, False])
    o = recurrent.recurrent_gated_delta_rule_paged(
        *rows(inputs, 2), pool, torch.tensor([0, 1]), has_initial_state=fresh, write_indices=torch.tensor([1, -1])
    )
    wanted, states = oracle(inputs)
    assert_close(o.flatten(0, 1), wanted[0], BUDGETS[torch.float32], "o")
    assert_close(pool[1], states[0], BUDGETS[torch.float32], "slot 1")
    assert pool[0].isnan().all()


@pytest.mark.parametrize("accepted", [None, [1, 2, 3], [0, 9, -5]], ids=["none", "valid", "garbage"])
def test_a_slot_for_each_token(accepted):
    inputs = delta_inputs((3, 3, 3), dtype=torch.float16)
    pool = torch.randn(10, 2, 64, 64)
    before = pool.clone()
    slots = torch.tensor([[0, 1, 2], [3, 4, -1], [6, 7, 8]], dtype=torch.int32)
    counts = None if accepted is None else torch.tensor(accepted)
    if accepted == [1, 2, 3]:
        counts[1] = 1
    wanted_pool = before.clone()
    o = recurrent.recurrent_gated_delta_rule_paged(*rows(inputs, 3), pool, slots, num_accepted_tokens=counts)
    wanted = reference.recurrent_gated_delta_rule_paged(
        *rows(inputs, 3), wanted_pool, slots, num_accepted_tokens=counts
    )
    assert_close(o, wanted.double(), BUDGETS[torch.float16], "o")
    assert_close(pool, wanted_pool.double(), BUDGETS[torch.float32], "pool")
    if accepted == [0, 9, -5]:
        assert torch.equal(pool, before)
        assert torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_verify_leaves_the_pool_alone_and_keeps_every_state(tree):
    inputs = delta_inputs((4, 4, 4))
    pool = torch.randn(5, 2, 64, 64)
    before = pool.clone()
    kept = torch.full((3, 4, 2, 64, 64), torch.nan)
    wanted_kept = kept.clone()
    options = {
        "intermediate_indices": torch.tensor([2, -1, 0]),
        "parents": torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2], [-1, -1, 99, 2]]) if tree else None,
    }
    slots = torch.tensor([1, 2, 4])
    o = recurrent.recurrent_gated_delta_rule_verify(*rows(inputs, 3), pool, kept, slots, **options)
    wanted = reference.recurrent_gated_delta_rule_verify(
        *rows(inputs, 3), before.clone(), wanted_kept, slots, **options
    )
    assert torch.equal(pool, before)
    assert_close(o, wanted.double(), BUDGETS[torch.float32], "o")
    for row in (0, 2):
        assert_close(kept[row], wanted_kept[row].double(), BUDGETS[torch.float32], f"row {row}")
    assert kept[1].isnan().all()


def decode_inputs(rows=3, H=1, HV=2, K=64, V=64, dtype=torch.float32, state_dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    wide = torch.randn(rows, 2 * H * K + HV * V + 2 * HV + 3, generator=random).to(dtype)
    return {
        "mixed_qkv": wide[:, : 2 * H * K + HV * V],
        "a": wide[:, -2 * HV : -HV],
        "b": wide[:, -HV:],
        "A_log": torch.randn(HV, generator=random),
        "dt_bias": torch.randn(HV, generator=random).to(torch.bfloat16),
        "state": torch.randn(rows + 2, HV, V, K, generator=random).to(state_dtype),
        "num_k_heads": H,
    }


@pytest.mark.parametrize("state_dtype", BUDGETS, ids=str)
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
def test_packed_decode_matches_the_reference(dtype, state_dtype):
    inputs = decode_inputs(dtype=dtype, state_dtype=state_dtype)
    slots = torch.tensor([4, -1, 0])
    wanted_inputs = {**inputs, "state": inputs["state"].clone()}
    o = decode.packed_decode(**inputs, state_indices=slots)
    wanted = decode_reference.packed_decode(**wanted_inputs, state_indices=slots)
    assert_close(o, wanted.double(), BUDGETS[dtype], "o")
    assert_close(inputs["state"], wanted_inputs["state"].double(), BUDGETS[state_dtype], "state")
    assert torch.equal(o[1], torch.zeros_like(o[1]))


@pytest.mark.parametrize("lead", [(), (1,)], ids=["rows", "token-dimension"])
def test_packed_decode_out_has_the_bits_of_packed_decode_and_writes_nothing_else(lead):
    inputs = decode_inputs(dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    slots, again = torch.tensor([4, -1, 0]), {**inputs, "state": inputs["state"].clone()}
    around = torch.full((5, *lead, 2, 64), torch.nan, dtype=torch.bfloat16)
    assert decode.packed_decode_out(**inputs, out=around[1:4], state_indices=slots) is None
    assert torch.equal(around[1:4].view(3, 2, 64), decode.packed_decode(**again, state_indices=slots))
    assert around[[0, 4]].isnan().all() and not around[2].any()
    assert torch.equal(inputs["state"], again["state"])


def test_slot_zero_can_be_the_padding_slot():
    inputs = decode_inputs()
    before = inputs["state"].clone()
    o = decode.packed_decode(**inputs, state_indices=torch.tensor([0, 2, 1]), pad_slot_id=0)
    assert torch.equal(o[0], torch.zeros_like(o[0]))
    assert torch.equal(inputs["state"][0], before[0])
    assert not torch.equal(inputs["state"][2], before[2])


def test_decode_has_the_bits_of_a_verification_of_one_token():
    inputs = decode_inputs()
    state = inputs["state"].clone()
    o = decode.packed_decode(**inputs, state_indices=torch.tensor([0, 1, 2]))
    q, k, v = (x.unflatten(-1, (-1, 64)).unsqueeze(1) for x in inputs["mixed_qkv"].split((64, 64, 128), dim=-1))
    kept = torch.empty(3, 1, 2, 64, 64)
    verified = recurrent.recurrent_gated_delta_rule_verify(
        q,
        k,
        v,
        inputs["a"].unsqueeze(1),
        inputs["b"].unsqueeze(1),
        state,
        kept,
        torch.tensor([0, 1, 2]),
        use_qk_l2norm=True,
        A_log=inputs["A_log"],
        dt_bias=inputs["dt_bias"],
    )
    assert torch.equal(o, verified.squeeze(1))
    assert torch.equal(kept[:, 0], inputs["state"][:3])
