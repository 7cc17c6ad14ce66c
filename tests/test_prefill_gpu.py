"""Prefill of long sequences on a GPU: segments, both sizes of program, the portable kernels, and bits in any batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from delta_cases import assert_close, delta_inputs, oracle

import gdn_kernels
from gdn_kernels import launch

pytestmark = pytest.mark.gpu

BUDGET = 5e-3
SEGMENTS = launch.SegmentConfig(max_segments=8, min_tokens=256, long_tokens=512, map_tokens=512)
# the ladder's kind: few segments, or many of twice as many tokens
MANY_SEGMENTS = launch.SegmentConfig(max_segments=2, min_tokens=64, long_tokens=128, map_tokens=512, most_segments=6)
SHAPES = {"64x64": (64, 64), "128x128": (128, 128), "128x64": (128, 64), "64x128": (64, 128)}


def run(inputs, **options):
    torch.full((1 << 24,), torch.nan, device="cuda")  # freed: what a kernel leaves unwritten shows
    state = inputs.initial_state
    return gdn_kernels.chunk_gated_delta_rule(
        *inputs.tensors, initial_state=state, cu_seqlens=inputs.cu_seqlens, **options
    )


def one_of(inputs, n):
    """Rows of sequence ``n``, and the sequence by itself."""
    start, end = inputs.cu_seqlens[n : n + 2].tolist()
    rows = slice(start, end)
    alone = {name: getattr(inputs, name)[:, rows].contiguous() for name in ("q", "k", "v", "g", "beta")}
    alone["cu_seqlens"] = torch.tensor([0, end - start], dtype=torch.int32, device="cuda")
    return rows, dataclasses.replace(inputs, initial_state=inputs.initial_state[n : n + 1], **alone)


def check(inputs, o, state):
    wanted_o, wanted_state = oracle(inputs, initial_state=inputs.initial_state)
    real = inputs.real_tokens
    assert_close(o[:, :real], wanted_o[:, :real], BUDGET, "o")
    assert_close(state, wanted_state, BUDGET, "state")
    assert torch.equal(o[:, real:], torch.zeros_like(o[:, real:]))


@pytest.mark.parametrize("gates", ["random", "none", "strong"])
@pytest.mark.parametrize("keys", ["random", "positive", "identical"])
@pytest.mark.parametrize("shape", SHAPES)
def test_segments_match_fp64(shape, keys, gates):
    # with g = 0 a wrong map shows, which decay would hide
    K, V = SHAPES[shape]
    lengths = (1030, 0, 255, 256, 513, 2085)
    options = {"device": "cuda", "padding": 9, "keys": keys, "gates": gates}
    inputs = delta_inputs(lengths, H=2, HV=4, K=K, V=V, dtype=torch.bfloat16, **options)
    with launch.pinned("chunk_segments", SEGMENTS):
        check(inputs, *run(inputs))


@pytest.mark.parametrize("gates", ["random", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(8192, 70), (70, 0, 9300)], ids=str)
def test_the_ladders_segments_match_fp64(lengths, dtype, gates):
    inputs = delta_inputs(lengths, H=1, HV=4, K=128, V=128, dtype=dtype, device="cuda", gates=gates)
    check(inputs, *run(inputs))


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_queries_and_keys_of_any_length(dtype, K):
    # products of theirs exceed what fp16 holds; several items a program, some without a chunk
    lengths = (100, 1, 0, 64, 200) * 9
    inputs = delta_inputs(lengths, H=8, HV=16, K=K, V=128, dtype=dtype, device="cuda")
    token = torch.arange(inputs.q.shape[1], device="cuda")[None, :, None, None]
    q, k = inputs.q * 2.0 ** (token % 13), inputs.k * 2.0 ** (token * 5 % 13)
    inputs = dataclasses.replace(inputs, q=q.to(dtype), k=k.to(dtype))
    assert (inputs.q[:, :64].float().permute(0, 2, 1, 3) @ inputs.k[:, :64].float().permute(0, 2, 3, 1)).max() > 2**20
    wanted, wanted_state = oracle(inputs, initial_state=inputs.initial_state, use_qk_l2norm=True)
    found = []
    for config in (launch.HOPPER_SCAN_NARROW, launch.HOPPER_SCAN_WIDE):
        with launch.pinned("chunk_hopper_scan", config):
            o, state = run(inputs, use_qk_l2norm=True)
        assert_close(o, wanted, BUDGET, "o")
        assert_close(state, wanted_state, BUDGET, "state")
        found.append((o, state))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("use_qk_l2norm", [False, True])
@pytest.mark.parametrize("config", [launch.HOPPER_SCAN_NARROW, launch.HOPPER_SCAN_WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("scale", [3.0, 1e-3, 0.0, -0.5])
def test_scales_of_any_sign(scale, config, use_qk_l2norm):
    inputs = delta_inputs((100, 70), H=2, HV=4, K=128, V=128, dtype=torch.bfloat16, device="cuda")
    options = {"scale": scale, "use_qk_l2norm": use_qk_l2norm}
    with launch.pinned("chunk_hopper_scan", config):
        o, state = run(inputs, **options)
    wanted_o, wanted_state = oracle(inputs, initial_state=inputs.initial_state, **options)
    real = inputs.real_tokens
    assert_close(state, wanted_state, BUDGET, "state")
    if scale == 0:
        assert torch.equal(o, torch.zeros_like(o))
    else:
        assert_close(o[:, :real], wanted_o[:, :real], BUDGET, "o")


@pytest.mark.parametrize("kernel", ["narrow", "wide", "portable", "segments", "many segments"])
def test_a_sequence_has_the_same_bits_in_any_batch(kernel):
    lengths = (700, 64, 1, 1500, 333)
    inputs = delta_inputs(lengths, H=2, HV=4, K=128, V=128, dtype=torch.bfloat16, device="cuda", padding=40)
    pins = {
        "narrow": ("chunk_hopper_scan", launch.HOPPER_SCAN_NARROW),
        "wide": ("chunk_hopper_scan", launch.HOPPER_SCAN_WIDE),
        "portable": ("chunk_scan", launch.scan_config(128, launch.target(torch.device("cuda")))),
        "segments": ("chunk_segments", SEGMENTS),
        "many segments": ("chunk_segments", MANY_SEGMENTS),
    }
    with launch.pinned(*pins[kernel]):
        o, state = run(inputs)
        again = run(inputs)
        assert torch.equal(o, again[0]) and torch.equal(state, again[1])
        check(inputs, o, state)
        for n in range(len(lengths)):
            rows, one = one_of(inputs, n)
            alone = run(one)
            assert torch.equal(o[:, rows], alone[0]), n
            assert torch.equal(state[n], alone[1][0]), n
            whole = run(dataclasses.replace(one, cu_seqlens=None))
            assert torch.equal(alone[0], whole[0]) and torch.equal(alone[1], whole[1]), n


@pytest.mark.parametrize("V", [64, 128])
@pytest.mark.parametrize("cut", [False, True])
def test_more_sequences_than_programs_have_their_own_results(cut, V):
    # taken longest first: of 150 sequences each has the bits that it has alone
    random = torch.Generator().manual_seed(5)
    lengths = torch.randint(0, 200, (150,), generator=random).tolist()
    lengths[40], lengths[149], lengths[0] = 1400, 1100, 0
    inputs = delta_inputs(lengths, H=1, HV=2, K=128, V=V, dtype=torch.bfloat16, device="cuda", padding=70)
    with launch.pinned("chunk_segments", SEGMENTS if cut else launch.NO_SEGMENTS):
        o, state = run(inputs)
        check(inputs, o, state)
        for n in (1, 40, 41, 77, 148, 149):
            rows, one = one_of(inputs, n)
            alone = run(dataclasses.replace(one, cu_seqlens=one.cu_seqlens.long()))
            assert torch.equal(o[:, rows], alone[0]) and torch.equal(state[n], alone[1][0]), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", [1.0, 3.9, 4.1, 99.0, 101.0, 4000.0])
def test_chunks_on_either_side_of_strong_decay(dtype, decay):
    # log2 of what a chunk decays by, and heads that decay less beside it
    inputs = delta_inputs((256, 100), H=1, HV=4, K=128, V=128, dtype=dtype, device="cuda", gates="none")
    inputs.g[:] = -decay * 0.6931471805599453 / 64 * torch.tensor([1.0, 0.5, 1.0, 0.01], device="cuda")
    for config in (launch.HOPPER_SCAN_NARROW, launch.HOPPER_SCAN_WIDE):
        with launch.pinned("chunk_hopper_scan", config):
            check(inputs, *run(inputs))
    portable = launch.scan_config(128, launch.target(torch.device("cuda")))
    with launch.pinned("chunk_scan", portable):
        check(inputs, *run(inputs))
    with launch.pinned("chunk_segments", dataclasses.replace(SEGMENTS, min_tokens=64, long_tokens=128)):
        check(inputs, *run(inputs))


# log2 of what a segment of 9 chunks decays by: 32 is what makes it forget where it started
@pytest.mark.parametrize("size", ["narrow", "wide"])
@pytest.mark.parametrize("map_tokens", [1024, 2048, launch.NEVER])
@pytest.mark.parametrize("decays", [(0.0, 31.9, 32.1, 0.0), (250.0, 33.0, 64.1, 500.0), (0.5, 0.0, 31.0, 8.0)], ids=str)
def test_segments_that_forget_beside_those_that_do_not(decays, map_tokens, size):
    lengths = (2200, 0, 100, 1024)
    inputs = delta_inputs(lengths, H=2, HV=4, K=128, V=128, dtype=torch.bfloat16, device="cuda", padding=3)
    inputs.g[:] = torch.tensor(decays, device="cuda") * (-0.6931471805599453 / 576)
    # one head changes from segment to segment: it forgets in the second and remembers in the others
    inputs.g[:, :2200, 3] = 0.0
    inputs.g[:, 1000:1024, 3] = -1.5
    config = launch.SegmentConfig(max_segments=4, min_tokens=512, long_tokens=1024, map_tokens=map_tokens)
    scan, maps = launch.HOPPER_SCAN_WIDE, launch.HOPPER_MAP_WIDE
    if size == "narrow":
        scan, maps = launch.HOPPER_SCAN_NARROW, launch.HOPPER_MAP_NARROW
    with launch.pinned("chunk_segments", config):
        with launch.pinned("chunk_map", maps), launch.pinned("chunk_hopper_scan", scan):
            o, state = run(inputs)
            check(inputs, o, state)
            again = run(inputs)
        other = run(inputs)
        # in place, in slots out of order
        pool = torch.full((6, 4, 128, 128), torch.nan, device="cuda")
        slots = torch.tensor([5, -1, 0, 3], dtype=torch.int32, device="cuda")
        pool[[5, 0, 3]] = inputs.initial_state[[0, 2, 3]]
        out = torch.full_like(inputs.v, torch.nan)
        gdn_kernels.chunk_gated_delta_rule_paged(*inputs.tensors, pool, out, slots, inputs.cu_seqlens)
    assert torch.equal(o, again[0]) and torch.equal(state, again[1])
    assert torch.equal(o, other[0]) and torch.equal(state, other[1])
    assert torch.equal(o, out) and torch.equal(state[[0, 2, 3]], pool[[5, 0, 3]]) and pool[[1, 2, 4]].isnan().all()


def test_heads_that_do_not_forget_are_walked_whole():
    inputs = delta_inputs((2200, 1100), H=1, HV=2, K=128, V=128, dtype=torch.bfloat16, device="cuda", gates="none")
    inputs.g[:, :, 1] = -0.001
    found = []
    for config in (launch.NO_SEGMENTS, launch.SegmentConfig(max_segments=4, min_tokens=512, long_tokens=1024)):
        with launch.pinned("chunk_segments", config):
            found.append(run(inputs))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_segment_that_forgets_starts_from_its_last_chunks():
    # a chunk decays by 2^-8, so the last four of a segment are what the next one starts from, and no other
    inputs = delta_inputs((1024,), H=1, HV=2, K=128, V=128, dtype=torch.bfloat16, device="cuda", gates="none")
    inputs.g[:] = -8 * 0.6931471805599453 / 64
    with launch.pinned("chunk_segments", launch.SegmentConfig(max_segments=2, min_tokens=512, long_tokens=1024)):
        o, state = run(inputs)
    check(inputs, o, state)
    last = [x[:, 256:].contiguous() for x in inputs.tensors]
    with launch.pinned("chunk_segments", launch.NO_SEGMENTS):
        wanted, wanted_state = gdn_kernels.chunk_gated_delta_rule(*last)
    assert torch.equal(o[:, 512:], wanted[:, 256:]) and torch.equal(state, wanted_state)


def test_throughput_leaves_full_batches_whole():
    # 5 sequences of 8 heads: invariant cuts the long one, throughput does not; replays do not outlive the policy
    # (with decay a segment forgets where it started from, and its bits are those of the whole)
    inputs = delta_inputs((8192, 1, 1, 1, 1), H=1, HV=8, K=64, V=64, dtype=torch.bfloat16, device="cuda", gates="none")
    cut = run(inputs)
    try:
        launch.use_prefill_policy("throughput")
        whole = run(inputs)
    finally:
        launch.use_prefill_policy("invariant")
    with launch.pinned("chunk_segments", launch.NO_SEGMENTS):
        assert torch.equal(whole[0], run(inputs)[0])
    assert not torch.equal(whole[0], cut[0])
    assert torch.equal(run(inputs)[0], cut[0])


def test_a_program_of_either_size_gives_the_same_bits():
    inputs = delta_inputs((300, 129), H=1, HV=4, K=128, V=128, dtype=torch.bfloat16, device="cuda")
    found = []
    for config in (
        launch.HOPPER_SCAN_NARROW,
        launch.HOPPER_SCAN_WIDE,
        dataclasses.replace(launch.HOPPER_SCAN_WIDE, stages=2),
    ):
        with launch.pinned("chunk_hopper_scan", config):
            found.append(run(inputs))
    for o, state in found[1:]:
        assert torch.equal(o, found[0][0]) and torch.equal(state, found[0][1])


@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 7])
def test_heads_whose_gates_are_loaded_together_have_the_bits_of_one_alone(ratio, is_raw):
    # so many chunks that a program of the inverses takes several value heads; of a sequence alone it takes one
    lengths = [(37 * i) % 129 for i in range(200)]
    inputs = delta_inputs(lengths, H=2, HV=2 * ratio, K=128, V=64, dtype=torch.bfloat16, device="cuda", padding=70)
    options = {}
    if is_raw:
        random = torch.Generator("cuda").manual_seed(7)
        A_log, dt_bias = torch.randn(2, 2 * ratio, generator=random, device="cuda")
        options = {"use_qk_l2norm": True, "A_log": A_log, "dt_bias": dt_bias}
        inputs = dataclasses.replace(inputs, g=inputs.g.bfloat16(), beta=inputs.beta.bfloat16())
    o, state = run(inputs, **options)
    for n in (1, 2, 100, 198, 199):
        rows, one = one_of(inputs, n)
        alone = run(one, **options)
        assert torch.equal(o[:, rows], alone[0]) and torch.equal(state[n], alone[1][0]), n
    assert not o[:, inputs.real_tokens :].any()


@pytest.mark.parametrize("size", ["narrow", "wide"])
def test_a_program_walks_many_short_sequences(size):
    # far more states than SMs: copies run ahead into the next sequence, over empty ones and those without a slot
    lengths = (1, 63, 64, 65, 700, 0, 129, 300, 5) * 3
    inputs = delta_inputs(lengths, H=2, HV=16, K=128, V=128, dtype=torch.bfloat16, device="cuda", padding=9)
    pin = launch.HOPPER_SCAN_NARROW if size == "narrow" else launch.HOPPER_SCAN_WIDE
    with launch.pinned("chunk_hopper_scan", pin):
        o, state = run(inputs)
        check(inputs, o, state)
        # the same from a pool, where every fourth sequence has no slot and every fifth no state to start from
        slots = torch.arange(len(lengths), 0, -1, dtype=torch.int32, device="cuda")
        pool = torch.zeros(len(lengths) + 1, 16, 128, 128, device="cuda")
        pool[slots.long()] = inputs.initial_state
        slots[::4] = -1
        known = torch.ones(len(lengths), dtype=torch.bool, device="cuda")
        known[::5] = False
        before, out = pool.clone(), torch.full_like(inputs.v, torch.nan)
        gdn_kernels.chunk_gated_delta_rule_paged(
            *inputs.tensors, pool, out, slots, inputs.cu_seqlens, has_initial_state=known
        )
        fresh = gdn_kernels.chunk_gated_delta_rule(*inputs.tensors, cu_seqlens=inputs.cu_seqlens)
    start = 0
    for n, length in enumerate(lengths):
        rows = slice(start, start + length)
        start += length
        if n % 4 == 0:
            assert not out[:, rows].any(), n
            assert torch.equal(pool[len(lengths) - n], before[len(lengths) - n]), n
        else:
            wanted_o, wanted_state = (o, state) if known[n] else fresh
            assert torch.equal(out[:, rows], wanted_o[:, rows]), n
            wanted = wanted_state[n] if length else before[len(lengths) - n]
            assert torch.equal(pool[len(lengths) - n], wanted), n
    assert torch.equal(out[:, start:], torch.zeros_like(out[:, start:]))


@pytest.mark.parametrize("apart", [0, 8, 1], ids=["packed", "apart", "unaligned"])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_that_come_as_tiles(dtype, K, apart):
    # into the stages of wide programs, where their slots lie on 16 bytes; narrow ones load them
    lengths = (100, 1, 0, 64, 200) * 9
    inputs = delta_inputs(lengths, H=2, HV=16, K=K, V=128, dtype=torch.bfloat16, device="cuda")
    slots = torch.arange(len(lengths), 0, -1, dtype=torch.int32, device="cuda")
    size = 16 * 128 * K
    found = []
    for config in (launch.HOPPER_SCAN_NARROW, launch.HOPPER_SCAN_WIDE):
        pool = torch.zeros(len(lengths) + 1, size + apart, dtype=dtype, device="cuda")
        pool = pool[:, :size].view(-1, 16, 128, K)
        pool[slots.long()] = inputs.initial_state.to(dtype)
        out = torch.full_like(inputs.v, torch.nan)
        with launch.pinned("chunk_hopper_scan", config):
            gdn_kernels.chunk_gated_delta_rule_paged(*inputs.tensors, pool, out, slots, inputs.cu_seqlens)
        found.append((out, pool))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    given = inputs.initial_state.to(dtype).float()
    wanted, _ = oracle(dataclasses.replace(inputs, initial_state=given), initial_state=given)
    assert_close(out, wanted, BUDGET, "o")


def test_states_that_come_as_tiles_are_whole():
    # a stage is given back once its state is in registers: were it before, a row in a million would be another chunk's
    inputs = delta_inputs((256,) * 64, H=8, HV=32, K=128, V=128, dtype=torch.bfloat16, device="cuda")
    with launch.pinned("chunk_hopper_scan", launch.HOPPER_SCAN_NARROW):
        o, state = run(inputs)
    for _ in range(20):
        with launch.pinned("chunk_hopper_scan", launch.HOPPER_SCAN_WIDE):
            again = run(inputs)
        assert torch.equal(again[0], o) and torch.equal(again[1], state)


def test_rows_without_offsets_and_padding_between_them():
    # rows of a batch lie apart: each has its own tail
    inputs = delta_inputs((400,), H=1, HV=2, K=128, V=128, dtype=torch.bfloat16, device="cuda")
    states = torch.cat([inputs.initial_state] * 4)
    tensors = [x.view(4, 100, *x.shape[2:]) for x in map(torch.Tensor.contiguous, inputs.tensors)]
    o, state = gdn_kernels.chunk_gated_delta_rule(*tensors, initial_state=states)
    offsets = torch.arange(0, 401, 100, dtype=torch.int32, device="cuda")
    packed = gdn_kernels.chunk_gated_delta_rule(*inputs.tensors, initial_state=states, cu_seqlens=offsets)
    assert torch.equal(o.view(1, 400, 2, 128), packed[0]) and torch.equal(state, packed[1])


@pytest.mark.parametrize("interval", [64, 192])
def test_checkpoints_and_slots_where_segments_are_asked_for(interval):
    # the last segment writes a slot beside the first, which reads it
    lengths = (1100, 300, 640)
    inputs = delta_inputs(lengths, H=1, HV=4, K=128, V=128, dtype=torch.bfloat16, device="cuda", gates="none")
    pool = torch.zeros(6, 4, 128, 128, device="cuda")
    slots = torch.tensor([4, -1, 2], dtype=torch.int32, device="cuda")
    pool[slots[[0, 2]].long()] = inputs.initial_state[[0, 2]]
    known = torch.tensor([True, True, False], device="cuda")
    counts = [length // interval for length in lengths]
    at = torch.tensor([0, counts[0], counts[0] + counts[1], sum(counts)], dtype=torch.int32, device="cuda")
    kept = torch.full((sum(counts), 4, 128, 128), torch.nan, device="cuda")
    out = torch.full_like(inputs.v, torch.nan)
    with launch.pinned("chunk_segments", SEGMENTS):
        gdn_kernels.chunk_gated_delta_rule_paged_checkpoints(
            *inputs.tensors, pool, out, kept, slots, inputs.cu_seqlens, at,
            checkpoint_interval=interval, has_initial_state=known,
        )  # fmt: skip
    initial = inputs.initial_state.clone()
    initial[2] = 0
    start = 0
    for n, length in enumerate(lengths):
        rows = slice(start, start + length)
        start += length
        if n == 1:
            assert not out[:, rows].any()
            assert kept[int(at[1]) : int(at[2])].isnan().all()
            continue
        for each in range(1, counts[n] + 1):
            cut = slice(rows.start, rows.start + each * interval)
            part = [x[:, cut] for x in inputs.tensors]
            wanted = dataclasses.replace(
                inputs, **dict(zip("qkvg", part[:4], strict=True)), beta=part[4], initial_state=initial[n : n + 1],
                cu_seqlens=torch.tensor([0, each * interval]),
            )  # fmt: skip
            _, state = oracle(wanted, initial_state=wanted.initial_state)
            assert_close(kept[int(at[n]) + each - 1], state[0], BUDGET, f"checkpoint {each} of {n}")
            if each > 3:
                break
        part = [x[:, rows] for x in inputs.tensors]
        wanted = dataclasses.replace(
            inputs, **dict(zip("qkvg", part[:4], strict=True)), beta=part[4], initial_state=initial[n : n + 1],
            cu_seqlens=torch.tensor([0, length]),
        )  # fmt: skip
        o, state = oracle(wanted, initial_state=wanted.initial_state)
        assert_close(out[:, rows], o, BUDGET, "o")
        assert_close(pool[slots[n]], state[0], BUDGET, "state")


def test_heads_that_lie_apart_take_the_portable_kernels():
    inputs = delta_inputs((200,), H=2, HV=4, K=64, V=64, dtype=torch.bfloat16, device="cuda")
    wide = torch.zeros(1, 200, 2, 80, dtype=torch.bfloat16, device="cuda")
    wide[..., :64] = inputs.q
    o, state = gdn_kernels.chunk_gated_delta_rule(
        wide[..., :64], *inputs.tensors[1:], initial_state=inputs.initial_state, cu_seqlens=inputs.cu_seqlens
    )
    check(inputs, o, state)
