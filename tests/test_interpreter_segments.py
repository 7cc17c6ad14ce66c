"""Where sequences are cut into segments, and how the segments' states join, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from delta_cases import assert_close

from gdn_kernels import launch
from gdn_kernels.kernels import chunk_segments

pytestmark = pytest.mark.interpreter

# fp32 products of 64 or 128 numbers, of segments that follow each other
BUDGET = 1e-6
LENGTHS = (0, 1, 2048, 63, 5000, 64, 1023, 0, 1024, 1025, 9000, 2047, 3001)


def settings(max_segments, min_tokens=1024, long_tokens=None, most_segments=1):
    """Sequences of two shortest segments are long already, where no other bound is named."""
    long_tokens = 2 * min_tokens if long_tokens is None else long_tokens
    return launch.SegmentConfig(
        max_segments, min_tokens, long_tokens, long_tokens, most_segments, block_v=32, num_warps=4, num_stages=2
    )


def offsets(lengths, first=0):
    return torch.tensor([first, *lengths]).cumsum(0).to(torch.int32)


def num_maps(count, tokens, cu_seqlens, config):
    return chunk_segments.num_places(count, tokens, cu_seqlens, config, config.long_tokens)


def first_place(n, start, config):
    """Of a packed sequence, past those of all sequences."""
    most = max(config.max_segments, config.most_segments) - 1
    return min(int(start) // chunk_segments.tokens_a_place(config, config.long_tokens), n * most)


def cut(length, config):
    """First chunk and number of chunks of every segment of a sequence."""
    chunks = -(-length // 64)
    segments = 1
    if length >= config.long_tokens:
        few = min(config.max_segments, length // config.min_tokens)
        segments = max(1, few, min(config.most_segments, length // config.min_tokens // 2))
    per_segment = -(-chunks // segments)
    return [(first, min(per_segment, chunks - first)) for first in range(0, chunks, max(1, per_segment))] or [(0, 0)]


@triton.jit
def table_kernel(
    out_ptr,
    cu_seqlens_ptr,
    N: tl.int32,
    T: tl.int32,
    SEGMENTS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    n, segment, segments, per_segment, first_chunk, chunks, batch, start, length = chunk_segments.segment_of(
        cu_seqlens_ptr, place, tl.arange(0, 8), N, T, SEGMENTS, SEGMENTS.long_tokens
    )
    row = out_ptr + place * 9
    tl.store(row, n)
    tl.store(row + 1, segment)
    tl.store(row + 2, segments)
    tl.store(row + 3, first_chunk)
    tl.store(row + 4, chunks)
    tl.store(row + 5, batch)
    tl.store(row + 6, start)
    tl.store(row + 7, length)
    tl.store(row + 8, per_segment)


def table(cu_seqlens, count, tokens, config, extra=0):
    """What ``segment_of`` says of every place, and of ``extra`` more."""
    places = count + num_maps(count, tokens, cu_seqlens, config) + extra
    out = torch.full((places, 9), -7, dtype=torch.int64)
    table_kernel[(places,)](out, cu_seqlens, count, tokens, SEGMENTS=config)
    return out


def check_table(found, lengths, config, cu_seqlens=None):
    """Every segment is at its place with its facts, those with a map in order; every other place has none."""
    wanted = {}
    for n, length in enumerate(lengths):
        parts = cut(length, config)
        batch, start = (n, 0) if cu_seqlens is None else (0, int(cu_seqlens[n]))
        per_segment = max(1, parts[0][1])
        rows = [[n, j, len(parts), *part, batch, start, length, per_segment] for j, part in enumerate(parts)]
        wanted[n] = rows.pop()
        number = n * len(rows) if cu_seqlens is None else first_place(n, start, config)
        for j, row in enumerate(rows):
            place = len(lengths) + number + j
            assert place not in wanted
            wanted[place] = row
    rows = found.tolist()
    assert max(wanted) < len(rows)
    for place, row in enumerate(rows):
        if place in wanted:
            assert row == wanted[place], place
        else:
            assert 0 <= row[0] < len(lengths) and row[1] == row[2] and row[4] == 0, place


# 3001 tokens are long by the second bound, and not by the third
@pytest.mark.parametrize("long_tokens", [1024, 3001, 3002])
@pytest.mark.parametrize("max_segments", range(1, 9))
def test_every_segment_of_a_ragged_batch_has_one_place(max_segments, long_tokens):
    config = settings(max_segments, long_tokens=long_tokens)
    cu_seqlens = offsets(LENGTHS)
    tokens = int(cu_seqlens[-1]) + 7
    check_table(table(cu_seqlens, len(LENGTHS), tokens, config, extra=2), LENGTHS, config, cu_seqlens)


@pytest.mark.parametrize("long_tokens", [1024, 4096, 6000])
@pytest.mark.parametrize("max_segments, most_segments", [(2, 4), (3, 4), (4, 3), (2, 8)])
def test_many_segments_of_twice_as_many_tokens(max_segments, most_segments, long_tokens):
    config = settings(max_segments, long_tokens=long_tokens, most_segments=most_segments)
    lengths = (*LENGTHS, 2 * 1024 * most_segments, 6000, 30000, 8191, 2 * 1024 * most_segments - 1)
    cu_seqlens = offsets(lengths)
    check_table(table(cu_seqlens, len(lengths), int(cu_seqlens[-1]), config, extra=2), lengths, config, cu_seqlens)
    for length in (4095, 8192, 30000):
        check_table(table(None, 3, length, config, extra=2), (length,) * 3, config)
        assert chunk_segments.num_segments(length, config) == len(cut(length, config))
    assert chunk_segments.num_segments(30000, config) == max(max_segments, most_segments)


@pytest.mark.parametrize("most_segments", [1, 8])
def test_many_long_sequences_back_to_back_do_not_share_a_place(most_segments):
    # as in the ladder: those with maps are longer than the most segments of the fewest tokens
    config = settings(4, 64, 512, most_segments)
    for length in (*range(512, 700, 8), 1024, 1500):
        lengths = (length,) * 5
        cu_seqlens = offsets(lengths, 13)
        check_table(table(cu_seqlens, 5, int(cu_seqlens[-1]), config), lengths, config, cu_seqlens)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("long_tokens", [1024, 3001, 3002])
@pytest.mark.parametrize("max_segments", [1, 3, 8])
def test_rows_of_one_length_are_cut_like_a_packed_sequence(length, max_segments, long_tokens):
    config = settings(max_segments, long_tokens=long_tokens)
    check_table(table(None, 3, length, config, extra=2), (length,) * 3, config)


def test_segments_are_whole_chunks_none_of_them_empty():
    # 5 chunks by 4 segments: two each, so three segments; and every chunk is in one
    assert cut(5 * 64, settings(4, 64)) == [(0, 2), (2, 2), (4, 1)]
    config = settings(8, 64)
    for tokens in range(64 * 20):
        found = cut(tokens, config)
        assert sum(chunks for _, chunks in found) == -(-tokens // 64) and all(chunks for _, chunks in found if tokens)
        assert (len(found) > 1) is (tokens >= config.long_tokens)
        assert num_maps(2, tokens, None, config) == 2 * (len(found) - 1)
    lengths = (5 * 64, 300, 19 * 64 + 1, 127, 128)
    cu_seqlens = offsets(lengths)
    check_table(table(cu_seqlens, len(lengths), sum(lengths), config), lengths, config, cu_seqlens)


@pytest.mark.parametrize("min_tokens", [64, 1024])
def test_segments_back_to_back_do_not_share_a_place(min_tokens):
    # as many maps as there can be, from every remainder of the first token by min_tokens
    config = settings(8, min_tokens)
    for first in (0, 1, min_tokens - 1):
        lengths = (2 * min_tokens, 2 * min_tokens, 3 * min_tokens - 1, 0, 8 * min_tokens, 2 * min_tokens)
        cu_seqlens = offsets(lengths, first)
        check_table(table(cu_seqlens, len(lengths), int(cu_seqlens[-1]), config), lengths, config, cu_seqlens)


def test_few_long_sequences_have_no_more_places_than_segments():
    config = settings(8, 1024, 8192)
    for lengths, wanted in (((32768,), 7), ((28672, 4096), 14), ((8192,) * 4, 28), ((4000,) * 8, 27)):
        cu_seqlens = offsets(lengths)
        assert num_maps(len(lengths), sum(lengths), cu_seqlens, config) == wanted
        check_table(table(cu_seqlens, len(lengths), sum(lengths), config), lengths, config, cu_seqlens)


def test_offsets_that_begin_past_zero():
    lengths, config = (2500, 100), settings(8)
    cu_seqlens = offsets(lengths, first=3000)
    check_table(table(cu_seqlens, 2, 6000, config), lengths, config, cu_seqlens)


def segment_maps(count, HV, V, K, gates, seed=0):
    """B of unit variance; A orthogonal, as reflections make it, with decay or without, or near the identity."""
    random = torch.Generator().manual_seed(seed)
    square = torch.randn(count, HV, K, K, generator=random, dtype=torch.float64)
    A = torch.linalg.qr(square).Q
    if gates == "decay":
        A = A * torch.rand(count, HV, 1, 1, generator=random, dtype=torch.float64)
    elif gates == "near-identity":
        A = torch.eye(K, dtype=torch.float64) - 0.01 * square / K**0.5
    B = torch.randn(count, HV, V, K, generator=random, dtype=torch.float64)
    return torch.cat([B, A], dim=2).float()


def check(
    lengths, config, gates, *, HV=2, V=64, K=64, initial=None, read=None, known=None, dense=False, first=0, some=True,
    forgotten=0.0,
):  # fmt: skip
    """Run ``combine`` and compare every start with fp64; what is not one keeps its NaN. ``some``: there is one.
    ``forgotten``: of so many of the maps and heads the map is not there, and the start is where a map follows."""
    count = len(lengths)
    cu_seqlens = None if dense else offsets(lengths, first)
    tokens = lengths[0] if dense else int(cu_seqlens[-1])
    parts = [cut(length, config) for length in lengths]
    if dense:
        firsts = [n * (len(parts[0]) - 1) for n in range(count)]
    else:
        firsts = [first_place(n, start, config) for n, start in enumerate(cu_seqlens[:-1])]
    places = num_maps(count, tokens, cu_seqlens, config)
    maps = segment_maps(places, HV, V, K, gates)
    # what is no segment's map holds NaN
    used = torch.zeros(places, dtype=torch.bool)
    for number, found in zip(firsts, parts, strict=True):
        used[number : number + len(found) - 1] = True
    assert used.sum() == sum(len(found) - 1 for found in parts)
    maps[~used] = torch.nan
    starts = torch.full((places, HV, V, K), torch.nan)
    forgets = torch.rand(places, HV, generator=torch.Generator().manual_seed(3)) < forgotten
    forgets &= used[:, None]
    # a start that is not joined to a map is not there
    kinds = forgets.int()
    for number, found in zip(firsts, parts, strict=True):
        for j in range(number, number + len(found) - 1):
            alone = j == number + len(found) - 2
            kinds[j] += (forgets[j] & (alone or forgets[j + 1])).int()
    there = maps[:, :, :V][kinds == 1]
    maps[forgets] = torch.nan
    starts[kinds == 1] = there
    given = maps.clone()
    chunk_segments.combine(
        maps,
        starts,
        kinds,
        initial,
        cu_seqlens=cu_seqlens,
        count=count,
        tokens=tokens,
        read=None if read is None else torch.tensor(read, dtype=torch.int32),
        has_initial_state=None if known is None else torch.tensor(known),
        pad_slot_id=-1,
        config=config,
    )
    wanted = torch.full(starts.shape, torch.nan, dtype=torch.float64)
    wanted[kinds == 1] = there.double()
    for n, number in enumerate(firsts):
        slot = n if read is None else read[n]
        if read is not None and not 0 <= slot < initial.shape[0]:
            continue
        S = torch.zeros(HV, V, K, dtype=torch.float64)
        if initial is not None and (known is None or known[n]):
            S = initial[slot].double()
        for j in range(len(parts[n]) - 1):
            B, A = given[number + j].double().split([V, K], dim=1)
            S = torch.where(forgets[number + j, :, None, None], wanted[number + j], S @ A + B)
            wanted[number + j] = S
    assert torch.equal(maps.nan_to_num(), given.nan_to_num())
    written = ~wanted.isnan()
    assert torch.equal(~starts.isnan(), written)
    assert bool(written.any()) is some
    if some:
        assert_close(starts[written], wanted[written], BUDGET, "starts")


STATES = torch.randn(6, 2, 64, 64, generator=torch.Generator().manual_seed(1))


# Without decay: where states fade, a wrong map goes unseen.
@pytest.mark.parametrize("gates", ["decay", "none", "near-identity"])
@pytest.mark.parametrize("max_segments", [2, 3, 8])
def test_starts_match_the_maps_in_sequence(gates, max_segments):
    lengths = (64, 5 * 64, 0, 700, 20 * 64 + 1, 127)
    check(lengths, settings(max_segments, 64), gates, initial=STATES)


def test_starts_of_many_segments_of_twice_as_many_tokens():
    lengths = (64, 5 * 64, 0, 700, 20 * 64 + 1, 127)
    check(lengths, settings(3, 64, most_segments=6), "none", initial=STATES)


@pytest.mark.parametrize("forgotten", [0.4, 1.0])
@pytest.mark.parametrize("max_segments", [2, 8])
def test_starts_that_are_there_are_left_alone(max_segments, forgotten):
    lengths = (64, 5 * 64, 0, 700, 20 * 64 + 1, 127)
    options = {"initial": STATES, "forgotten": forgotten, "some": forgotten < 1}
    check(lengths, settings(max_segments, 64), "none", **options)
    check((5 * 64,) * 3, settings(max_segments, 64), "none", dense=True, **options)


@triton.jit
def remembered_kernel(
    out_ptr, factor_ptr, first_ptr, chunks_ptr, ASKED: tl.constexpr, HV: tl.constexpr, F: tl.constexpr
):
    i = tl.program_id(0)
    first = tl.load(first_ptr + i)
    chunks = tl.load(chunks_ptr + i)
    tl.store(out_ptr + i, chunk_segments.remembered(factor_ptr, first, chunks, tl.arange(0, ASKED), HV, F))


def last_that_forget(totals):
    """How many of the last of these chunks, counted in Python."""
    sums = totals.flip(0).cumsum(0).tolist()
    return next((i + 1 for i, total in enumerate(sums) if total <= -32), 0)


def factors_of(totals):
    """Only a chunk's last gate is there."""
    factors = torch.full((*totals.shape, 4, 64), torch.nan)
    factors[:, :, 0, 63] = totals
    return factors


