"""The reference operators against independent formulas, in fp64 where that is possible, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gdn_kernels.reference import chunk, conv, decode, gating, norm, recurrent, split

F64 = torch.float64
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest magnitude wanted."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))


def offsets(lengths, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


def delta(T, H=1, HV=1, K=64, V=64, B=1, dtype=F64):
    q, k = F.normalize(torch.randn(2, B, T, H, K, dtype=F64), dim=-1)
    v = torch.randn(B, T, HV, V, dtype=F64)
    g, beta = -torch.rand(B, T, HV, dtype=F64), torch.rand(B, T, HV, dtype=F64)
    gate_dtype = F64 if dtype == F64 else torch.float32
    return q.to(dtype), k.to(dtype), v.to(dtype), g.to(gate_dtype), beta.to(gate_dtype)


def take(inputs, start, end):
    return tuple(x[:, start:end] for x in inputs)


def padded_pool(slots, *shape, dtype=torch.float32, pad=24):
    """(whole buffer, view [slots, *shape] with a padded slot stride); every element is NaN."""
    size = math.prod(shape)
    buffer = torch.full((slots, size + pad), torch.nan, dtype=dtype)
    return buffer, buffer[:, :size].unflatten(1, shape)


def assert_only_changed(buffer, before, slots):
    kept = [i for i in range(len(buffer)) if i not in slots]
    assert same_bits(buffer[kept], before[kept])


# ---------------------------------------------------------------------------------------------------------------
# Delta rule: chunked against token by token
# ---------------------------------------------------------------------------------------------------------------


def assert_chunk_matches_recurrent(inputs, bound=1e-10, **options):
    o, S = chunk.chunk_gated_delta_rule(*inputs, **options)
    oracle_o, oracle_S = recurrent.recurrent_gated_delta_rule(*inputs, **options)
    assert torch.isfinite(o).all() and torch.isfinite(S).all()
    assert error(o, oracle_o) < bound
    assert error(S, oracle_S) < bound


@pytest.mark.parametrize("H, HV", [(1, 1), (2, 2), (2, 4), (2, 6), (3, 12)])
def test_recurrent_is_the_equation_with_consecutive_value_heads_on_one_key_head(H, HV):
    q, k, v, g, beta = delta(3, H, HV, K=64, V=128)
    o, S = recurrent.recurrent_gated_delta_rule(q, k, v, g, beta, scale=0.5)
    dots = 4  # of 64 terms, one after the other, each with the textbook bound of terms times unit roundoff
    for hv in range(HV):
        h = hv * H // HV
        state = torch.zeros(128, 64, dtype=F64)
        for i in range(3):
            state = state * g[0, i, hv].exp()
            state = state + beta[0, i, hv] * torch.outer(v[0, i, hv] - state @ k[0, i, h], k[0, i, h])
            difference = (o[0, i, hv] - 0.5 * state @ q[0, i, h]).abs()
            assert (difference <= dots * 64 * 2.0**-53 * 0.5 * (state.abs() @ q[0, i, h].abs()).max()).all()
        assert error(S[0, hv], state) < dots * 64 * 2.0**-53


@pytest.mark.parametrize("with_state", [False, True], ids=["from-zeros", "from-a-state"])
def test_chunk_matches_recurrent_at_every_length_up_to_130(with_state):
    lengths = list(range(131))
    inputs = delta(sum(lengths) + 5)
    initial = torch.randn(131, 1, 64, 64, dtype=F64) if with_state else None
    assert_chunk_matches_recurrent(inputs, cu_seqlens=offsets(lengths), initial_state=initial)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 256), (64, 256), (256, 64)])
def test_chunk_matches_recurrent_for_head_sizes_and_ratios(ratio, K, V):
    assert_chunk_matches_recurrent(delta(70, 2, 2 * ratio, K, V, B=2 if K == 64 else 1))


def test_chunk_matches_recurrent_over_several_blocks():
    assert_chunk_matches_recurrent(delta(64 * (chunk.BLOCK + 2) + 5))


def test_chunk_matches_recurrent_with_raw_gates_and_l2norm():
    q, k, v, _, _ = delta(150, 2, 6)
    a, b = torch.randn(2, 1, 150, 6, dtype=F64) * 3
    a[0, 0] = 30  # above the softplus threshold
    A_log, dt_bias = torch.randn(2, 6, dtype=F64)
    raw = {"A_log": A_log, "dt_bias": dt_bias, "beta_scale": 2.0, "use_qk_l2norm": True, "scale": 0.3}
    assert_chunk_matches_recurrent((3 * q, 5 * k, v, a, b), **raw)
    # and the raw form is the composition of gating, l2norm and the plain form
    g, beta = gating.gating(a, b, A_log, dt_bias, beta_scale=2.0)
    o, S = chunk.chunk_gated_delta_rule(3 * q, 5 * k, v, a, b, **raw)
    o2, S2 = chunk.chunk_gated_delta_rule(norm.l2norm(3 * q), norm.l2norm(5 * k), v, g, beta, scale=0.3)
    assert same_bits(o, o2) and same_bits(S, S2)


HARD = {
    "all-gates-minus-inf": lambda q, k, v, g, beta: (q, k, v, g - torch.inf, beta),
    "some-gates-minus-inf": lambda q, k, v, g, beta: (
        q,
        k,
        v,
        g.masked_fill(torch.rand_like(g) < 0.1, -torch.inf),
        beta,
    ),
    "no-decay": lambda q, k, v, g, beta: (q, k, v, 0 * g, beta),
    "strong-gates": lambda q, k, v, g, beta: (q, k, v, 40 * g, beta),
    "beta-0": lambda q, k, v, g, beta: (q, k, v, g, 0 * beta),
    "beta-1": lambda q, k, v, g, beta: (q, k, v, g, 0 * beta + 1),
    "zero-k": lambda q, k, v, g, beta: (q, 0 * k, v, g, beta),
    "zero-q-and-k": lambda q, k, v, g, beta: (0 * q, 0 * k, v, g, beta),
    "identical-keys": lambda q, k, v, g, beta: (q, k[:, :1].expand_as(k), v, 0 * g, 0 * beta + 1),
    "identical-keys-beta-2": lambda q, k, v, g, beta: (q, k[:, :1].expand_as(k), v, 0 * g, 0 * beta + 2),
}


@pytest.mark.parametrize("l2norm", [False, True], ids=["as-given", "l2norm"])
@pytest.mark.parametrize("case", HARD)
def test_hard_numerics_hold(case, l2norm):
    inputs = HARD[case](*delta(150, 1, 2))
    initial = torch.randn(1, 2, 64, 64, dtype=F64)
    assert_chunk_matches_recurrent(inputs, use_qk_l2norm=l2norm, initial_state=initial)
    # fp32: 150 tokens, each with dot products of 64 terms, on keys of norm 1
    single = tuple(x.float() for x in inputs)
    o, S = chunk.chunk_gated_delta_rule(*single, use_qk_l2norm=l2norm, initial_state=initial)
    want = recurrent.recurrent_gated_delta_rule(
        *(x.double() for x in single), use_qk_l2norm=l2norm, initial_state=initial
    )
    budget = 150 * 64 * UNIT_ROUNDOFF[torch.float32]
    assert error(o, want[0]) < budget and error(S, want[1]) < budget


def test_no_tokens_and_no_sequences_work():
    for form in (chunk.chunk_gated_delta_rule, recurrent.recurrent_gated_delta_rule):
        o, S = form(*delta(0, 2, 4))
        assert o.shape == (1, 0, 4, 64) and not S.any() and S.shape == (1, 4, 64, 64)
        o, S = form(*delta(3, 2, 4), cu_seqlens=offsets([]))
        assert not o.any() and S.shape == (0, 4, 64, 64)


@pytest.mark.parametrize("form", [chunk.chunk_gated_delta_rule, recurrent.recurrent_gated_delta_rule])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_in_lower_precision_is_within_budget(form, dtype):
    T, K = 200, 128
    inputs = delta(T, 2, 4, K, K, dtype=dtype)
    o, S = form(*inputs, use_qk_l2norm=True)
    want_o, want_S = recurrent.recurrent_gated_delta_rule(*(x.double() for x in inputs), use_qk_l2norm=True)
    assert o.dtype == dtype and S.dtype == torch.float32
    # dot products of K terms and of a chunk's 64, three in a row; decay keeps older tokens' errors from adding up
    budget = 3 * (K + chunk.CHUNK) * UNIT_ROUNDOFF[torch.float32]
    assert error(S, want_S) < budget
    assert error(o, want_o) < budget + (UNIT_ROUNDOFF[dtype] if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("form", [chunk.chunk_gated_delta_rule, recurrent.recurrent_gated_delta_rule])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(form, dtype, threads):
    lengths = [1, 65, 0, 33, 128]
    inputs = delta(sum(lengths), 2, 6, dtype=dtype)
    A_log, dt_bias = torch.randn(2, 6)
    initial = torch.randn(5, 6, 64, 64)
    options = {"A_log": A_log, "dt_bias": dt_bias, "use_qk_l2norm": True}
    o, S = form(*inputs, cu_seqlens=offsets(lengths, torch.int64), initial_state=initial, **options)
    for n, end in enumerate(torch.tensor(lengths).cumsum(0).tolist()):
        part = take(inputs, end - lengths[n], end)
        alone_o, alone_S = form(*part, initial_state=initial[n : n + 1], **options)
        assert same_bits(alone_o, o[:, end - lengths[n] : end]) and same_bits(alone_S[0], S[n])


def test_strided_inputs_give_the_same_bits():
    inputs = delta(70, 2, 4, dtype=torch.float32)
    wide = [torch.cat([x, x], 2)[:, :, : x.shape[2]] for x in inputs]
    for form in (chunk.chunk_gated_delta_rule, recurrent.recurrent_gated_delta_rule):
        for got, want in zip(form(*wide), form(*inputs), strict=True):
            assert same_bits(got, want) and got.is_contiguous()


# ---------------------------------------------------------------------------------------------------------------
# Delta rule on a pool
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=["fp32-pool", "bf16-pool"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_chunk_paged_equals_the_functional_form(pool_dtype, index_dtype):
    # sequence: 0 own slot, 1 padding full of NaN, 2 recycled slot holding NaN, 3 empty, 4 other write slot, 5 no write
    lengths, reads, writes = [70, 9, 64, 0, 130, 3], [2, -1, 0, 4, 5, 6], [2, 1, 0, 4, 3, -1]
    keep = torch.tensor([True, True, False, True, True, True])
    T = sum(lengths) + 7
    inputs = delta(T, 2, 6, dtype=torch.float32)
    for x in inputs:
        x[:, 70:79] = torch.nan
        x[:, T - 7 :] = torch.nan
    buffer, pool = padded_pool(8, 6, 64, 64, dtype=pool_dtype)
    for slot in (2, 4, 5, 6):
        pool[slot] = torch.randn(6, 64, 64)
    before = buffer.clone()
    out_wide = torch.full((1, T, 6, 96), torch.nan)
    out = out_wide[..., :64]
    cu = offsets(lengths, index_dtype)
    indices = {"write_indices": torch.tensor(writes, dtype=index_dtype), "has_initial_state": keep}
    chunk.chunk_gated_delta_rule_paged(*inputs, pool, out, torch.tensor(reads, dtype=index_dtype), cu, **indices)

    old = before[:, : 6 * 64 * 64].unflatten(1, (6, 64, 64))
    for n, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        if reads[n] < 0 or start == end:
            assert not out[:, start:end].any()
            continue
        initial = old[reads[n], None].float() if keep[n] else None
        o, S = chunk.chunk_gated_delta_rule(*take(inputs, start, end), initial_state=initial)
        assert same_bits(out[:, start:end], o)
        if writes[n] >= 0:
            assert same_bits(pool[writes[n]], S[0].to(pool_dtype))
    assert not out[:, T - 7 :].any()
    assert out_wide[..., 64:].isnan().all() and buffer[:, 6 * 64 * 64 :].isnan().all()
    assert_only_changed(buffer, before, {2, 0, 3})


def test_checkpoints_are_the_states_of_prefixes():
    lengths, interval = [200, 0, 256, 127], 128
    inputs = delta(sum(lengths), 1, 3, dtype=torch.float32)
    pool, out = torch.randn(4, 3, 64, 64), torch.empty(1, sum(lengths), 3, 64)
    initial = pool.clone()
    # the first sequence has room for two but one multiple of 128; the third has two multiples but room for one
    checkpoint_offsets = torch.tensor([1, 3, 3, 4, 5])
    checkpoints = torch.full((6, 3, 64, 64), torch.nan)
    cu, slots = offsets(lengths), torch.arange(4)
    args = (pool, out, checkpoints, slots, cu, checkpoint_offsets)
    chunk.chunk_gated_delta_rule_paged_checkpoints(*inputs, *args, checkpoint_interval=interval)
    for row, n in ((1, 0), (3, 2)):
        prefix = take(inputs, int(cu[n]), int(cu[n]) + interval)
        _, S = chunk.chunk_gated_delta_rule(*prefix, initial_state=initial[n : n + 1])
        assert same_bits(checkpoints[row], S[0])
    assert checkpoints[[0, 2, 4, 5]].isnan().all()
    plain_pool, plain_out = initial.clone(), torch.empty_like(out)
    chunk.chunk_gated_delta_rule_paged(*inputs, plain_pool, plain_out, slots, cu)
    assert same_bits(plain_pool, pool) and same_bits(plain_out, out)


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=["fp32-pool", "bf16-pool"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_recurrent_paged_equals_the_functional_form(pool_dtype, packed):
    reads, writes, keep = [3, 0, 9, 1, 4], [3, 2, 5, 6, -1], torch.tensor([True, True, True, False, True])
    inputs = delta(2, 2, 6, B=5, dtype=torch.float32)
    for x in inputs:
        x[2] = torch.nan
    buffer, pool = padded_pool(7, 6, 64, 64, dtype=pool_dtype)
    for slot in (0, 3, 4):
        pool[slot] = torch.randn(6, 64, 64)
    before, old = buffer.clone(), pool.float().clone()
    call = tuple(x.flatten(0, 1)[None] for x in inputs) if packed else inputs
    options = {"cu_seqlens": offsets([2] * 5)} if packed else {}
    o = recurrent.recurrent_gated_delta_rule_paged(
        *call,
        pool,
        torch.tensor(reads),
        write_indices=torch.tensor(writes),
        has_initial_state=keep,
        **options,
    ).reshape(5, 2, 6, 64)
    for n in (0, 1, 3, 4):
        row = tuple(x[n : n + 1] for x in inputs)
        want, S = recurrent.recurrent_gated_delta_rule(*row, initial_state=old[reads[n], None] if keep[n] else None)
        assert same_bits(o[n : n + 1], want)
        if writes[n] >= 0:
            assert same_bits(pool[writes[n]], S[0].to(pool_dtype))
    assert not o[2].any()  # slot 9 lies outside the pool
    assert_only_changed(buffer, before, {3, 2, 6})


def test_slot_zero_can_be_the_null_slot():
    inputs = delta(1, B=2, dtype=torch.float32)
    pool = torch.randn(3, 1, 64, 64)
    before = pool.clone()
    o = recurrent.recurrent_gated_delta_rule_paged(*inputs, pool, torch.tensor([0, 1]), pad_slot_id=0)
    assert not o[0].any() and o[1].any()
    assert_only_changed(pool, before, {1})


def test_slots_per_token_hold_every_state_and_the_accepted_one_is_read():
    inputs = delta(3, 1, 2, B=4, dtype=torch.float32)
    # row 2 has a padding entry among its write slots; row 3 an accepted count out of range
    table = torch.tensor([[0, 1, 2], [3, 4, 5], [6, -1, 7], [8, 9, 10]], dtype=torch.int32)
    accepted = torch.tensor([1, 3, 1, 4], dtype=torch.int32)
    pool = torch.randn(12, 2, 64, 64)
    before = pool.clone()
    o = recurrent.recurrent_gated_delta_rule_paged(*inputs, pool, table, num_accepted_tokens=accepted)
    for n, read in ((0, 0), (1, 5), (2, 6)):
        for i in range(3):
            prefix = tuple(x[n : n + 1, : i + 1] for x in inputs)
            want, S = recurrent.recurrent_gated_delta_rule(*prefix, initial_state=before[read, None])
            assert same_bits(o[n, i], want[0, i])
            if table[n, i] >= 0:
                assert same_bits(pool[table[n, i]], S[0])
    assert not o[3].any()
    assert_only_changed(pool, before, set(range(8)))
    for bad in (0, -5, 4):
        again = pool.clone()
        count = torch.full((4,), bad)
        assert not recurrent.recurrent_gated_delta_rule_paged(*inputs, again, table, num_accepted_tokens=count).any()
        assert same_bits(again, pool)


def path(parents, i):
    found = []
    while i >= 0:
        found.append(i)
        i = parents[i] if 0 <= parents[i] < i else -1
    return found[::-1]


TREES = [[-1, 0, 0, 1, 2, 99], [-1, -1, 1, 0, 3, 5]]  # 99 and a token's own index: follows the state


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_recurrent_verify_runs_each_path_and_leaves_the_pool_alone(tree):
    t, t_max = 6, 7
    inputs = delta(t, 1, 2, B=4, dtype=torch.float32)
    parents = torch.tensor([*TREES, [-1] * t, [-1] * t], dtype=torch.int32)
    pool = torch.randn(4, 2, 64, 64)
    pool[1] = torch.nan
    before = pool.clone()
    buffer = torch.full((5, t_max, 2, 64, 64), torch.nan)
    slots, targets = torch.tensor([2, 1, -1, 0]), torch.tensor([4, 0, 1, 7])
    o = recurrent.recurrent_gated_delta_rule_verify(
        *inputs,
        pool,
        buffer,
        slots,
        intermediate_indices=targets,
        parents=parents if tree else None,
        has_initial_state=torch.tensor([True, False, True, True]),
    )
    for n in (0, 1):
        for i in range(t):
            steps = path(TREES[n], i) if tree else list(range(i + 1))
            along = tuple(x[n : n + 1, steps] for x in inputs)
            want, S = recurrent.recurrent_gated_delta_rule(*along, initial_state=before[2, None] if n == 0 else None)
            assert same_bits(o[n, i], want[0, -1]) and same_bits(buffer[targets[n], i], S[0])
    assert not o[2].any() and o[3].any() and torch.isfinite(o).all()
    assert same_bits(pool, before)
    assert buffer[1:4].isnan().all() and buffer[:, t:].isnan().all()


def test_verify_reads_a_parent_back_through_the_buffers_dtype():
    inputs = delta(2, dtype=torch.float32)
    pool, buffer = torch.randn(1, 1, 64, 64), torch.empty(1, 2, 1, 64, 64, dtype=torch.bfloat16)
    chain = torch.tensor([[-1, 0]])
    o = recurrent.recurrent_gated_delta_rule_verify(*inputs, pool, buffer, torch.tensor([0]), parents=chain)
    want, _ = recurrent.recurrent_gated_delta_rule(*take(inputs, 1, 2), initial_state=buffer[:, 0])
    assert same_bits(o[:, 1:], want)


@pytest.mark.parametrize("target", [0, -1, 2], ids=["buffer-too-short", "no-buffer", "buffer-out-of-range"])
def test_a_token_whose_parent_is_not_stored_starts_from_the_slot(target):
    inputs = delta(3, dtype=torch.float32)
    pool, buffer = torch.randn(1, 1, 64, 64), torch.full((2, 1, 1, 64, 64), torch.nan)
    options = {"parents": torch.tensor([[-1, 0, 1]]), "intermediate_indices": torch.tensor([target])}
    o = recurrent.recurrent_gated_delta_rule_verify(*inputs, pool, buffer, torch.tensor([0]), **options)
    for i in range(3):
        initial = buffer[0] if i == 1 and target == 0 else pool
        want, _ = recurrent.recurrent_gated_delta_rule(*take(inputs, i, i + 1), initial_state=initial)
        assert same_bits(o[:, i : i + 1], want)
    assert buffer[1].isnan().all() and buffer[0].isnan().any() == (target != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=["fp32-pool", "bf16-pool"])
def test_packed_decode_equals_the_composition_bit_for_bit(dtype, pool_dtype, threads):
    N, H, HV, K, V = 5, 2, 6, 64, 128
    D = 2 * H * K + HV * V
    mixed = torch.randn(N, D + 8).to(dtype)[:, :D]
    a, b = torch.randn(N, 3 * HV).to(dtype)[:, HV:].split(HV, -1)
    A_log, dt_bias = torch.randn(2, HV)
    slots = torch.tensor([4, -1, 0, 77, 2], dtype=torch.int32)
    for x in (mixed, a, b):
        x[[1, 3]] = torch.nan
    buffer, pool = padded_pool(6, HV, V, K, dtype=pool_dtype)
    for slot in (0, 2, 4):
        pool[slot] = torch.randn(HV, V, K)
    before, other = buffer.clone(), pool.clone()
    o = decode.packed_decode(mixed, a, b, A_log, dt_bias, pool, slots, num_k_heads=H)
    q, k, v = (
        x.unflatten(1, (-1, size))[:, None]
        for x, size in zip(mixed.split([H * K, H * K, HV * V], -1), (K, K, V), strict=True)
    )
    want = recurrent.recurrent_gated_delta_rule_paged(
        q, k, v, a[:, None], b[:, None], other, slots, A_log=A_log, dt_bias=dt_bias, use_qk_l2norm=True
    )
    assert o.dtype == dtype and o.is_contiguous() and same_bits(o, want[:, 0]) and not o[[1, 3]].any()
    assert same_bits(pool, other)
    assert_only_changed(buffer, before, {0, 2, 4})
    for n in (0, 2, 4):  # alone
        state = before[slots[n], : HV * V * K].view(1, HV, V, K).clone()
        row = (mixed[n : n + 1], a[n : n + 1], b[n : n + 1])
        alone = decode.packed_decode(*row, A_log, dt_bias, state, torch.tensor([0]), num_k_heads=H)
        assert same_bits(alone[0], o[n]) and same_bits(state[0], pool[slots[n]])


def test_packed_decode_of_no_rows_works():
    state = torch.randn(2, 2, 64, 64)
    empty = torch.empty(0, 2)
    o = decode.packed_decode(
        torch.empty(0, 256), empty, empty, torch.zeros(2), torch.zeros(2), state, empty[:, 0].long(), num_k_heads=1
    )
    assert o.shape == (0, 2, 64)


# ---------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------


def torch_conv(window, x, weight, bias, activation):
    """window [D, W-1], x [L, D] -> [L, D], by torch's own convolution."""
    y = F.conv1d(torch.cat([window, x.t()], 1)[None], weight[:, None], bias, groups=len(weight))[0].t()
    return y if activation is None else F.silu(y)


