"""What engines do to a state pool, as checks of one implementation: the operators, or the kernels in the interpreter.

Each check takes ``ops``, which has the three functions that decode and verify, and a device. Bits are compared with
another call of the same implementation.
"""

from __future__ import annotations

from typing import Any

import torch
from delta_cases import delta_inputs
from token_cases import assert_same_bits

H, HV, K, V = 1, 2, 64, 64
T = 3  # drafts a row
NAN = float("nan")


def rows(count: int, device: str, tokens: int = T, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, g, beta of ``[count, tokens, ...]``."""
    inputs = delta_inputs((count * tokens,), H=H, HV=HV, K=K, V=V, device=device, seed=seed)
    return [x.reshape(count, tokens, *x.shape[2:]).clone() for x in inputs.tensors]


def states(*lead: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*lead, HV, V, K, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def ints(values: Any, device: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def row(inputs: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    return [x[n : n + 1] for x in inputs]


def decode_arguments(count: int, device: str) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(2)
    wide = torch.randn(count, 2 * H * K + HV * V + 2 * HV, generator=random).to(device)
    gates = torch.randn(2, HV, generator=random).to(device)
    width = 2 * H * K + HV * V
    return wide[:, :width], wide[:, width : width + HV], wide[:, width + HV :], *gates


def check_what_others_left_in_memory_does_not_show(ops: Any, device: str) -> None:
    """Slots of nobody, the buffer and padding rows' inputs are NaN; one row in three is padding."""
    slots = ints([4, -1, 0, 99, 2, -7], device)
    owned, padding = [4, 0, 2], [1, 3, 5]

    def check(o: torch.Tensor, *kept: torch.Tensor) -> None:
        assert torch.isfinite(o).all() and o[[0, 2, 4]].any() and not o[padding].any()
        assert all(torch.isfinite(x).all() for x in kept)

    def pool() -> torch.Tensor:
        made = states(6, device=device)
        made[[1, 3, 5]] = NAN
        return made

    arguments = decode_arguments(6, device)
    for x in arguments[:3]:
        x[padding] = NAN
    state = pool()
    check(ops.packed_decode(*arguments, state, slots, num_k_heads=H), state[owned])
    assert state[[1, 3, 5]].isnan().all()
    inputs = rows(6, device)
    for x in inputs:
        x[padding] = NAN
    state = pool()
    check(ops.recurrent_gated_delta_rule_paged(*inputs, state, slots), state[owned])
    assert state[[1, 3, 5]].isnan().all()
    wide = states(18, device=device)
    table = torch.where(slots[:, None] < 0, slots[:, None], slots[:, None] * T + ints([0, 1, 2], device))
    first = table[:, 0].clone()
    wide[[i for i in range(18) if i not in first.tolist()]] = NAN
    check(ops.recurrent_gated_delta_rule_paged(*inputs, wide, table), wide[table[[0, 2, 4]].flatten().long()])
    buffer = torch.full((6, T, HV, V, K), NAN, device=device)
    state, before = pool(), pool()
    check(ops.recurrent_gated_delta_rule_verify(*inputs, state, buffer, slots), buffer[[0, 2, 4]])
    assert buffer[padding].isnan().all()
    assert_same_bits([state], [before], "the pool of a verification")


def check_a_recycled_slot_is_as_good_as_zeros(ops: Any, device: str) -> None:
    """Slots that a sequence left full of NaN and infinities, read with has_initial_state False."""
    inputs, fresh = rows(2, device), torch.tensor([False, True], device=device)
    dirty, clean = states(6, device=device), states(6, device=device)
    dirty[0], clean[0] = NAN, 0
    dirty[0, 0, :, ::3] = torch.inf
    slots, table = ints([0, 3], device), ints([[0, 1, 2], [3, 4, 5]], device)
    for indices in (slots, table):
        pools = dirty.clone(), clean.clone()
        outputs = [
            ops.recurrent_gated_delta_rule_paged(*inputs, pool, indices, has_initial_state=fresh) for pool in pools
        ]
        assert torch.isfinite(outputs[0]).all() and torch.isfinite(pools[0]).all()
        assert_same_bits([outputs[0], pools[0]], [outputs[1], pools[1]], "a recycled slot")
    for parents in (None, ints([[-1, 0, -1], [-1, -1, 1]], device)):
        buffers = states(2, T, device=device), states(2, T, device=device)
        outputs = [
            ops.recurrent_gated_delta_rule_verify(
                *inputs, pool, buffer, slots, parents=parents, has_initial_state=fresh
            )
            for pool, buffer in zip((dirty, clean), buffers, strict=True)
        ]
        assert torch.isfinite(outputs[0]).all()
        assert_same_bits([outputs[0], buffers[0]], [outputs[1], buffers[1]], "a recycled slot, verified")


def check_a_count_of_accepted_tokens_may_be_garbage(ops: Any, device: str) -> None:
    counts = [0, -3, T + 1, 2**31 - 1, 2]
    inputs, table = rows(5, device), ints([[n * T + i for i in range(T)] for n in range(5)], device)
    for dtype in (torch.int32, torch.int64):
        given = ints(counts[:-1] + [2] if dtype is torch.int32 else [0, -(2**40), 2**32 + 1, 2**62, 2], device, dtype)
        pool = states(5 * T, device=device)
        before, alone = pool.clone(), pool.clone()
        o = ops.recurrent_gated_delta_rule_paged(*inputs, pool, table, num_accepted_tokens=given)
        assert not o[:4].any()
        assert_same_bits([pool[: 4 * T]], [before[: 4 * T]], "slots of rows with a garbage count")
        wanted = ops.recurrent_gated_delta_rule_paged(
            *row(inputs, 4), alone, table[4:].contiguous(), num_accepted_tokens=given[4:].clone()
        )
        assert_same_bits([o[4:], pool], [wanted, alone], "the row with a good count")


def check_sequences_may_have_different_numbers_of_drafts(ops: Any, device: str) -> None:
    """Packed drafts of 3, none, 1 and 2 tokens and two tokens of NaN, as a chain and as a tree."""
    lengths, slots, kept_rows = [3, 0, 1, 2], [1, 0, 4, 2], [3, 0, 2, 1]
    inputs = list(delta_inputs(lengths, H=H, HV=HV, K=K, V=V, device=device, padding=2).tensors)
    offsets = ints([0, 3, 3, 4, 6], device)
    pool, trees = states(5, device=device), ints([[-1, 0, 0], [-1, 0, 1], [-1, 0, 1], [-1, -1, 0]], device)
    for parents in (None, trees):
        buffer = states(4, T, device=device, seed=5)
        before = buffer.clone()
        o = ops.recurrent_gated_delta_rule_verify(
            *inputs,
            pool,
            buffer,
            ints(slots, device),
            intermediate_indices=ints(kept_rows, device),
            cu_seqlens=offsets,
            parents=parents,
        )
        assert not o[0, 6:].any()
        for n, (start, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
            kept = kept_rows[n]
            assert_same_bits([buffer[kept, length:]], [before[kept, length:]], f"steps past sequence {n}")
            if length:
                alone = before[kept : kept + 1].clone()
                wanted = ops.recurrent_gated_delta_rule_verify(
                    *(x[:, start : start + length] for x in inputs),
                    pool,
                    alone,
                    ints(slots[n : n + 1], device),
                    parents=None if parents is None else parents[n : n + 1].clone(),
                )
                assert_same_bits([o[:, start : start + length], buffer[kept]], [wanted, alone[0]], f"sequence {n}")


def check_a_rolled_back_token_leaves_no_trace(ops: Any, device: str, seed: torch.Tensor | None) -> None:
    """Of three drafts one is accepted: what the other two were, NaN even, does not show in the next step."""
    dtype = torch.float32 if seed is None else torch.bfloat16
    table = ints([[0, 1, 2], [3, 4, 5]], device)
    slots, accepted = ints([1, 4], device), ints([1, 1], device)
    worlds = []
    for spoiled in (False, True):
        first, then = rows(2, device, seed=3), rows(2, device, seed=4)
        if spoiled:
            for x in first:
                x[:, 1:] = NAN
        pool = states(6, device=device, dtype=dtype)
        o = ops.recurrent_gated_delta_rule_paged(*first, pool, table, rounding_seed=seed)
        next_o = ops.recurrent_gated_delta_rule_paged(
            *then, pool, table, num_accepted_tokens=accepted, rounding_seed=seed
        )
        # verified in a buffer: the accepted state is copied to the slot, then one token is decoded and two verified
        verified, buffer = states(6, device=device, dtype=dtype), states(2, T, device=device, dtype=dtype)
        kept_o = ops.recurrent_gated_delta_rule_verify(*first, verified, buffer, slots, rounding_seed=seed)
        verified[slots.long()] = buffer[:, 0]
        last_o = ops.recurrent_gated_delta_rule_verify(*then, verified, buffer, slots, rounding_seed=seed)
        worlds.append([o[:, :1], next_o, pool, kept_o[:, :1], last_o, verified, buffer])
    assert all(torch.isfinite(x).all() for x in worlds[1])
    assert_same_bits(worlds[1], worlds[0], "rejected tokens of NaN")


CHECKS = {
    "memory": check_what_others_left_in_memory_does_not_show,
    "recycled-slots": check_a_recycled_slot_is_as_good_as_zeros,
    "accepted-counts": check_a_count_of_accepted_tokens_may_be_garbage,
    "draft-lengths": check_sequences_may_have_different_numbers_of_drafts,
    "rolled-back": lambda ops, device: check_a_rolled_back_token_leaves_no_trace(ops, device, None),
    "rolled-back-with-a-seed": lambda ops, device: check_a_rolled_back_token_leaves_no_trace(
        ops, device, torch.tensor([6], device=device)
    ),
}
