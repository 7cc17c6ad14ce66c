"""Segments of a long sequence that the chunk recurrence walks at once, and how their states join.

Over one segment the state S of [V, K] goes through a map that does not depend on it,

    S_out = S_in A + B,    A of [K, K],  B of [V, K],

because the delta rule multiplies S from the right and adds to it. A is what the recurrence makes of the identity
without values, B what it makes of a zero state. A map pass finds them for every segment but a sequence's last; here
S_j = S_{j-1} A_{j-1} + B_{j-1} gives each segment but the first its start; then all segments run at once.

Most heads forget: where a segment's last chunks alone decay a state to 2^-32, it ends with what those chunks make of a
zero state, whatever came before. The next segment then walks them itself, before its own, and needs no map. Only where
it is followed by one that does not forget does the map pass walk them too, for the joining to start from. A sequence of
less than MAP tokens has no maps at all, for one costs more there than it saves: where a head does not forget, two
segments are walked as one, by the later one's program.

Where a head's sequence is cut depends on its own length and gates and on static facts alone, so the rest of a batch
changes none of its bits. Programs have places, without a plan from the host: place n < N is the last segment of
sequence n, or all of it; N + min(cu_seqlens[n] // tokens_a_place, n times as many as a sequence may have) + j is its
segment j before the last. Maps and starts are numbered likewise, where only sequences of MAP tokens or more count.

maps [segment, HV, V + K, K] holds B, then A; starts [segment, HV, V, K] what the next segment starts from; kinds
[segment, HV] is 0 for a map, 1 where that start is there without one, 2 where it is not needed. firsts
[min(cu_seqlens[n] // LONG, n), HV, V, K] holds what a sequence that may be cut starts from: a pool's slot may be
written by its last segment before its first has read it. States are fp32, K last. The products of the joining are of
fp32 operands in three products of tf32 each, about fp32's precision: what a map loses, every later token loses.

Left out: joining maps pairwise, in a logarithm of the steps; at most 16 segments do not pay for the products of maps.
"""

import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels.recurrent import last_before, slots, span

C = tl.constexpr(64)
# log2 of the decay of what counts as forgotten: fp32 rounds off 256 times more
FORGOTTEN = tl.constexpr(-32.0)


