"""On a GPU: CUDA graphs, binaries, bits that do not depend on the batch, offsets past 2^31, large grids, streams."""

from __future__ import annotations

import contextlib

import pytest
import token_cases
import torch
from token_cases import CASES, assert_same_bits, outcome, results

import gdn_kernels
from gdn_kernels import graphs, launch
from gdn_kernels import nn as gdn_nn
from gdn_kernels.ops import OPERATORS

pytestmark = pytest.mark.gpu

SIZES = token_cases.Sizes()
DTYPE = torch.bfloat16
CAPTURED = 150  # tokens or rows of a captured call: two chunks and a tail
COUNTS = (1, 2, 3, 16, 17, 64, 100, 1000, 4096)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def make(name: str, count: int, seed: int = 0, dtype: torch.dtype = DTYPE):
    return token_cases.make(name, count, "cuda", dtype, seed, SIZES)


def poison() -> None:
    """Leave freed memory full of NaN: what a kernel does not write shows."""
    torch.full((1 << 24,), torch.nan, device="cuda")


@contextlib.contextmanager
def side_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_operator_has_a_case():
    assert {name.split("-")[0] for name in CASES} | {"linear_attention_with_output"} == set(OPERATORS)


# ---------------------------------------------------------------------------------------------------------------
# Capture and replay
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_replay_has_the_bits_of_eager_whatever_changed_in_place(name):
    held = make(name, CAPTURED)
    before = [x.clone() for x in held.tensors]
    # warmed on tensors of its own: neither warm-up nor capture may touch what is held
    with side_stream():
        make(name, CAPTURED).run()
    poison()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert launch.is_capturing()
        found = results(held.run())
    assert_same_bits(held.tensors, before, f"{name}: captured without being run")

    # tokens, lengths, slots, known states, accepted counts and trees all follow the seed
    for seed in (0, 1, 2, 3):
        other = make(name, CAPTURED, seed)
        for buffer, new in zip(held.tensors, other.tensors, strict=True):
            buffer.copy_(new)
        graph.replay()
        eager = outcome(other, other.run())
        assert_same_bits([*found, *held.tensors], eager, f"{name}: replay {seed} against eager")


@pytest.mark.parametrize("name", CASES)
def test_a_replay_twice_over_the_same_buffers_repeats_itself(name):
    held, start = make(name, CAPTURED, 5), make(name, CAPTURED, 5)
    make(name, CAPTURED).run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(held.run())
    runs = []
    for _ in range(2):
        for buffer, new in zip(held.tensors, start.tensors, strict=True):
            buffer.copy_(new)
        graph.replay()
        runs.append([x.clone() for x in (*found, *held.tensors)])
    assert_same_bits(runs[1], runs[0], f"{name}: second replay against the first")


def test_a_capture_is_capture_mode_and_skips_value_checks():
    call, held = make("packed_decode-rows", 4), make("packed_decode-rows", 4)
    call.run()
    assert not launch.is_capturing()
    graph = torch.cuda.CUDAGraph()
    with launch.debug_checks(), torch.cuda.graph(graph):
        # a value check would copy to the host, which no capture allows
        assert launch.is_capturing() and not launch.debugging()
        (found,) = results(held.run())
    assert not launch.is_capturing()
    graph.replay()
    other = make("packed_decode-rows", 4)
    assert_same_bits([found], results(other.run()), "replay against eager")


# ---------------------------------------------------------------------------------------------------------------
# Binaries
# ---------------------------------------------------------------------------------------------------------------


# Cases whose count is of sequences, few and many of which take programs of different size: two binaries.
FEW_AND_MANY = {"chunk_gated_delta_rule_paged-sequences"}


@pytest.mark.parametrize("name", CASES)
def test_one_binary_serves_every_count(name):
    make(name, CAPTURED).run()
    if name in FEW_AND_MANY:
        make(name, 2).run()
    before = launch.binaries()
    assert before > 0
    grown = {}
    for count in COUNTS:
        make(name, count).run()
        if launch.binaries() != before:
            grown[count] = launch.binaries() - before
            before = launch.binaries()
    assert not grown, f"{name}: binaries built at counts {grown}"


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_index_dtypes_are_static_facts(index_dtype):
    """Another index dtype is another binary, once."""

    def call(count):
        one = make("packed_decode-rows", count)
        return one.map(lambda x: x.to(index_dtype) if x.dtype is torch.int32 else x)

    call(CAPTURED).run()
    before = launch.binaries()
    for count in COUNTS:
        call(count).run()
    assert launch.binaries() == before