@pytest.mark.parametrize("asked", [1, 8, 64])
def test_the_last_chunks_that_forget_what_came_before(asked):
    """Against a count in Python; nothing past a chunk's last gate is read, and no chunk of another head or segment."""
    HV, places = 3, 40
    random = torch.Generator().manual_seed(4)
    totals = -torch.randint(0, 12, (places, HV), generator=random).float()
    totals[20:30, 1] = 0
    totals[35, 2] = torch.nan
    cases = [(place, hv, chunks) for hv in range(HV) for place in range(0, 31, 3) for chunks in (0, 1, 7, 8, 9, 10)]
    first = torch.tensor([place * HV + hv for place, hv, _ in cases])
    out = torch.full((len(cases),), -7, dtype=torch.int32)
    chunks = torch.tensor([case[2] for case in cases], dtype=torch.int32)
    remembered_kernel[(len(cases),)](out, factors_of(totals), first, chunks, asked, HV, 4)
    for (place, hv, count), found in zip(cases, out.tolist(), strict=True):
        assert found == last_that_forget(totals[place : place + count, hv]), (place, hv, count)
    assert len(set(out.tolist())) > 4


@triton.jit
def walk_kernel(out_ptr, factor_ptr, first, per_segment, chunks, HV: tl.constexpr, F: tl.constexpr):
    """A program a segment; a row of four numbers each."""
    segment = tl.program_id(0)
    segments = tl.num_programs(0)
    begin, first_chunk, walked, ahead = chunk_segments.walk(
        factor_ptr, first.to(tl.int64), segment, segments, per_segment, chunks, tl.arange(0, 8), HV, F
    )
    tl.store(out_ptr + segment * 4, begin)
    tl.store(out_ptr + segment * 4 + 1, first_chunk)
    tl.store(out_ptr + segment * 4 + 2, walked)
    tl.store(out_ptr + segment * 4 + 3, ahead)