@triton.jit
def cut(length, SEGMENTS: tl.constexpr):
    """How many segments a sequence of ``length`` tokens has, and chunks in each but the last; none is empty, except
    that of an empty sequence."""
    chunks = (length + C - 1) // C
    segments = length * 0 + 1
    per_segment = tl.maximum(chunks, 1)
    # a short sequence's state does not wait for these divisions
    if length >= SEGMENTS.long_tokens:
        segments = tl.minimum(length // SEGMENTS.min_tokens, SEGMENTS.max_segments)
        segments = tl.maximum(segments, tl.minimum(length // (2 * SEGMENTS.min_tokens), SEGMENTS.most_segments))
        segments = tl.maximum(segments, 1)
        per_segment = (chunks + segments - 1) // segments
        # rounding up may leave fewer: 5 chunks by 2 are 3 segments, not 4
        segments = (chunks + per_segment - 1) // per_segment
    return segments, per_segment


@triton.constexpr_function
def tokens_a_place(segments, at_least):
    """Tokens from one place to the next: as many as leave each sequence of ``at_least`` tokens or more its own."""
    few, many = segments.max_segments, segments.most_segments
    tokens = max(at_least, few * segments.min_tokens) // max(few - 1, 1)
    if many > 1:
        tokens = min(tokens, max(at_least, many * 2 * segments.min_tokens) // (many - 1))
    return tokens


@triton.constexpr_function
def places_a_sequence(segments):
    """Places that no sequence needs more of; 1 where none is cut."""
    return max(segments.max_segments - 1, segments.most_segments - 1, 1)


@triton.jit
def first_number(n, start, TOKENS: tl.constexpr, EACH: tl.constexpr):
    """What is numbered of packed sequences begins here for sequence ``n``, whose first token is ``start``: of no more
    than one thing for TOKENS tokens, nor than EACH for a sequence."""
    return tl.minimum(start // TOKENS, n * EACH)


@triton.jit
def last_numbered(cu_seqlens_ptr, number, asked, N, T, TOKENS: tl.constexpr, EACH: tl.constexpr):
    """The last of N > 0 sequences whose :func:`first_number` is not past ``number``. ``asked``: :func:`last_before`."""
    n = last_before(cu_seqlens_ptr, number, asked, N, T, TOKENS, 0)
    return tl.maximum(n, tl.minimum(number // EACH, N - 1))


@triton.jit
def number_of_long(cu_seqlens_ptr, n, start, LONG: tl.constexpr):
    """A number that no other sequence of LONG tokens or more has: of sequence ``n``, whose first token is ``start``."""
    number = n
    if cu_seqlens_ptr is not None:
        number = first_number(n, start, LONG, 1)
    return number


@triton.jit
def first_place(cu_seqlens_ptr, n, start, T, SEGMENTS: tl.constexpr, AT_LEAST: tl.constexpr):
    """Place of the first segment of sequence ``n``, whose first token is ``start``, past N."""
    if cu_seqlens_ptr is not None:
        place = first_number(n, start, tokens_a_place(SEGMENTS, AT_LEAST), places_a_sequence(SEGMENTS))
    else:
        segments, _ = cut(T, SEGMENTS)
        place = n * (segments - 1)
    return place


@triton.jit
def segment_of(
    cu_seqlens_ptr,
    place,
    asked,
    N,
    T,
    SEGMENTS: tl.constexpr,
    AT_LEAST: tl.constexpr,
):
    """The sequence and segment at ``place``, an int64, of a batch of N > 0 sequences. ``asked``: :func:`last_before`.

    Places past N are those of sequences of AT_LEAST tokens, as many as a long one has or more.
    Returns n, segment, segments, per_segment, first_chunk, chunks, batch, start, length: which sequence, which of its
    segments, how many it has and of how many chunks of 64 tokens, the segment's first chunk within the sequence and
    how many chunks, and :func:`span` of the whole sequence. A place of no segment returns segment = segments and
    chunks = 0, with some n below N.
    """
    number = place - N
    n = place
    if number >= 0:
        if cu_seqlens_ptr is not None:
            TOKENS: tl.constexpr = tokens_a_place(SEGMENTS, AT_LEAST)
            n = last_numbered(cu_seqlens_ptr, number, asked, N, T, TOKENS, places_a_sequence(SEGMENTS))
        else:
            of_row, _ = cut(T, SEGMENTS)
            n = tl.minimum(number // tl.maximum(of_row - 1, 1), number * 0 + N - 1)
    batch, start, length = span(cu_seqlens_ptr, n, T)
    segments, per_segment = cut(length, SEGMENTS)
    segment = segments - 1
    if number >= 0:
        segment = (number - first_place(cu_seqlens_ptr, n, start, T, SEGMENTS, AT_LEAST)).to(tl.int32)
        if (segment < 0) | (segment >= segments - 1) | (length < AT_LEAST):
            segment = segments
    first_chunk = segment * per_segment
    chunks = tl.maximum(tl.minimum(per_segment, (length + C - 1) // C - first_chunk), 0)
    if segment == segments:
        chunks = chunks * 0
    return n, segment, segments, per_segment, first_chunk, chunks, batch, start, length


@triton.jit
def remembered(factor_ptr, first, chunks, asked, HV: tl.constexpr, FACTORS: tl.constexpr):
    """How many of the last of ``chunks`` chunks decay a state to what counts as forgotten; 0 if they all do not.

    ``first``, an int64, numbers the first chunk and its head in ``factor_ptr`` [places, HV, FACTORS, C], whose first
    row is the gates summed within the chunk, in log2. ``asked`` counts from 0 to the chunks that are asked for at once.
    """
    total = 0.0
    walked = chunks * 0
    found = chunks * 0
    while (found == 0) & (walked < chunks):
        behind = walked + asked
        left = chunks - 1 - behind
        last = factor_ptr + (first + left * HV) * (FACTORS * C) + (C - 1)
        gates = tl.load(last, mask=left >= 0, other=0.0)
        forgotten = total + tl.cumsum(gates, 0) <= FORGOTTEN
        found = tl.min(tl.where(forgotten, behind + 1, chunks + 1), 0)
        found = tl.where(found > chunks, 0, found)
        total += tl.sum(gates, 0)
        walked += asked.shape[0]
    return found


@triton.jit
def walk(factor_ptr, first, segment, segments, per_segment, chunks, asked, HV: tl.constexpr, FACTORS: tl.constexpr):
    """What the program of ``segment`` walks of a sequence of ``chunks`` without maps: a run of segments that do not
    forget is walked by the last one after it, whose item starts early if it is the sequence's last.

    Returns the segment that the walk begins with, its first chunk, how many, and how many of them come before that
    segment. ``first`` and ``asked`` as for :func:`remembered`, of the whole sequence.
    """
    begin = segment
    ahead = segment * 0
    walks = segment == segments - 1
    if not walks:
        walks = remembered(factor_ptr, first + segment * per_segment * HV, per_segment, asked, HV, FACTORS) > 0
    searches = walks & (begin > 0)
    while searches:
        ahead = remembered(factor_ptr, first + (begin - 1) * per_segment * HV, per_segment, asked, HV, FACTORS)
        if ahead == 0:
            begin -= 1
        searches = (ahead == 0) & (begin > 0)
    first_chunk = begin * per_segment - ahead
    last = tl.minimum((segment + 1) * per_segment, chunks)
    return begin, first_chunk, tl.where(walks, last - first_chunk, 0), ahead


@triton.jit(do_not_specialize=["N", "T", "num_slots", "pad_slot_id"])
def combine_kernel(
    maps_ptr,
    starts_ptr,
    kind_ptr,
    initial_ptr,
    cu_seqlens_ptr,
    read_ptr,
    has_initial_ptr,
    N: tl.int32,
    T: tl.int32,
    num_slots: tl.int32,
    pad_slot_id: tl.int32,
    stride_initial,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_V rows of one head's state, along the segments of one sequence that has maps."""
    MAP_TOKENS: tl.constexpr = SEGMENTS.map_tokens
    MOST: tl.constexpr = max(SEGMENTS.max_segments, SEGMENTS.most_segments)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    block = pid % (V // BLOCK_V)
    hv = (pid // (V // BLOCK_V)) % HV
    n = (pid // (V // BLOCK_V * HV)).to(tl.int64)
    number = n
    if cu_seqlens_ptr is not None:
        n = last_numbered(cu_seqlens_ptr, number, tl.arange(0, 64), N, T, MAP_TOKENS, 1)
    _, start, length = span(cu_seqlens_ptr, n, T)
    if PDL:
        tl.extra.cuda.gdc_wait()  # of every program: see chunk_hopper.wait_for_predecessors
    if (length < MAP_TOKENS) | (number_of_long(cu_seqlens_ptr, n, start, MAP_TOKENS) != number):
        return

    segments, _ = cut(length, SEGMENTS)
    if segments > 1:
        read, write, active, keep, known = slots(read_ptr, None, has_initial_ptr, n, length, num_slots, pad_slot_id)
        if active:
            columns = tl.arange(0, K)[None, :]
            inner = tl.arange(0, BLOCK_V)[:, None] * K + columns
            square = tl.arange(0, K)[:, None] * K + columns
            row = block * BLOCK_V
            S = tl.zeros([BLOCK_V, K], dtype=tl.float32)
            if initial_ptr is not None:
                initial = initial_ptr + (read * stride_initial + (hv * V + row) * K)
                S = tl.load(initial + inner, mask=known, other=0.0).to(tl.float32)
            first = first_place(cu_seqlens_ptr, n, start, T, SEGMENTS, MAP_TOKENS)
            numbers = tl.arange(0, triton.next_power_of_2(MOST))
            kinds = tl.load(kind_ptr + (first + numbers) * HV + hv, mask=numbers < segments - 1, other=1)
            joined = tl.where(tl.min(kinds, 0) == 0, segments - 1, 0)
            # maps do not wait for the state: they are loaded ahead of it
            for j in tl.range(0, joined, num_stages=STAGES):
                head = (first + j) * HV + hv
                map_ptr = maps_ptr + head * ((V + K) * K)
                start_ptrs = starts_ptr + (head * V + row) * K + inner
                kind = tl.load(kind_ptr + head)
                keeps = kind == 0
                A = tl.load(map_ptr + V * K + square, mask=keeps, other=0.0)
                B = tl.load(tl.where(keeps, map_ptr + row * K + inner, start_ptrs), mask=kind < 2, other=0.0)
                S = tl.dot(tl.where(keeps, S, 0.0), A, B, input_precision=PRECISION)
                tl.store(start_ptrs, S, mask=keeps)


def num_long(count, tokens, cu_seqlens, long_tokens):
    """Numbers of sequences of ``long_tokens`` or more, of ``count`` in ``tokens`` tokens, or each of as many."""
    if count == 0 or tokens < long_tokens:
        return 0
    return count if cu_seqlens is None else min(count, tokens // long_tokens)


def num_segments(length, config):
    """How many segments a sequence of ``length`` tokens has: :func:`cut` on the host."""
    segments = min(length // config.min_tokens, config.max_segments)
    segments = max(segments, min(length // (2 * config.min_tokens), config.most_segments), 1)
    chunks = triton.cdiv(length, 64)
    return triton.cdiv(chunks, triton.cdiv(chunks, segments)) if length >= config.long_tokens else 1


def num_places(count, tokens, cu_seqlens, config, at_least):
    """Places of segments before the last, of sequences of ``at_least`` tokens or more."""
    if config.max_segments == 1 or count == 0 or tokens < at_least:
        return 0
    if cu_seqlens is not None:
        return min(tokens // tokens_a_place(config, at_least), count * places_a_sequence(config))
    return count * (num_segments(tokens, config) - 1)


def num_states(count, tokens, HV, config):
    """States that are walked at once, about: of each head one a sequence; or one a segment, where sequences of one
    length would be as long as those that are cut whatever their gates. ``tokens`` of all sequences."""
    length = tokens // max(count, 1)
    return count * HV * (num_segments(length, config) if length >= config.map_tokens else 1)


def in_order(count, HV, V, processors):
    """Whether the scan takes its sequences longest first: where its programs take several items each, but few."""
    items = count * HV * (V // (64 if V % 128 else 128))
    return processors < items <= launch.ORDERED_ROUNDS * processors


def combine(maps, starts, kinds, initial, *, cu_seqlens, count, tokens, read, has_initial_state, pad_slot_id, config):
    """Write to ``starts`` what the segment after each with a map starts from, where ``kinds``, int32 [maps, HV], is 0.
    Nothing for sequences without a slot."""
    HV, V, K = starts.shape[1:]
    sequences = num_long(count, tokens, cu_seqlens, config.map_tokens)
    launch.run(
        combine_kernel,
        (sequences * HV * (V // config.block_v),),
        maps,
        starts,
        kinds,
        initial,
        cu_seqlens,
        read,
        has_initial_state,
        count,
        tokens,
        0 if initial is None else initial.shape[0],
        pad_slot_id,
        0 if initial is None else initial.stride(0),
        config=config,
        HV=HV,
        K=K,
        V=V,
        BLOCK_V=config.block_v,
        SEGMENTS=config,
        # AMD's matrix units take fp32 as it is, and have no tf32x3
        PRECISION="ieee" if launch.target(maps.device).backend == "hip" else "tf32x3",
        STAGES=config.num_stages,
    )