def test_a_binary_is_counted_when_the_dtype_changes():
    """The counter can fail: each dtype has a binary of its own, built at the first count it meets."""
    unused = token_cases.Sizes(H=1, HV=11)
    for dtype in (DTYPE, torch.float16):
        before = launch.binaries()
        for count in (CAPTURED, 7):
            token_cases.make("gating-column-views", count, "cuda", dtype, 0, unused).run()
            assert launch.binaries() == before + 1


# ---------------------------------------------------------------------------------------------------------------
# A row, a sequence: the same bits alone, first, last and in a batch
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [64, 97, 128, 256, 1000, 2048, 4096, 8192, 20000, 65536])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_a_norm_row_has_the_same_bits_anywhere(columns, is_rms_norm):
    m = token_cases.Make(SIZES, "cuda", DTYPE, columns)
    x, z, weight, bias = m.normal(67, columns), m.normal(67, columns), m.normal(columns), m.normal(columns)
    options = {"norm_before_gate": True, "is_rms_norm": is_rms_norm}
    batch = gdn_kernels.layer_norm_gated(x, weight, bias, z, **options)
    turned = gdn_kernels.layer_norm_gated(x.flip(0), weight, bias, z.flip(0), **options)
    assert_same_bits([turned.flip(0)], [batch], "rows in another order")
    for row in (0, 1, 33, 66):
        alone = gdn_kernels.layer_norm_gated(x[row].clone(), weight, bias, z[row].clone(), **options)
        assert_same_bits([alone], [batch[row]], f"row {row} alone")
    assert torch.isfinite(batch).all()