@pytest.mark.parametrize("per_segment", [3, 5, 12])
@pytest.mark.parametrize("hv", range(4))
def test_a_run_that_does_not_forget_is_walked_by_the_last_segment_after_it(hv, per_segment):
    """Every chunk is the own chunk of one walk, whose chunks ahead are those that the state before is forgotten in."""
    HV, place, chunks = 4, 2, 44
    totals = -torch.randint(0, 12, (place + chunks + 3, HV), generator=torch.Generator().manual_seed(6)).float()
    totals[place : place + 20, 1] = 0
    totals[:, 0] *= 4
    totals[place + 15 :, 2] = 0
    totals[:, 3] = 0
    own = totals[place : place + chunks, hv].split(per_segment)
    out = torch.full((len(own), 4), -7, dtype=torch.int32)
    walk_kernel[(len(own),)](out, factors_of(totals), place * HV + hv, per_segment, chunks, HV, 4)
    begin = 0
    for segment, (at, first_chunk, walked, ahead) in enumerate(out.tolist()):
        ends = (segment + 1) * per_segment
        if ends < chunks and not last_that_forget(own[segment]):
            assert walked == 0, segment
            continue
        wanted = last_that_forget(own[begin - 1]) if begin else 0
        assert (at, ahead, first_chunk) == (begin, wanted, begin * per_segment - wanted), segment
        assert first_chunk + walked == min(ends, chunks), segment
        begin = segment + 1
    assert begin == len(own)
    runs = int((out[:, 2] > 0).sum())
    assert runs == 1 if hv == 3 else runs < len(own) if hv else runs > 1