def conv_pool(S, D, L, time_last):
    """(buffer, view [S, D, L]) of NaN, with a padded slot stride."""
    buffer, pool = padded_pool(S, *((D, L) if time_last else (L, D)), dtype=F64)
    return buffer, pool if time_last else pool.transpose(1, 2)


@pytest.mark.parametrize("time_last", [True, False], ids=["time-last", "channel-last"])
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("activation", ["silu", "swish", None])
def test_conv_equals_torch_conv1d_on_each_sequence(W, time_last, activation):
    D, lengths = 10, [5, 1, 3, 0, 2, 150, 4]
    slots, keep = [3, 0, -1, 2, 5, 6, 1], torch.tensor([True, True, True, True, False, False, True])
    T = sum(lengths) + 4
    x = torch.randn(T, 2 * D, dtype=F64)[:, :D]
    x[6:9] = torch.nan
    x[T - 4 :] = torch.nan
    weight, bias = torch.randn(D, W, dtype=F64), torch.randn(D, dtype=F64) if W != 3 else None
    buffer, pool = conv_pool(8, D, W - 1, time_last)
    for slot in (3, 0, 2, 1):
        pool[slot] = torch.randn(D, W - 1, dtype=F64)
    before, old = buffer.clone(), pool.clone()
    cu = offsets(lengths)
    y = conv.causal_conv1d(
        x,
        weight,
        bias,
        pool,
        cu,
        state_indices=torch.tensor(slots, dtype=torch.int32),
        has_initial_state=keep,
        activation=activation,
    )
    for n, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        if start == end or slots[n] < 0:
            assert not y[start:end].any()
            continue
        window = old[slots[n]] if keep[n] else torch.zeros(D, W - 1, dtype=F64)
        assert error(y[start:end], torch_conv(window, x[start:end], weight, bias, activation)) < 1e-14
        assert same_bits(pool[slots[n]], torch.cat([window, x[start:end].t()], 1)[:, -(W - 1) :])
    assert not y[T - 4 :].any() and y.is_contiguous()
    assert_only_changed(buffer, before, {3, 0, 5, 6, 1})


