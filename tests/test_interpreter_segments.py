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


def settings(max_segments, min_tokens=1024):
    return launch.SegmentConfig(max_segments, min_tokens, block_v=32, num_warps=4, num_stages=2)


def offsets(lengths, first=0):
    return torch.tensor([first, *lengths]).cumsum(0).to(torch.int32)


def cut(length, max_segments, min_tokens=1024):
    """First chunk and number of chunks of every segment of a sequence."""
    chunks = -(-length // 64)
    segments = max(1, min(max_segments, length // min_tokens))
    per_segment = -(-chunks // segments)
    return [(first, min(per_segment, chunks - first)) for first in range(0, chunks, max(1, per_segment))] or [(0, 0)]


@triton.jit
def table_kernel(out_ptr, cu_seqlens_ptr, N: tl.int32, T: tl.int32, MAX: tl.constexpr, MIN: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    n, segment, segments, first_chunk, chunks, batch, start, length = chunk_segments.segment_of(
        cu_seqlens_ptr, place, N, T, MAX, MIN
    )
    row = out_ptr + place * 8
    tl.store(row, n)
    tl.store(row + 1, segment)
    tl.store(row + 2, segments)
    tl.store(row + 3, first_chunk)
    tl.store(row + 4, chunks)
    tl.store(row + 5, batch)
    tl.store(row + 6, start)
    tl.store(row + 7, length)


def table(cu_seqlens, count, tokens, config, extra=0):
    """What ``segment_of`` says of every place, and of ``extra`` more."""
    places = chunk_segments.places(count, tokens, cu_seqlens, config) + extra
    out = torch.full((places, 8), -7, dtype=torch.int64)
    table_kernel[(places,)](out, cu_seqlens, count, tokens, MAX=config.max_segments, MIN=config.min_tokens)
    return out


@pytest.mark.parametrize("max_segments", range(1, 9))
def test_every_segment_of_a_ragged_batch_has_one_place(max_segments):
    config = settings(max_segments)
    cu_seqlens = offsets(LENGTHS)
    found = table(cu_seqlens, len(LENGTHS), int(cu_seqlens[-1]) + 7, config)
    segments = [row.tolist() for row in found if row[1] < row[2]]
    wanted = []
    for n, length in enumerate(LENGTHS):
        parts = cut(length, max_segments)
        start = int(cu_seqlens[n])
        wanted += [[n, j, len(parts), *part, 0, start, length] for j, part in enumerate(parts)]
        place = start // config.min_tokens + n
        assert torch.equal(found[place : place + len(parts), 1], torch.arange(len(parts)))
    assert segments == wanted
    others = found[found[:, 1] >= found[:, 2]]
    assert (others[:, 4] == 0).all() and (others[:, 0] < len(LENGTHS)).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("max_segments", [1, 3, 8])
def test_rows_of_one_length_are_cut_like_a_packed_sequence(length, max_segments):
    config = settings(max_segments)
    found = table(None, 3, length, config, extra=2)
    parts = cut(length, max_segments)
    wanted = [[n, j, len(parts), *part, n, 0, length] for n in range(3) for j, part in enumerate(parts)]
    assert [row.tolist() for row in found if row[1] < row[2]] == wanted
    assert (found[found[:, 1] >= found[:, 2]][:, 4] == 0).all()


def test_segments_are_whole_chunks_none_of_them_empty():
    # 5 chunks by 4 segments: two each, so three segments; and every chunk is in one
    assert cut(5 * 64, 4, 64) == [(0, 2), (2, 2), (4, 1)]
    for tokens in range(64 * 20):
        found = cut(tokens, 8, 64)
        assert sum(chunks for _, chunks in found) == -(-tokens // 64) and all(chunks for _, chunks in found if tokens)
    lengths = (5 * 64, 300, 19 * 64 + 1)
    found = table(offsets(lengths), 3, sum(lengths), settings(8, 64))
    wanted = [part for length in lengths for part in cut(length, 8, 64)]
    assert [tuple(row[3:5].tolist()) for row in found if row[1] < row[2]] == wanted


def test_offsets_that_begin_past_zero():
    lengths = (2500, 100)
    cu_seqlens = offsets(lengths, first=3000)
    found = table(cu_seqlens, 2, 6000, settings(8))
    wanted = [(n, j) for n, length in enumerate(lengths) for j in range(len(cut(length, 8)))]
    assert [tuple(row[:2].tolist()) for row in found if row[1] < row[2]] == wanted
    assert (found[:, 1] >= 0).all()


def segment_maps(places, HV, V, K, gates, seed=0):
    """B of unit variance; A orthogonal, as reflections make it, with decay or without, or near the identity."""
    random = torch.Generator().manual_seed(seed)
    square = torch.randn(places, HV, K, K, generator=random, dtype=torch.float64)
    A = torch.linalg.qr(square).Q
    if gates == "decay":
        A = A * torch.rand(places, HV, 1, 1, generator=random, dtype=torch.float64)
    elif gates == "near-identity":
        A = torch.eye(K, dtype=torch.float64) - 0.01 * square / K**0.5
    B = torch.randn(places, HV, V, K, generator=random, dtype=torch.float64)
    return torch.cat([B, A], dim=2).float()


def check(
    lengths, config, gates, *, HV=2, V=64, K=64, initial=None, read=None, known=None, dense=False, pad_slot_id=-1
):
    """Run ``combine`` and compare every start with fp64; what is not one keeps its NaN."""
    count = len(lengths)
    cu_seqlens = None if dense else offsets(lengths)
    tokens = lengths[0] if dense else sum(lengths)
    places = chunk_segments.places(count, tokens, cu_seqlens, config)
    maps = segment_maps(places, HV, V, K, gates)
    if not dense:
        # places of no map hold NaN: a sequence's last segment, and those between sequences
        used = torch.zeros(places, dtype=torch.bool)
        for n, length in enumerate(lengths):
            place = int(cu_seqlens[n]) // config.min_tokens + n
            used[place : place + len(cut(length, config.max_segments, config.min_tokens)) - 1] = True
        maps[~used] = torch.nan
    starts = torch.full((places, HV, V, K), torch.nan)
    chunk_segments.combine(
        maps,
        starts,
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
    for n, length in enumerate(lengths):
        slot = n if read is None else read[n]
        if read is not None and not 0 <= slot < initial.shape[0]:
            continue
        S = torch.zeros(HV, V, K, dtype=torch.float64)
        if initial is not None and (known is None or known[n]):
            S = initial[slot].double()
        parts = cut(length, config.max_segments, config.min_tokens)
        if dense:
            place = n * max(1, min(config.max_segments, tokens // config.min_tokens))
        else:
            place = int(cu_seqlens[n]) // config.min_tokens + n
        for j in range(1, len(parts)):
            B, A = maps[place + j - 1].double().split([V, K], dim=1)
            S = S @ A + B
            wanted[place + j] = S
    written = ~wanted.isnan()
    assert torch.equal(~starts.isnan(), written)
    if written.any():
        assert_close(starts[written], wanted[written], BUDGET, "starts")


STATES = torch.randn(6, 2, 64, 64, generator=torch.Generator().manual_seed(1))


# Without decay: where states fade, a wrong map goes unseen.
@pytest.mark.parametrize("gates", ["decay", "none", "near-identity"])
@pytest.mark.parametrize("max_segments", [2, 3, 8])
def test_starts_match_the_maps_in_sequence(gates, max_segments):
    lengths = (64, 5 * 64, 0, 700, 20 * 64 + 1, 127)
    check(lengths, settings(max_segments, 64), gates, initial=STATES)


def test_without_an_initial_state():
    check((130, 600), settings(8, 64), "none")


@pytest.mark.parametrize("K, V", [(64, 128), (128, 64), (128, 128)])
def test_head_sizes(K, V):
    initial = torch.randn(2, 3, V, K, generator=torch.Generator().manual_seed(2))
    check((300, 64), settings(4, 64), "none", HV=3, V=V, K=K, initial=initial)


def test_rows_of_one_length():
    check((5 * 64,) * 3, settings(4, 64), "none", initial=STATES, dense=True)


def test_one_segment_at_most_writes_nothing():
    check((2000, 64), settings(1, 64), "none", initial=STATES)


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
    maps = segment_maps(chunk_segments.places(3, sum(lengths), cu_seqlens, config), 2, 64, 64, "none")

    def run(maps, cu_seqlens, initial):
        starts = torch.zeros(maps.shape[0], 2, 64, 64)
        options = {"read": None, "has_initial_state": None, "pad_slot_id": -1, "config": config}
        count, tokens = cu_seqlens.shape[0] - 1, int(cu_seqlens[-1])
        chunk_segments.combine(maps, starts, initial, cu_seqlens=cu_seqlens, count=count, tokens=tokens, **options)
        return starts

    together = run(maps, cu_seqlens, STATES)
    for n, length in enumerate(lengths):
        place, segments = int(cu_seqlens[n]) // 64 + n, len(cut(length, 4, 64))
        alone = offsets((length,))
        part = maps[place : place + chunk_segments.places(1, length, alone, config)]
        found = run(part, alone, STATES[n : n + 1])
        assert torch.equal(found[1:segments], together[place + 1 : place + segments])