def test_without_an_initial_state():
    check((130, 600), settings(8, 64), "none")


@pytest.mark.parametrize("K, V", [(64, 128), (128, 64), (128, 128)])
def test_head_sizes(K, V):
    initial = torch.randn(2, 3, V, K, generator=torch.Generator().manual_seed(2))
    check((300, 64), settings(4, 64), "none", HV=3, V=V, K=K, initial=initial)


def test_rows_of_one_length():
    check((5 * 64,) * 3, settings(4, 64), "none", initial=STATES, dense=True)


def test_offsets_past_zero_shift_the_maps():
    check((300, 0, 700), settings(4, 64), "none", initial=STATES, first=200)


def test_one_segment_at_most_writes_nothing():
    check((2000, 64), settings(1, 64), "none", initial=STATES, some=False)


def test_sequences_below_the_bound_stay_whole():
    check((320, 319, 700, 64), settings(4, 64, 320), "none", initial=STATES)
    check((319, 64, 200), settings(4, 64, 320), "none", initial=STATES, some=False)
    check((320,) * 3, settings(4, 64, 320), "none", initial=STATES, dense=True)
    check((319,) * 3, settings(4, 64, 320), "none", initial=STATES, dense=True, some=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_are_read_and_padding_is_left_alone(dtype):
    wide = torch.full((6, 2 * 64 * 64 + 32), torch.nan).to(dtype)
    pool = wide[:, :-32].view(6, 2, 64, 64)
    for slot in (4, 1):
        pool[slot] = STATES[slot].to(dtype)
    # padded, out of range, and fresh: the fresh one's slot holds NaN
    read, known = [4, -1, 1, 17, 2], [True, True, True, True, False]
    check((300, 300, 130, 300, 200), settings(4, 64), "none", initial=pool, read=read, known=known)


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch():
    config = settings(4, 64)
    lengths = (200, 321, 64)
    cu_seqlens = offsets(lengths)
    maps = segment_maps(num_maps(3, sum(lengths), cu_seqlens, config), 2, 64, 64, "none")

    def run(maps, cu_seqlens, initial):
        starts = torch.zeros(maps.shape[0], 2, 64, 64)
        kinds = torch.zeros(maps.shape[0], 2, dtype=torch.int32)
        options = {"read": None, "has_initial_state": None, "pad_slot_id": -1, "config": config}
        count, tokens = cu_seqlens.shape[0] - 1, int(cu_seqlens[-1])
        chunk_segments.combine(
            maps, starts, kinds, initial, cu_seqlens=cu_seqlens, count=count, tokens=tokens, **options
        )
        return starts

    together = run(maps.clone(), cu_seqlens, STATES)
    for n, length in enumerate(lengths):
        number, of_sequence = first_place(n, cu_seqlens[n], config), len(cut(length, config)) - 1
        alone = offsets((length,))
        part = maps[number : number + num_maps(1, length, alone, config)]
        found = run(part.clone(), alone, STATES[n : n + 1])
        assert (found[:of_sequence] != 0).any() or not of_sequence
        assert torch.equal(found[:of_sequence], together[number : number + of_sequence])


def test_no_sequence_and_short_ones_have_no_maps():
    config = settings(8)
    offsets_of_none = torch.zeros(1, dtype=torch.int32)
    assert num_maps(0, 9000, offsets_of_none, config) == 0
    assert num_maps(0, 9000, None, config) == 0
    assert num_maps(3, config.long_tokens - 1, offsets((1, 2, 3)), config) == 0
    assert num_maps(3, config.long_tokens, offsets((1, 2, 3)), config) > 0