@pytest.mark.parametrize("columns", [limit for limit, _ in launch.NORM_LADDER])
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate-last", "gate-first"])
def test_every_rung_gives_a_row_its_bits_in_batches_of_1_to_65536_rows_captured_or_not(columns, norm_before_gate):
    m = token_cases.Make(SIZES, "cuda", DTYPE, columns)
    row, gate, weight = m.normal(columns), m.normal(columns), m.normal(columns)

    def norm(x, z):
        return gdn_kernels.layer_norm_gated(x, weight, None, z, norm_before_gate=norm_before_gate)

    wanted = norm(row, gate)
    counts = [rows for rows in (1, 2, 7, 64, 1000, 65536) if rows * columns <= 2**28]
    for rows in counts:
        x, z = torch.randn(2, rows, columns, device="cuda", dtype=DTYPE)
        places = sorted({0, rows // 2, rows - 1})
        x[places], z[places] = row, gate
        batch = norm(x, z)
        for place in places:
            assert_same_bits([batch[place]], [wanted], f"row {place} of {rows}")
        turn = torch.randperm(rows, device="cuda")
        assert_same_bits([norm(x[turn], z[turn])], [batch[turn]], f"{rows} rows permuted")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = norm(x, z)
        graph.replay()
        assert_same_bits([captured], [batch], f"{rows} rows captured")


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_an_l2norm_row_has_the_same_bits_anywhere(columns):
    x = token_cases.Make(SIZES, "cuda", DTYPE, columns).normal(67, columns)
    batch = gdn_kernels.l2norm(x)
    assert_same_bits([gdn_kernels.l2norm(x.flip(0)).flip(0)], [batch], "rows in another order")
    for row in (0, 33, 66):
        assert_same_bits([gdn_kernels.l2norm(x[row].clone())], [batch[row]], f"row {row} alone")


def packed_sequences(lengths, seed):
    """q, k, v, g, beta of each sequence, and an initial state for each."""
    m = token_cases.Make(SIZES, "cuda", DTYPE, seed)
    each = [m.delta(1, length) for length in lengths]
    states = m.normal(len(lengths), SIZES.HV, SIZES.V, SIZES.K, dtype=torch.float32)
    return each, states


def pack(each, order, padding):
    """The sequences ``order``, packed as column views, followed by NaN rows."""
    tensors = []
    for parts in zip(*(each[n] for n in order), strict=True):
        tokens = torch.cat(parts, dim=1)
        tail = tokens.new_full((1, padding, *tokens.shape[2:]), torch.nan)
        tensors.append(torch.cat([tokens, tail], dim=1))
    ends = torch.tensor([each[n][0].shape[1] for n in order]).cumsum(0).tolist()
    return tensors, torch.tensor([0, *ends], dtype=torch.int32, device="cuda")


LENGTHS = (130, 1, 64, 0, 63, 65, 300, 128)


@pytest.mark.parametrize("operator", ["chunk_gated_delta_rule", "recurrent_gated_delta_rule"])
@pytest.mark.parametrize(
    "order, padding",
    [(range(7, -1, -1), 0), ([6, 0, 1], 70), ([5, 5, 5], 3), ([0], 0), ([1], 0), ([2], 1), ([4], 0), ([6], 5)],
    ids=["reversed", "some-and-padding", "thrice", "tail", "one-token", "one-chunk", "short", "long-alone"],
)
def test_a_sequence_has_the_same_bits_in_any_batch(operator, order, padding):
    each, states = packed_sequences(LENGTHS, 1)

    def run(order, padding):
        tensors, offsets = pack(each, order, padding)
        poison()
        o, final = getattr(gdn_kernels, operator)(
            *tensors, initial_state=states[list(order)].contiguous(), cu_seqlens=offsets, use_qk_l2norm=True
        )
        cuts = offsets.tolist()
        assert not o[0, cuts[-1] :].any()
        return {n: (o[0, a:b], final[i]) for i, (n, a, b) in enumerate(zip(order, cuts[:-1], cuts[1:], strict=True))}

    wanted, found = run(range(8), 17), run(order, padding)
    for n, pair in found.items():
        assert torch.isfinite(pair[0]).all()
        assert_same_bits(list(pair), list(wanted[n]), f"sequence {n} of {LENGTHS[n]} tokens")


def test_a_conv_sequence_has_the_same_bits_in_any_batch():
    m = token_cases.Make(SIZES, "cuda", DTYPE, 2)
    each = [(m.normal(1, length, SIZES.D),) for length in LENGTHS]
    weight, bias = m.conv_parameters()
    pool = m.normal(len(LENGTHS), SIZES.W - 1, SIZES.D).transpose(1, 2)

    def run(order, padding):
        (x,), offsets = pack(each, order, padding)
        state = pool.clone(memory_format=torch.preserve_format)
        slots = torch.tensor(list(order), dtype=torch.int32, device="cuda")
        y = gdn_kernels.causal_conv1d(x[0], weight, bias, state, offsets, state_indices=slots)
        cuts = offsets.tolist()
        return {n: (y[a:b], state[n]) for n, a, b in zip(order, cuts[:-1], cuts[1:], strict=True)}

    wanted = run(range(8), 20)
    for order, padding in ((range(7, -1, -1), 0), ([6, 0, 1], 70), *(([n], n) for n in range(8))):
        for n, pair in run(order, padding).items():
            assert_same_bits(list(pair), list(wanted[n]), f"sequence {n} in {list(order)}")


def test_a_conv_update_is_the_conv_of_one_token():
    m = token_cases.Make(SIZES, "cuda", DTYPE, 3)
    x, (weight, bias) = m.columns(7, SIZES.D), m.conv_parameters()
    pool = m.normal(7, SIZES.W - 1, SIZES.D).transpose(1, 2)
    ours, theirs = pool.clone(), pool.clone()
    updated = gdn_kernels.causal_conv1d_update(x, weight, bias, ours)
    offsets = torch.arange(8, dtype=torch.int32, device="cuda")
    convolved = gdn_kernels.causal_conv1d(x, weight, bias, theirs, offsets)
    assert_same_bits([updated, ours], [convolved, theirs], "update against conv")


def test_a_decode_row_has_the_same_bits_anywhere():
    m, N = token_cases.Make(SIZES, "cuda", DTYPE, 4), 33
    x, (a, b), parameters = m.columns(N, SIZES.D), m.raw(N), tuple(m.gate_parameters().values())
    pool = m.pool(N)

    def run(rows):
        state = pool.clone()
        slots = torch.tensor(rows, dtype=torch.int32, device="cuda")
        o = gdn_kernels.packed_decode(x[rows], a[rows], b[rows], *parameters, state, slots, num_k_heads=SIZES.H)
        return {row: (o[i], state[row]) for i, row in enumerate(rows)}

    wanted = run(list(range(N)))
    for rows in ([0], [16], [N - 1], list(range(N - 1, -1, -1)), [5, 32, 0, 17]):
        for row, pair in run(rows).items():
            assert_same_bits(list(pair), list(wanted[row]), f"row {row} in {rows}")


def test_decode_verify_and_the_recurrent_form_have_the_same_bits():
    m, N = token_cases.Make(SIZES, "cuda", DTYPE, 6), 9
    s = SIZES
    x, (a, b), parameters = m.normal(N, s.D), m.raw(N), m.gate_parameters()
    pool, slots = m.pool(N), torch.arange(N, dtype=torch.int32, device="cuda")
    q, k, v = (y.unsqueeze(1) for y in x.split((s.H * s.K, s.H * s.K, s.HV * s.V), dim=-1))
    q, k, v = q.unflatten(-1, (s.H, s.K)), k.unflatten(-1, (s.H, s.K)), v.unflatten(-1, (s.HV, s.V))
    inputs, options = (q, k, v, a[:, None], b[:, None]), {"use_qk_l2norm": True, **parameters}

    states = pool.clone()
    decoded = gdn_kernels.packed_decode(x, a, b, *parameters.values(), states, slots, num_k_heads=s.H)
    kept = m.normal(N, 1, s.HV, s.V, s.K, dtype=torch.float32)
    verified = gdn_kernels.recurrent_gated_delta_rule_verify(*inputs, pool, kept, slots, **options)
    o, final = gdn_kernels.recurrent_gated_delta_rule(*inputs, initial_state=pool, **options)
    assert_same_bits([verified[:, 0], kept[:, 0]], [decoded, states], "verify against decode")
    assert_same_bits([o[:, 0], final], [decoded, states], "recurrent against decode")


# ---------------------------------------------------------------------------------------------------------------
# Offsets past 2^31 elements, grids past 65,535 programs
# ---------------------------------------------------------------------------------------------------------------

FAR_SLOTS = 4200  # of HV = 32, K = V = 128: slot 4096 starts at element 2^31, 4.4 GB in bf16
WIDE = token_cases.Sizes(H=16, HV=32, K=128, V=128)


@pytest.fixture(scope="module")
def far_pool():
    pool = torch.empty(FAR_SLOTS, WIDE.HV, WIDE.V, WIDE.K, dtype=DTYPE, device="cuda")
    yield pool
    del pool
    torch.cuda.empty_cache()


def near_and_far(far_pool, seed, rows=3):
    """A small pool and the large one with the same states in its last slots; the slots of the rows in each."""
    m = token_cases.Make(WIDE, "cuda", DTYPE, seed)
    near = m.normal(rows + 1, WIDE.HV, WIDE.V, WIDE.K)
    first = FAR_SLOTS - rows - 1
    far_pool[first:].copy_(near)
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    assert first * far_pool.stride(0) > 2**31
    return m, near, slots, slots + first


def check_far(far_pool, near, outputs, rows=3):
    a, b = outputs
    assert_same_bits([b], [a], "output from a slot past 2^31 elements")
    assert_same_bits([far_pool[FAR_SLOTS - rows - 1 :]], [near], "states past 2^31 elements, and the one after them")
    assert a.any()


def test_packed_decode_out_needs_no_binary_of_its_own():
    make("packed_decode-rows", 4).run()
    before = launch.binaries()
    make("packed_decode_out-rows", 4).run()
    assert launch.binaries() == before > 0


def test_packed_decode_reaches_slots_past_2_31_elements(far_pool):
    m, near, slots, far = near_and_far(far_pool, 1)
    args = m.normal(3, WIDE.D), *m.raw(3), *m.gate_parameters().values()
    outputs = [
        gdn_kernels.packed_decode(*args, pool, index, num_k_heads=WIDE.H)
        for pool, index in ((near, slots), (far_pool, far))
    ]
    check_far(far_pool, near, outputs)


def test_a_seed_rounds_states_past_2_31_elements(far_pool):
    """The numbers are the slot's, so the far states differ from the near ones: by a spacing at most, and from what
    rounding to nearest gives by one in less than all."""
    m, near, slots, far = near_and_far(far_pool, 6)
    args, seed = (m.normal(3, WIDE.D), *m.raw(3), *m.gate_parameters().values()), m.seed()
    options = {"num_k_heads": WIDE.H}
    a = gdn_kernels.packed_decode(*args, near, slots, **options)
    b = gdn_kernels.packed_decode(*args, far_pool, far, rounding_seed=seed, **options)
    assert_same_bits([b], [a], "output from a slot past 2^31 elements")
    found = far_pool[far.long()].float()
    ratio = (found != near[:3].float()).float().mean()
    assert (found - near[:3].float()).abs().le(near[:3].float().abs() * 2**-7 + 1e-30).all() and 0.1 < ratio < 0.4
    assert_same_bits([far_pool[FAR_SLOTS - 1]], [near[3]], "the slot after them")


def test_recurrent_paged_reaches_slots_past_2_31_elements(far_pool):
    m, near, slots, far = near_and_far(far_pool, 2)
    inputs = m.delta(3, 2)
    outputs = [
        gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, pool, index, use_qk_l2norm=True)
        for pool, index in ((near, slots), (far_pool, far))
    ]
    check_far(far_pool, near, outputs)


def test_a_slot_per_token_reaches_past_2_31_elements(far_pool):
    m, near, slots, far = near_and_far(far_pool, 3)
    inputs = m.delta(1, 3)
    accepted = torch.tensor([3], dtype=torch.int32, device="cuda")
    outputs = [
        gdn_kernels.recurrent_gated_delta_rule_paged(
            *inputs, pool, index[None], num_accepted_tokens=accepted, use_qk_l2norm=True
        )
        for pool, index in ((near, slots), (far_pool, far))
    ]
    check_far(far_pool, near, outputs)


def test_verify_reads_and_keeps_states_past_2_31_elements(far_pool):
    m, near, slots, far = near_and_far(far_pool, 4)
    inputs = m.delta(3, 1)
    kept = m.normal(3, 1, WIDE.HV, WIDE.V, WIDE.K, dtype=DTYPE)
    wanted = gdn_kernels.recurrent_gated_delta_rule_verify(*inputs, near, kept, slots, use_qk_l2norm=True)
    found = gdn_kernels.recurrent_gated_delta_rule_verify(
        *inputs, near, far_pool[:, None], slots, intermediate_indices=far, use_qk_l2norm=True
    )
    check_far(far_pool, torch.cat([kept[:, 0], near[3:]]), (wanted, found))


def test_chunk_paged_reaches_slots_past_2_31_elements(far_pool):
    m, near, slots, far = near_and_far(far_pool, 5)
    inputs = m.delta(1, 200)
    offsets = torch.tensor([0, 65, 66, 200], dtype=torch.int32, device="cuda")
    outputs = []
    for pool, index in ((near, slots), (far_pool, far)):
        out = m.normal(1, 200, WIDE.HV, WIDE.V)
        gdn_kernels.chunk_gated_delta_rule_paged(*inputs, pool, out, index, offsets, use_qk_l2norm=True)
        outputs.append(out)
    check_far(far_pool, near, outputs)


def test_the_convs_reach_slots_past_2_31_elements():
    m = token_cases.Make(WIDE, "cuda", DTYPE, 6)
    D = WIDE.D
    last = 2**31 // (3 * D) + 100
    far = torch.empty(last + 2, 3, D, dtype=DTYPE, device="cuda").transpose(1, 2)
    near, (weight, bias) = m.normal(3, 3, D).transpose(1, 2), m.conv_parameters()
    slots = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    assert (last - 1) * far.stride(0) > 2**31
    x, offsets = m.normal(20, D), torch.tensor([0, 7, 20], dtype=torch.int32, device="cuda")
    far[last - 1 :].copy_(near)
    for call in (
        lambda pool, index: gdn_kernels.causal_conv1d(x, weight, bias, pool, offsets, state_indices=index),
        lambda pool, index: gdn_kernels.causal_conv1d_update(x[:2], weight, bias, pool, state_indices=index),
    ):
        wanted, found = call(near, slots), call(far, slots + last - 1)
        assert wanted.any()
        assert_same_bits([found, far[last - 1 :]], [wanted, near], "conv from a slot past 2^31 elements")


def test_a_norm_row_past_2_31_elements_is_normalised():
    rows, columns = 2**31 // 65536 + 3, 65536
    x = torch.empty(rows, columns, dtype=DTYPE, device="cuda")
    last = token_cases.Make(SIZES, "cuda", DTYPE, 7).normal(2, columns)
    x[-2:].copy_(last)
    weight = torch.ones(columns, dtype=DTYPE, device="cuda")
    gdn_kernels.layer_norm_gated_out(x, weight, None, None, x, norm_before_gate=True)
    wanted = gdn_kernels.layer_norm_gated(last, weight, norm_before_gate=True)
    assert_same_bits([x[-2:]], [wanted], "the last two rows")
    assert wanted.any()


MANY = 3000  # sequences of 32 value heads: 96,000 programs or more
MANY_SIZES = token_cases.Sizes(H=16, HV=32, K=64, V=64)
SOME = [0, 1, 2047, 2048, 2999]


def many(seed):
    m = token_cases.Make(MANY_SIZES, "cuda", DTYPE, seed)
    assert MANY * MANY_SIZES.HV > 65535
    pool = m.normal(MANY, MANY_SIZES.HV, MANY_SIZES.V, MANY_SIZES.K)
    return m, pool, torch.arange(MANY, dtype=torch.int32, device="cuda")


def test_packed_decode_of_more_than_65535_heads():
    m, pool, slots = many(1)
    x, (a, b), parameters = m.normal(MANY, MANY_SIZES.D), m.raw(MANY), tuple(m.gate_parameters().values())
    some = pool[SOME].clone()
    o = gdn_kernels.packed_decode(x, a, b, *parameters, pool, slots, num_k_heads=MANY_SIZES.H)
    few = gdn_kernels.packed_decode(x[SOME], a[SOME], b[SOME], *parameters, some, slots[:5], num_k_heads=MANY_SIZES.H)
    assert few.flatten(1).any(dim=1).all()
    assert_same_bits([o[SOME], pool[SOME]], [few, some], "rows of a large batch")


def test_verify_of_more_than_65535_heads():
    m, pool, slots = many(4)
    pool, inputs = pool[:8], m.delta(MANY, 1)
    slots = slots % 8
    kept = m.normal(MANY, 1, MANY_SIZES.HV, MANY_SIZES.V, MANY_SIZES.K)
    o = gdn_kernels.recurrent_gated_delta_rule_verify(*inputs, pool, kept, slots, use_qk_l2norm=True)
    some = [x[SOME] for x in inputs]
    few_kept = torch.empty_like(kept[:5])
    few = gdn_kernels.recurrent_gated_delta_rule_verify(*some, pool, few_kept, slots[SOME], use_qk_l2norm=True)
    assert few.flatten(1).any(dim=1).all()
    assert_same_bits([o[SOME], kept[SOME]], [few, few_kept], "rows of a large batch")


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_the_paged_forms_of_more_than_65535_heads(form):
    m, pool, slots = many(2)
    inputs, offsets = m.delta(1, MANY), torch.arange(MANY + 1, dtype=torch.int32, device="cuda")
    some_inputs = [x[:, SOME] for x in inputs]
    some = pool[SOME].clone()

    def run(inputs, pool, slots, offsets):
        if form == "recurrent":
            return gdn_kernels.recurrent_gated_delta_rule_paged(
                *inputs, pool, slots, cu_seqlens=offsets, use_qk_l2norm=True
            )
        out = inputs[2].new_empty(inputs[2].shape)
        gdn_kernels.chunk_gated_delta_rule_paged(*inputs, pool, out, slots, offsets, use_qk_l2norm=True)
        return out

    o, few = run(inputs, pool, slots, offsets), run(some_inputs, some, slots[:5], offsets[:6])
    assert few.flatten(2).any(dim=2).all()
    assert_same_bits([o[:, SOME], pool[SOME]], [few, some], "sequences of a large batch")


def test_rows_for_more_than_65535_programs():
    rows = 70000 * 32
    m = token_cases.Make(SIZES, "cuda", DTYPE, 3)
    parameters = tuple(m.gate_parameters().values())
    a, b = m.normal(rows, SIZES.HV), m.normal(rows, SIZES.HV)
    g, beta = gdn_kernels.gating(a, b, *parameters)
    wanted = gdn_kernels.gating(a[-5:].clone(), b[-5:].clone(), *parameters)
    assert_same_bits([g[-5:], beta[-5:]], list(wanted), "the last rows of gating")
    x, weight = m.normal(70000 * 16, 128), m.normal(128)
    y = gdn_kernels.layer_norm_gated(x, weight, norm_before_gate=True)
    last = gdn_kernels.layer_norm_gated(x[-5:].clone(), weight, norm_before_gate=True)
    assert_same_bits([y[-5:]], [last], "the last rows of the norm")


# ---------------------------------------------------------------------------------------------------------------
# Streams and synchronisation
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_an_operator_runs_on_the_current_stream_and_never_synchronises(name):
    make(name, CAPTURED).run()
    late, other, wanted = make(name, CAPTURED, 1), make(name, CAPTURED, 2), make(name, CAPTURED, 2)
    expected = outcome(wanted, wanted.run())
    with no_synchronisation(), side_stream():
        # a kernel on another stream would not wait for the new inputs
        torch.cuda._sleep(20_000_000)
        for buffer, new in zip(late.tensors, other.tensors, strict=True):
            buffer.copy_(new)
        found = outcome(late, late.run())
    torch.cuda.synchronize()
    assert_same_bits(found, expected, f"{name} on a side stream")


def test_the_check_for_synchronisation_can_fail():
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        x.item()


# ---------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------

HIDDEN = 256
POOL = 10


def layer(fused: bool = True, s: token_cases.Sizes = SIZES) -> gdn_nn.GatedDeltaNet:
    torch.manual_seed(0)
    made = gdn_nn.GatedDeltaNet(
        HIDDEN, s.H, s.HV, s.K, s.V, s.W, layer_id=0, fused_in_proj=fused, device="cuda", dtype=DTYPE
    )
    return made.requires_grad_(False)


def states(mixer: gdn_nn.GatedDeltaNet, seed: int = 0) -> graphs.LayerState:
    made = mixer.allocate_states(POOL)
    m = token_cases.Make(SIZES, "cuda", DTYPE, seed)
    for pool in (made.conv_state, made.recurrent_state):
        pool.copy_(m.normal(*pool.shape, dtype=torch.float32))
    return made


def batch(phase: str, tokens: int, seed: int) -> tuple[torch.Tensor, graphs.BatchMetadata]:
    """Tokens and metadata; NaN in the padded tail of a prefill and in padding rows of a decode."""
    m = token_cases.Make(SIZES, "cuda", DTYPE, seed)
    x = m.normal(tokens, HIDDEN)
    if phase == "decode":
        slots = m.slots(tokens)
        x[slots < 0] = torch.nan
        return x, graphs.BatchMetadata(slots)
    offsets = m.offsets(tokens)
    x[int(offsets[-1]) :] = torch.nan
    return x, graphs.BatchMetadata(m.slots(token_cases.SEQUENCES), offsets, m.flags(token_cases.SEQUENCES))


def real_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows that are no padding; the projections of the others are NaN."""
    return torch.isfinite(x).all(dim=1)


def metadata_tensors(metadata: graphs.BatchMetadata) -> list[torch.Tensor]:
    fields = metadata.state_indices, metadata.cu_seqlens, metadata.has_initial_state
    return [x for x in fields if x is not None]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("phase, tokens", [("prefill", CAPTURED), ("decode", 7)])
def test_a_layer_is_captured_whole_with_persistent_metadata(phase, tokens, fused):
    mixer = layer(fused)
    pools, start = states(mixer), states(mixer)
    x, metadata = batch(phase, tokens, 0)
    warm = states(mixer)
    with side_stream(), graphs.forward_context({0: warm}, metadata):
        mixer(x)
    graph = torch.cuda.CUDAGraph()
    with graphs.forward_context({0: pools}, metadata), torch.cuda.graph(graph):
        y = mixer(x)
    assert_same_bits([pools.recurrent_state, pools.conv_state], [start.recurrent_state, start.conv_state], "captured")
    for seed in (1, 2, 3):
        new_x, new = batch(phase, tokens, seed)
        x.copy_(new_x)
        for buffer, values in zip(metadata_tensors(metadata), metadata_tensors(new), strict=True):
            buffer.copy_(values)
        eager = states(mixer)
        for pool, old in ((pools.conv_state, start.conv_state), (pools.recurrent_state, start.recurrent_state)):
            pool.copy_(old)
        graph.replay()
        with graphs.forward_context({0: eager}, new):
            wanted = mixer(new_x)
        real = real_rows(new_x)
        assert_same_bits(
            [y[real], pools.conv_state, pools.recurrent_state],
            [wanted[real], eager.conv_state, eager.recurrent_state],
            f"{phase} replay {seed}",
        )
        assert torch.isfinite(wanted[real]).all() and wanted[real].any()
        assert torch.isfinite(pools.recurrent_state).all() and torch.isfinite(pools.conv_state).all()


def test_warmup_builds_the_binaries_of_stochastic_rounding():
    s = token_cases.Sizes(H=4, HV=16)
    shapes = launch.ModelShapes(
        s.H, s.HV, s.K, s.V, dtype=DTYPE, state_dtype=DTYPE, dt_bias_dtype=torch.float32, stochastic_rounding=True
    )
    assert launch.warmup(shapes).built > 0
    before = launch.binaries()
    for count in COUNTS:
        call = token_cases.make("packed_decode-rounded-rows", count, "cuda", DTYPE, 0, s)
        call.kwargs["rounding_seed"] = call.kwargs["rounding_seed"].long()
        call.run()
    assert launch.binaries() == before


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_warmup_builds_every_binary_a_layer_needs(fused):
    # heads that no other test has, so that no binary is there before
    s = token_cases.Sizes(H=3, HV=9) if fused else token_cases.Sizes(H=3, HV=12)
    shapes = launch.ModelShapes(s.H, s.HV, s.K, s.V, s.W, dtype=DTYPE)
    report = launch.warmup(shapes)
    assert report.built > 0
    mixer = layer(fused, s)
    pools = states(mixer)
    before, grown = launch.binaries(), {}
    for phase in ("prefill", "decode"):
        # the last prefill could hold a sequence that is cut
        for count in (*COUNTS, 20_000) if phase == "prefill" else COUNTS:
            x, metadata = batch(phase, count, count)
            with graphs.forward_context({0: pools}, metadata):
                mixer(x)
            if launch.binaries() != before:
                grown[f"{phase} {count}"] = launch.binaries() - before
                before = launch.binaries()
    assert not grown, f"binaries built after warm-up: {grown}"
    assert launch.warmup(shapes).built == 0


class CountingBackend:
    """Inductor, counting the graphs it compiled."""

    def __init__(self) -> None:
        self.inner, self.graphs = torch._dynamo.lookup_backend("inductor"), 0

    def __call__(self, module, inputs):
        compiled = self.inner(module, inputs)
        self.graphs += 1
        return compiled


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_a_compiled_layer_is_one_graph_with_the_bits_of_eager(fused):
    mixer = layer(fused)
    torch._dynamo.reset()
    backend = CountingBackend()
    compiled = torch.compile(mixer, backend=backend, fullgraph=True, dynamic=True)
    for phase in ("prefill", "decode"):
        for count in (16, 1, 2, 3, 64, 65, 1000, 4096):
            x, metadata = batch(phase, count, count)
            ours, theirs = states(mixer), states(mixer)
            with graphs.forward_context({0: theirs}, metadata):
                wanted = mixer(x)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            with graphs.forward_context({0: ours}, metadata):
                found = compiled(x)
            real = real_rows(x)
            assert_same_bits(
                [found[real], ours.conv_state, ours.recurrent_state],
                [wanted[real], theirs.conv_state, theirs.recurrent_state],
                f"{phase} of {count}",
            )
    assert backend.graphs == 1


@pytest.mark.parametrize("phase, tokens", [("prefill", CAPTURED), ("decode", 7)])
def test_inductors_graph_partition_captures_what_lies_around_the_split_point(phase, tokens):
    """Pieces in CUDA graphs, the core outside with each call's own metadata."""
    mixer = layer()
    torch._dynamo.reset()
    split = {"graph_partition": True, "custom_should_partition_ops": ["gdn::linear_attention_with_output"]}
    with torch._inductor.config.patch(split):
        compiled = torch.compile(mixer, mode="reduce-overhead", fullgraph=True, dynamic=False)
        # the first call warms up, the second records, the others replay
        for seed in range(6):
            x, metadata = batch(phase, tokens, seed)
            ours, theirs = states(mixer, seed), states(mixer, seed)
            with graphs.forward_context({0: theirs}, metadata):
                wanted = mixer(x)
            torch.compiler.cudagraph_mark_step_begin()
            with graphs.forward_context({0: ours}, metadata):
                found = compiled(x)
            real = real_rows(x)
            assert_same_bits(
                [found[real], ours.conv_state, ours.recurrent_state],
                [wanted[real], theirs.conv_state, theirs.recurrent_state],
                f"{phase} call {seed}",
            )


@pytest.mark.parametrize(
    "name",
    ["layer_norm_gated-column-views", "split_qkvz_ba-column-views", "chunk_gated_delta_rule_paged-tokens"]
    + ["packed_decode-rows", "causal_conv1d-tokens"],
)
def test_a_compiled_operator_is_one_graph_over_strided_views(name):
    torch._dynamo.reset()
    backend = CountingBackend()
    # a first count that is no other number of the call, which Dynamo would take for the same symbol
    first = make(name, 23)
    operator, options = getattr(gdn_kernels, first.operator), first.kwargs
    constants = {key: x for key, x in options.items() if not isinstance(x, torch.Tensor)}

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def compiled(args, tensors):
        return operator(*args, **tensors, **constants)

    for count in (23, 2, 3, 16, 17, 64, 100, 1000, 4096):
        call, eager = make(name, count), make(name, count)
        tensors = {key: x for key, x in call.kwargs.items() if isinstance(x, torch.Tensor)}
        found = outcome(call, compiled(call.args, tensors))
        assert_same_bits(found, outcome(eager, eager.run()), f"{name} at {count}")
    assert backend.graphs == 1