def test_conv_without_indices_uses_slot_n():
    x, weight, state = torch.randn(5, 4), torch.randn(4, 3), torch.zeros(2, 4, 2)
    y = conv.causal_conv1d(x, weight, None, state, offsets([2, 3]), activation=None)
    assert error(y[2:], torch_conv(torch.zeros(4, 2), x[2:], weight, None, None)) < 1e-6
    assert torch.equal(state[1], x[3:].t())


@pytest.mark.parametrize("time_last", [True, False], ids=["time-last", "channel-last"])
@pytest.mark.parametrize("t", [None, 1, 2, 5])
def test_conv_update_is_the_conv_over_the_concatenation(t, time_last):
    N, D, W = 4, 6, 4
    x = torch.randn(N, *(() if t is None else (t,)), D, dtype=F64)
    x[2] = torch.nan
    weight, bias = torch.randn(D, W, dtype=F64), torch.randn(D, dtype=F64)
    buffer, pool = conv_pool(6, D, W - 1, time_last)
    slots = torch.tensor([5, 0, -1, 3])
    pool[[5, 0, 3]] = torch.randn(3, D, W - 1, dtype=F64)
    before, old = buffer.clone(), pool.clone()
    y = conv.causal_conv1d_update(x, weight, bias, pool, state_indices=slots)
    assert y.shape == x.shape and not y[2].any()
    for n in (0, 1, 3):
        tokens = x[n].view(-1, D)
        assert error(y[n].view(-1, D), torch_conv(old[slots[n]], tokens, weight, bias, "silu")) < 1e-14
        assert same_bits(pool[slots[n]], torch.cat([old[slots[n]], tokens.t()], 1)[:, -(W - 1) :])
    assert_only_changed(buffer, before, {5, 0, 3})


def test_conv_update_starts_from_the_accepted_window():
    D, W, t = 6, 4, 3
    L = W - 1 + t - 1
    x = torch.randn(L + 3, t, D, dtype=F64)
    weight = torch.randn(D, W, dtype=F64)
    _, pool = conv_pool(L + 3, D, L, False)
    pool.copy_(torch.randn(L + 3, D, L, dtype=F64))
    old = pool.clone()
    accepted = torch.arange(-1, L + 2)
    y = conv.causal_conv1d_update(x, weight, None, pool, num_accepted_tokens=accepted)
    for n, count in enumerate(accepted.tolist()):
        if not 1 <= count <= L - W + 2:
            assert not y[n].any() and same_bits(pool[n], old[n])
            continue
        o = count - 1
        assert error(y[n], torch_conv(old[n, :, o : o + W - 1], x[n], weight, None, "silu")) < 1e-14
        kept = F.pad(old[n, :, o + 1 : o + 1 + L - t], (0, max(0, o + 1 - t)))  # columns past the end are zero
        assert same_bits(pool[n], torch.cat([kept, x[n].t()], 1))


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_conv_verify_follows_each_path_and_leaves_the_state_alone(tree):
    N, t, D, W = 4, 6, 5, 4
    x = torch.randn(N, t, D, dtype=F64)
    x[2] = torch.nan
    weight, bias = torch.randn(D, W, dtype=F64), torch.randn(D, dtype=F64)
    pool = torch.randn(5, D, W - 1, dtype=F64)
    before = pool.clone()
    windows = torch.full((4, t + 1, W - 1, D), torch.nan, dtype=F64).transpose(2, 3)
    slots, targets = torch.tensor([3, 0, -1, 4]), torch.tensor([2, 0, 1, 8])
    parents = torch.tensor([*TREES, [-1] * t, [-1] * t])
    y = conv.causal_conv1d_verify(
        x,
        weight,
        bias,
        pool,
        windows,
        state_indices=slots,
        intermediate_indices=targets,
        parents=parents if tree else None,
    )
    for n in (0, 1):
        for i in range(t):
            along = x[n, path(TREES[n], i) if tree else list(range(i + 1))]
            assert error(y[n, i], torch_conv(pool[slots[n]], along, weight, bias, "silu")[-1]) < 1e-14
            assert same_bits(windows[targets[n], i], torch.cat([pool[slots[n]], along.t()], 1)[:, -(W - 1) :])
    assert not y[2].any() and y[3].any()
    assert same_bits(pool, before) and windows[[1, 3]].isnan().all() and windows[:, t:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_conv_has_the_same_bits_alone_in_a_batch_and_token_by_token(dtype, threads):
    D, W, lengths = 37, 4, [3, 90, 1, 8]
    x, weight, bias = torch.randn(sum(lengths), D).to(dtype), torch.randn(D, W), torch.randn(D)
    state = torch.randn(4, D, W - 1).to(dtype)
    batch_state = state.clone()
    cu = offsets(lengths)
    y = conv.causal_conv1d(x, weight, bias, batch_state, cu)
    for n in range(4):
        alone, one_by_one = state[n : n + 1].clone(), state[n : n + 1].clone()
        tokens = x[cu[n] : cu[n + 1]]
        assert same_bits(conv.causal_conv1d(tokens, weight, bias, alone, offsets([lengths[n]])), y[cu[n] : cu[n + 1]])
        for i, token in enumerate(tokens):
            assert same_bits(conv.causal_conv1d_update(token[None], weight, bias, one_by_one)[0], y[cu[n] + i])
        assert same_bits(alone[0], batch_state[n]) and same_bits(one_by_one[0], batch_state[n])


# ---------------------------------------------------------------------------------------------------------------
# Norms, gates, split
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm-first", "gate-first"])
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("activation", ["silu", "swish", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 3])
def test_layer_norm_gated_equals_the_formula(norm_before_gate, rms, activation, groups):
    D = 48
    x, z = torch.randn(2, 5, 7, 2 * D, dtype=F64)[..., :D].unbind(0)
    weight, bias = torch.randn(2, D, dtype=F64)
    act = torch.sigmoid(z) if activation == "sigmoid" else F.silu(z)

    def normed(y):
        y = y.reshape(5, 7, groups, D // groups)
        y = F.rms_norm(y, y.shape[-1:], eps=1e-3) if rms else F.layer_norm(y, y.shape[-1:], eps=1e-3)
        return y.reshape(5, 7, D) * weight + bias

    want = normed(x) * act if norm_before_gate else normed(x * act)
    options = {"norm_before_gate": norm_before_gate, "is_rms_norm": rms, "eps": 1e-3, "activation": activation}
    options["group_size"] = D // groups if groups > 1 else None
    got = norm.layer_norm_gated(x, weight, bias, z, **options)
    assert error(got, want) < 1e-13 and got.is_contiguous()
    assert norm.layer_norm_gated_out(x, weight, bias, z, x, **options) is None
    assert same_bits(x, got)


@pytest.mark.parametrize("shape", [(16,), (0, 16), (3, 16), (2, 3, 4, 16)], ids=["1d", "empty", "2d", "4d"])
def test_norms_take_any_number_of_dims(shape):
    x, weight = torch.randn(shape, dtype=F64), torch.randn(16, dtype=F64)
    got = norm.layer_norm_gated(x, weight, norm_before_gate=True)
    assert error(got, F.rms_norm(x, (16,), weight, 1e-6)) < 1e-13
    assert error(norm.l2norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("D", [64, 100, 4096])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(D, dtype, threads):
    x, z = torch.randn(2, 33, D).to(dtype)
    weight, bias = torch.randn(2, D)
    for rms in (True, False):
        calls = (
            lambda i, rms=rms: norm.layer_norm_gated(x[i], weight, bias, z[i], norm_before_gate=True, is_rms_norm=rms),
            lambda i: norm.l2norm(x[i]),
            lambda i: torch.stack(gating.gating(x[i], z[i], weight, bias), -1),
        )
        for call in calls:
            batch = call(slice(None))
            assert all(same_bits(call(slice(i, i + 1))[0], batch[i]) for i in (0, 1, 16, 32))


def test_l2norm_of_zero_is_zero():
    assert not norm.l2norm(torch.zeros(2, 8)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=["fp32", "bf16", "fp64"])
def test_gating_equals_the_formula(dtype):
    a, b = (torch.randn(3, 5, 2, 6) * 20).to(dtype)[..., 0, :].unbind(0)[:2]
    A_log, dt_bias = torch.randn(2, 6)
    g, beta = gating.gating(a, b, A_log, dt_bias, beta_scale=2.0)
    assert g.dtype == beta.dtype == (F64 if dtype == F64 else torch.float32)
    assert g.is_contiguous() and beta.is_contiguous() and (g <= 0).all()
    want_g = -A_log.double().exp() * F.softplus(a.double() + dt_bias.double(), threshold=1000)
    bound = 4e-9 if dtype == F64 else 1e-6  # the threshold of 20 leaves exp(-20) out
    assert error(g, want_g) < bound and error(beta, 2 * torch.sigmoid(b.double())) < bound


def test_gating_survives_infinities():
    a, b = torch.tensor([[-torch.inf, torch.inf, 200.0]]), torch.tensor([[-torch.inf, torch.inf, -200.0]])
    g, beta = gating.gating(a, b, torch.zeros(3), torch.zeros(3))
    assert g.tolist() == [[0, -torch.inf, -200]] and beta.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("T", [0, 1, 5])
@pytest.mark.parametrize("H", [1, 4])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
def test_split_equals_reshape_and_cat(ratio, H, T):
    K, V, HV = 16, 24, H * ratio
    q, k = torch.randn(2, T, H, K)
    v, z = torch.randn(2, T, HV, V)
    b, a = torch.randn(2, T, HV)
    per_key_head = [x.reshape(T, H, math.prod(x.shape[1:]) // H) for x in (q, k, v, z, b, a)]
    qkvz = F.pad(torch.cat(per_key_head[:4], -1).flatten(1), (0, 3))[:, :-3]
    ba = F.pad(torch.cat(per_key_head[4:], -1).flatten(1), (0, 5))[:, :-5]
    got = split.split_qkvz_ba(qkvz, ba, num_k_heads=H, num_v_heads=HV, head_k_dim=K, head_v_dim=V)
    for x, want in zip(got, (torch.cat([x.flatten(1) for x in (q, k, v)], -1), z, b, a), strict=True):
        assert torch.equal(x, want) and x.is_contiguous()
        assert (
            x.untyped_storage().data_ptr() not in (qkvz.untyped_storage().data_ptr(), ba.untyped_storage().data_ptr())
            or T == 0
        )
