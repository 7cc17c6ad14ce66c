"""The scan of the chunked gated delta rule on Hopper, in Gluon: asynchronous copies and products, a job for each warp.

With Y of kernels/chunk_hopper_inverse.py, which gates, beta and inverse norms of k are in, per head and chunk:

    P = scale G * tril(q^ k^T)
    W = v - gamma * (k^ S^T),   U = Y^T W
    o = scale gamma * (q^ S^T) + P U,   S <- gamma_C S + ((gamma_C / gamma) * U)^T k

In bf16 the norms of q are formed here, and o is multiplied by their inverses, at last: nothing waits for them.

A program owns 64 or 128 rows of one head's state and walks the chunks of a sequence, or of a segment of one; then it
takes its next such item. The loading warp runs ahead: it finds what an item is, tells the others through shared
memory, and copies tiles there; with 128 rows first the state that the item starts from, in the place of one chunk's
tiles, so that nobody waits for it when the item before ends. Each 64 rows of the state have a warpgroup, which holds
them in registers, as fp32 and as operand, everything transposed. Its chain of products, k S^T, U and S, is what a
lone sequence waits for. So with 64 rows it does no more, and hands S and U to two warpgroups that form P and o, in
turn. With 128 rows there are registers for one auxiliary warpgroup, which forms P and copies o, and the two of the
state fill each other's gaps. Rows have the same bits in either size of program.

Rows of a tile past the end of the sequence arrive as zeros and are not written: a descriptor's first two dimensions
shift its base so that its third ends where the sequence does (the addresses wrap at 2^64). So no neighbour's token,
whatever it holds, enters.

A map pass runs segments without output, from a zero state and, without values, from the identity:
kernels/chunk_segments.py says what for.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

from gdn_kernels import launch
from gdn_kernels.kernels import _math, chunk_prep, chunk_segments, recurrent

CHUNK = 64
C = gl.constexpr(CHUNK)
# Extent of the dimension that ends with the sequence, and of those that shift the base.
ROWS = 1 << 30
SHIFTS = 0x7FFF0000
BILLION = gl.constexpr(ROWS)
# Elements of a packed Y: its upper 32 rows, then the right half of its lower ones.
PACKED = gl.constexpr(32 * 64 + 32 * 32)
# Items that are found ahead at most, and numbers that say what one is, the last of them how many a program has.
FOUND = gl.constexpr(4)
FIELDS = gl.constexpr(32)
L2NORM_EPS = gl.constexpr(recurrent.L2NORM_EPS.value)
# Registers a thread of the loading warp.
LOADER_REGISTERS = gl.constexpr(32)

# Triton 3.9 has new names for what 3.6 has.
_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

_memory = gl.shared_memory_descriptor
_reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret

span = gluon.jit(recurrent.span.fn)
slots = gluon.jit(recurrent.slots.fn)
inv_l2norm = gluon.jit(_math.inv_l2norm.fn)
place_of = gluon.jit(chunk_prep.place_of.fn)
segment_of = gluon.jit(chunk_segments.segment_of.fn)
number_of_long = gluon.jit(chunk_segments.number_of_long.fn)
first_place = gluon.jit(chunk_segments.first_place.fn)
remembered = gluon.jit(chunk_segments.remembered.fn)
walk = gluon.jit(chunk_segments.walk.fn)


@gluon.jit
def wait_for_predecessors():
    """Wait until the kernels before this one have ended (programmatic dependent launch: launch.py).

    Each kernel of a prefill but the last lets the next one be launched as soon as all its own programs run, so that it
    finds its work meanwhile. What the operator is given may be read without waiting, for the inverses, the first of
    these kernels, have waited before they let the next one start. Programs without work wait too: who waits for them
    takes it that all before has ended. (What comes after the scan would fill the few SMs that have no program of it.)
    """
    cuda.gdc_wait()


@gluon.jit
def load_rows(tiles, end, length, row, column, ready, to):
    """Copy 64 rows of the sequence of ``length`` rows before ``end``, from its row ``row`` on; zeros past its end."""
    shape: gl.constexpr = tiles.block_shape
    to = _reinterpret(to, tiles.dtype, shape, tiles.layout)
    _load(tiles, [column // shape[4], BILLION, end, BILLION - length + row, 0], ready, to)


@gluon.jit
def store_rows(tiles, end, length, row, column, source):
    """Begin to write a tile of 64 rows to the sequence's rows from ``row`` on, but nothing past its end."""
    shape: gl.constexpr = tiles.block_shape
    source = _reinterpret(source, tiles.dtype, shape, tiles.layout)
    _store(tiles, [column // shape[4], BILLION, end, BILLION - length + row, 0], source)


@gluon.jit
def lengths_from(cu_seqlens_ptr, first, N):
    """Numbers of 128 sequences from ``first`` on, and their lengths; 0 from N on."""
    n = first + gl.arange(0, 128, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    start = gl.load(cu_seqlens_ptr + n, mask=n < N, other=0)
    return n, gl.load(cu_seqlens_ptr + n + 1, mask=n < N, other=0) - start


@gluon.jit
def items_with_work(
    items, batch, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr, IS_MAP: gl.constexpr,
):  # fmt: skip
    """``items`` without those of segments, where no sequence is long enough: each alone takes long to find out."""
    AT_LEAST: gl.constexpr = SEGMENTS.map_tokens if IS_MAP else SEGMENTS.long_tokens
    cu_seqlens_ptr, N = batch[0], batch[8]
    if SEGMENTS.max_segments > 1 and cu_seqlens_ptr is not None:
        longest = items * 0
        asked = N
        if not IS_MAP:
            # a program's only item is found out by itself
            if items <= gl.num_programs(0):
                longest += AT_LEAST
                asked = N * 0
        for i in range(0, asked, 128):
            _, lengths = lengths_from(cu_seqlens_ptr, i, N)
            longest = gl.maximum(longest, gl.max(lengths, 0).to(gl.int32))
        if longest < AT_LEAST:
            items = items * 0 if IS_MAP else N * (HV * (V // (PARTS * C)))
    return items


@gluon.jit
def taken(item, items, batch):
    """The item that a program takes for ``item``. Where sequences are in order, every second round, in which each
    program takes one, goes backwards: of items that get shorter and shorter all have about as much."""
    if batch[7] is not None:
        programs = gl.num_programs(0)
        round = item // programs
        if (round % 2 != 0) & ((round + 1) * programs <= items):
            item = (2 * round + 1) * programs - 1 - item
    return item


@gluon.jit
def sequence_of(item, batch, HV: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr):
    """Of which sequence an item is, where they are in order; its place, if that is past them: a segment's."""
    order_ptr, num_ordered = batch[7], batch[12]
    n = (item // (V // (PARTS * C) * HV)).to(gl.int64)
    if order_ptr is not None:
        if n < num_ordered:
            wait_for_predecessors()
            n = gl.load(order_ptr + n).to(gl.int64)
    return n


@gluon.jit
def work_of(
    item, sequence, batch,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr, IS_MAP: gl.constexpr, FACTORS: gl.constexpr,
):  # fmt: skip
    """What number ``item`` of a launch is: rows of one head's state, along one sequence, or some of its segments.

    Returns, for every role: whether the sequence has a slot, first chunk and chunks of 64 tokens, the token past the
    sequence's end, its length, the value head, the first row of its state, number of the first chunk in scratch, and
    how many chunks come before the first whose output is wanted. For the state: the sequence, where the start of its
    segment here is, whether a segment comes before and whether the last is here, slots to read and to write, whether it
    starts from the slot and keeps the state it ends with, the place of what the sequence starts from, and whether its
    segment here starts from what was joined. Of a map instead: whether the segment exists, and the kind of what is
    written (kernels/chunk_segments.py).
    """
    cu_seqlens_ptr, read_ptr, write_ptr, has_initial_ptr, factor_ptr, kind_ptr, first_ptr, order_ptr = batch[:8]
    N, T, num_slots, pad_slot_id = batch[8:12]
    BLOCKS: gl.constexpr = (V + K if IS_MAP else V) // (PARTS * C)
    # sequences whose offsets, or chunks whose decay, are asked for at once
    asked = gl.arange(0, 64, gl.BlockedLayout([2], [32], [gl.num_warps()], [0]))
    first_row = (item % BLOCKS) * (PARTS * C)
    hv = (item // BLOCKS) % HV
    n = (item // (BLOCKS * HV)).to(gl.int64)
    if IS_MAP:
        n += N
    elif order_ptr is not None:
        n = sequence
    number = n
    first_number = n
    later = item < 0
    is_last = item >= 0
    exists = is_last
    joined = later
    kind = item * 0
    first_chunk = item * 0
    ahead = item * 0
    per_segment = item * 0
    segment = item * 0
    segments = item * 0
    if SEGMENTS.max_segments > 1:
        n, segment, segments, per_segment, first_chunk, chunks, row, start, length = segment_of(
            cu_seqlens_ptr, n, asked, N, T, SEGMENTS, SEGMENTS.map_tokens if IS_MAP else SEGMENTS.long_tokens
        )
        exists = segment < segments
        is_last = segment == segments - 1
        later = segment > 0
        number = segment + first_place(cu_seqlens_ptr, n, start, T, SEGMENTS, SEGMENTS.map_tokens)
        first_number = number_of_long(cu_seqlens_ptr, n, start, SEGMENTS.long_tokens)
    else:
        row, start, length = span(cu_seqlens_ptr, n, T)
        chunks = (length + C - 1) // C
    # of the sequence's first chunk, in scratch
    place = place_of(cu_seqlens_ptr, n, start, T) * HV + hv
    read, write, active, keep, known = slots(read_ptr, write_ptr, has_initial_ptr, n, length, num_slots, pad_slot_id)
    wait_for_predecessors()
    if IS_MAP:
        found = remembered(factor_ptr, place + first_chunk * HV, chunks, asked, HV, FACTORS)
        if found > 0:
            # nothing of the identity is left; of use only to a next segment that has a map
            needed = segment + 2 < segments
            if needed:
                after = place + (first_chunk + per_segment) * HV
                needed = remembered(factor_ptr, after, per_segment, asked, HV, FACTORS) == 0
            keep = needed & (first_row < V)
            first_chunk += chunks - found
            chunks = found
            kind += 2 - needed.to(gl.int32)
        else:
            keep = exists
        active = keep
    else:
        if SEGMENTS.max_segments > 1:
            later = later & exists
            if exists & (segments > 1) & (length < SEGMENTS.map_tokens):
                begin, first_chunk, chunks, ahead = walk(
                    factor_ptr, place, segment, segments, per_segment, (length + C - 1) // C, asked, HV, FACTORS
                )
                later = (begin > 0) | (chunks == 0)
            elif later:
                before = place + (first_chunk - per_segment) * HV
                ahead = remembered(factor_ptr, before, per_segment, asked, HV, FACTORS)
                joined = ahead == 0
                first_chunk -= ahead
                chunks += ahead
        # the start of a first segment of several is read from a copy: the slot may be written meanwhile
        if first_ptr is not None:
            known = known & is_last
        known = known & exists & (not later)
        keep = keep & is_last
    end = (row * T + start + length).to(gl.int32)
    chunk_number = (place + first_chunk * HV).to(gl.int32)
    return (
        active, first_chunk, chunks, end, length, hv, first_row, chunk_number, ahead,
        n, number, later, is_last, read, write, known, keep, first_number, joined, exists, kind,
    )  # fmt: skip


@gluon.jit
def publish(work, count, to):
    """What :func:`work_of` returned, and how many items the program has, for its other warps."""
    number = gl.arange(0, FIELDS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    fields = gl.where(number == FIELDS - 1, count, 0)
    for i in gl.static_range(len(work)):
        fields = gl.where(number == i, work[i].to(gl.int32), fields)
    to.store(fields)


@gluon.jit
def field(work_s, i: gl.constexpr):
    """Number ``i`` of what was published; reduced, for the compiler to know it is the same in all threads."""
    number = gl.max(work_s.slice(i, 1).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    return gl.inline_asm_elementwise(
        "redux.sync.or.b32 $0, $1, -1;", "=r,r", [number], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def published(work_s):
    """What :func:`work_of` returned."""
    return (
        field(work_s, 0) != 0, field(work_s, 1), field(work_s, 2), field(work_s, 3), field(work_s, 4),
        field(work_s, 5), field(work_s, 6), field(work_s, 7), field(work_s, 8), field(work_s, 9).to(gl.int64),
        field(work_s, 10).to(gl.int64), field(work_s, 11) != 0, field(work_s, 12) != 0,
        field(work_s, 13).to(gl.int64), field(work_s, 14).to(gl.int64), field(work_s, 15) != 0,
        field(work_s, 16) != 0, field(work_s, 17).to(gl.int64), field(work_s, 18) != 0, field(work_s, 19) != 0,
        field(work_s, 20),
    )  # fmt: skip


@gluon.jit
def found_item(works, each):
    """What the loading warp found of item ``each`` of the program, as soon as it has."""
    works_s, found, done = works
    mbarrier.wait(found.index(each % FOUND), (each // FOUND) & 1)
    return published(works_s.index(each % FOUND))


@gluon.jit
def number_of_items(works):
    """Of this program, as soon as its loading warp knows."""
    works_s, found, done = works
    mbarrier.wait(found.index(0), 0)
    wait_for_predecessors()
    return field(works_s.index(0), FIELDS - 1)


@gluon.jit
def block_of(tile, i: gl.constexpr, like, IS_FLAT: gl.constexpr):
    """The ``i``-th 8 KiB of a tile: a block of states, as TMA writes it or as it is read."""
    blocks: gl.constexpr = tile.shape[0] * tile.shape[1] // (C * C)
    columns: gl.constexpr = like.block_shape[3]
    if IS_FLAT:
        rows: gl.constexpr = gl.NVMMASharedLayout(128, like.dtype.primitive_bitwidth, rank=2)
        block = _reinterpret(tile, like.dtype, [blocks, C, columns], rows).index(i)
    else:
        block = _reinterpret(tile, like.dtype, [blocks, 1, 1, C, columns], like.layout).index(i)
    return block


@gluon.jit
def block_of_state(tiles, stage, part: gl.constexpr, i: gl.constexpr, like, IS_FLAT: gl.constexpr):
    """Where the ``i``-th 128 bytes of 64 rows of a state lie that comes before an item's chunks: in the tiles of a
    stage, which 128 rows of 128 fp32 fill."""
    q_s, k_s, v_s, y_s = tiles[:4]
    p_s = tiles[7]
    if part == 0:
        if i == 0:
            block = block_of(k_s.index(stage), 0, like, IS_FLAT)
        elif i == 3:
            block = block_of(k_s.index(stage), 1, like, IS_FLAT)
        else:
            block = block_of(v_s.index(stage), i - 1, like, IS_FLAT)
    elif i == 0:
        block = block_of(q_s.index(stage), 0, like, IS_FLAT)
    elif i == 1:
        block = block_of(y_s.index(stage), 0, like, IS_FLAT)
    elif i == 2:
        block = block_of(p_s.index(stage), 0, like, IS_FLAT)
    else:
        block = block_of(q_s.index(stage), 1, like, IS_FLAT)
    return block


@gluon.jit
def side_by_side(a, b):
    """Two tensors of as many rows, one beside the other."""
    return gl.join(a, b).permute((0, 2, 1)).reshape([a.shape[0], 2 * a.shape[1]])


@gluon.jit
def loaded_state(tiles, stage, initial_tiles, K: gl.constexpr, PART: gl.constexpr, layout: gl.constexpr):
    """64 rows of a state, from a stage's tiles."""
    W: gl.constexpr = initial_tiles.block_shape[3]
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    S = block_of_state(tiles, stage, PART, 0, initial_tiles, True).load(registers)
    if K // W > 1:
        S = side_by_side(S, block_of_state(tiles, stage, PART, 1, initial_tiles, True).load(registers))
    if K // W > 2:
        third = block_of_state(tiles, stage, PART, 2, initial_tiles, True).load(registers)
        fourth = block_of_state(tiles, stage, PART, 3, initial_tiles, True).load(registers)
        S = side_by_side(S, side_by_side(third, fourth))
    return gl.convert_layout(S.to(gl.float32), layout)


@gluon.jit
def loader(
    tensors, tiles, works, batch, items,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr, IS_MAP: gl.constexpr, STAGES: gl.constexpr, FACTORS: gl.constexpr,
):  # fmt: skip
    """What each item is, for the program's other warps; the state it starts from, if that comes as tiles; and tiles of
    each chunk, as stages come free: of the next item too, before this one is done."""
    q_tiles, k_tiles, v_tiles, upper_tiles, lower_tiles, factor_tiles, initial_tiles = tensors
    q_s, k_s, v_s, y_s, factor_s, ready, free = tiles[:7]
    BASE: gl.constexpr = (C * K + C * C) * 2 + FACTORS * C * 4
    VALUES: gl.constexpr = PARTS * C * C * 2
    turn = items * 0
    works_s, found, done = works
    items = items_with_work(items, batch, HV, K, V, PARTS, SEGMENTS, IS_MAP)
    count = (items - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    sequence = sequence_of(gl.program_id(0), batch, HV, V, PARTS)
    if count == 0:
        publish((), 0, works_s.index(0))
        mbarrier.arrive(found.index(0))
    for each in range(count):
        item = gl.program_id(0) + each * gl.num_programs(0)
        work = work_of(taken(item, items, batch), sequence, batch, HV, K, V, PARTS, SEGMENTS, IS_MAP, FACTORS)
        mbarrier.wait(done.index(each % FOUND), ((each // FOUND) & 1) ^ 1)
        publish(work, count, works_s.index(each % FOUND))
        mbarrier.arrive(found.index(each % FOUND))
        # of the next item, which then does not wait for it
        sequence = sequence_of(taken(item + gl.num_programs(0), items, batch), batch, HV, V, PARTS)
        active, first_chunk, chunks, end, length, hv, first_row, chunk_number, ahead = work[:9]
        has_values = first_row < V
        q_column = hv // (HV // H) * K
        v_column = hv * V + first_row
        if active:
            if initial_tiles is not None:
                read, known = work[13], work[15]
                if known:
                    block: gl.constexpr = initial_tiles.block_shape
                    stage = turn % STAGES
                    bar = ready.index(stage)
                    mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
                    mbarrier.expect(bar, PARTS * C * K * (initial_tiles.dtype.primitive_bitwidth // 8))
                    for part in gl.static_range(PARTS):
                        for j in gl.static_range(K // block[3]):
                            to = block_of_state(tiles, stage, part, j, initial_tiles, False)
                            _load(initial_tiles, [j, read.to(gl.int32), v_column + part * C, 0], bar, to)
                    turn += 1
            for i in range(chunks):
                stage = turn % STAGES
                bar = ready.index(stage)
                row = (first_chunk + i) * C
                number = chunk_number + i * HV
                mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
                if IS_MAP:
                    mbarrier.expect(bar, BASE + VALUES, pred=has_values)
                    mbarrier.expect(bar, BASE, pred=not has_values)
                else:
                    mbarrier.expect(bar, BASE + VALUES + C * K * 2)
                load_rows(k_tiles, end, length, row, q_column, bar, k_s.index(stage))
                _load(factor_tiles, [number * (FACTORS * C)], bar, factor_s.index(stage))
                if has_values:
                    load_rows(v_tiles, end, length, row, v_column, bar, v_s.index(stage))
                _load(upper_tiles, [number * (PACKED // C), 0], bar, y_s.index(stage).slice(0, C // 2))
                # columns before the first arrive as zeros: the half that is not stored
                lower_row = number * (PACKED // (C // 2)) + C
                _load(lower_tiles, [lower_row, -(C // 2)], bar, y_s.index(stage).slice(C // 2, C // 2))
                if not IS_MAP:
                    load_rows(q_tiles, end, length, row, q_column, bar, q_s.index(stage))
                turn += 1


@gluon.jit
def write_zeros(o_ptr, first, last, hv, first_row, stride_o_t, stride_o_h, PARTS: gl.constexpr):
    """Zeros in rows ``first`` to ``last`` of one head's output."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // C, C // 8], [gl.num_warps(), 1], [1, 0])
    o16 = gl.arange(0, 16, gl.SliceLayout(1, layout))
    columns = gl.arange(0, C, gl.SliceLayout(0, layout))
    zeros = gl.zeros([16, C], o_ptr.dtype.element_ty, layout)
    # a multiple of C, which the compiler cannot know of what was published: it makes stores wide
    base = o_ptr + (hv.to(gl.int64) * stride_o_h + first_row // C * C)
    for i in range(first, last, 16):
        for part in gl.static_range(PARTS):
            to = base + (i.to(gl.int64) * stride_o_t + (o16[:, None] * stride_o_t + part * C + columns[None, :]))
            gl.store(to, zeros, mask=(i + o16 < last)[:, None])


@gluon.jit
def opaque(x):
    """x, of 32 bits; what is made of it is made again for each use, where it would be kept, and spilled."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def decay_between(factors, layout: gl.constexpr):
    """Decay from each token of a chunk (columns) to each token from it on (rows), 0 to those before it."""
    # compared anew for each chunk: bits that are kept would be packed, and unpacked one by one
    row = opaque(gl.arange(0, C, gl.SliceLayout(1, layout)))
    column = gl.arange(0, C, gl.SliceLayout(0, layout))
    gates_i = factors.slice(0, C).load(gl.SliceLayout(1, layout))
    gates_j = factors.slice(0, C).load(gl.SliceLayout(0, layout))
    exponents = gates_i[:, None] - gates_j[None, :]
    return gl.exp2(gl.where(row[:, None] >= column[None, :], exponents, float("-inf")))


@gluon.jit
def inverse_norms(q, layout: gl.constexpr):
    """1 / |q| of each row of q, an operand in bf16; the same bits in every program."""
    # bf16 are the upper halves of fp32; two instructions a pair, where a conversion takes three
    q = gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [q], dtype=gl.float32, is_pure=True, pack=2
    )
    return gl.convert_layout(inv_l2norm(gl.sum(q * q, 1), L2NORM_EPS), layout)


@gluon.jit
def begin_copy(o_s, o_ready, phase, is_wanted, o_tiles, end, length, row, column):
    """Begin to copy a chunk's output, once it is there, to the sequence's rows from ``row`` on, if it is wanted."""
    mbarrier.wait(o_ready, phase)
    if is_wanted:
        fence_async_shared()
        store_rows(o_tiles, end, length, row, column, o_s)


@gluon.jit
def end_copy(o_free):
    """Give the place of a chunk's output back, once it has been copied."""
    tma.store_wait(0)
    mbarrier.arrive(o_free)


@gluon.jit
def auxiliary(
    tiles, works, initial_tiles, o_tiles, o_ptr, stride_o_t, stride_o_h, scale, items,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr, STAGES: gl.constexpr, FACTORS: gl.constexpr, HAS_NORMS: gl.constexpr,
    COPIES_EARLY: gl.constexpr,
):  # fmt: skip
    """P of each chunk, the decay from each token to its end, and the factors of q S^T; then, or early, beside P,
    the copy of an earlier chunk's output, two chunks behind so that no P waits for it."""
    q_s, k_s, v_s, y_s, factor_s, ready, free = tiles[:7]
    p_s, o_s, decay_s, scale_s, norm_s, p_ready, norm_ready, o_ready, o_free = tiles[7:]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zeros = gl.zeros([C, C], gl.float32, layout)
    turn = items * 0
    # turns that brought a state
    states = items * 0
    works_s, found, done = works
    for each in range(number_of_items(works)):
        work = found_item(works, each)
        active, first_chunk, chunks, end, length, hv, first_row, chunk_number, ahead = work[:9]
        v_column = hv * V + first_row
        if active:
            if initial_tiles is not None:
                known = work[15]
                if known:
                    stage = turn % STAGES
                    mbarrier.wait(ready.index(stage), (turn // STAGES) & 1)
                    mbarrier.arrive(p_ready.index(stage))
                    if HAS_NORMS:
                        mbarrier.arrive(norm_ready.index(stage))
                    mbarrier.arrive(free.index(stage))
                    turn += 1
                    states += 1
            for i in range(chunks + 2):
                row = (first_chunk + i - 2) * C
                if COPIES_EARLY:
                    if i > 1:
                        begin_copy(
                            o_s, o_ready, (turn + states + i) & 1, i - 2 >= ahead, o_tiles, end, length, row, v_column
                        )
                        if i >= chunks:
                            end_copy(o_free)
                if i < chunks:
                    now = turn + i
                    stage = now % STAGES
                    # a stage that is ready again has been given back by all who read its P
                    mbarrier.wait(ready.index(stage), (now // STAGES) & 1)
                    p = warpgroup_mma(
                        q_s.index(stage), k_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
                    )
                    if COPIES_EARLY:
                        if i > 1:
                            end_copy(o_free)
                    factors = factor_s.index(stage)
                    last = gl.max(factors.slice(C - 1, 1).load(line), 0)
                    gates = factors.slice(0, C).load(line)
                    decay_s.index(stage).store(gl.exp2(last - gates))
                    decay = decay_between(factors, layout)
                    if FACTORS > 2:
                        scale_s.index(stage).store(gl.exp2(gates) * factors.slice(2 * C, C).load(line))
                        decay *= factors.slice(2 * C, C).load(rows)[:, None]
                    else:
                        scale_s.index(stage).store(gl.exp2(gates) * scale)
                        decay *= scale
                    p = warpgroup_mma_wait(0, [p])
                    p_s.index(stage).store((p * decay).to(p_s.dtype))
                    fence_async_shared()
                    mbarrier.arrive(p_ready.index(stage))
                    if HAS_NORMS:
                        norm_s.index(stage).store(inverse_norms(q_s.index(stage).load(operand), rows))
                        mbarrier.arrive(norm_ready.index(stage))
                    mbarrier.arrive(free.index(stage))
                if not COPIES_EARLY:
                    if i > 1:
                        begin_copy(
                            o_s, o_ready, (turn + states + i) & 1, i - 2 >= ahead, o_tiles, end, length, row, v_column
                        )
                        end_copy(o_free)
            turn += chunks
        else:
            first = end - length
            last_row = first + gl.minimum((first_chunk + chunks) * C, length)
            write_zeros(o_ptr, first + first_chunk * C, last_row, hv, first_row, stride_o_t, stride_o_h, PARTS)
        mbarrier.arrive(done.index(each % FOUND))


@gluon.jit
def output(
    tiles, works, o_tiles, o_ptr, stride_o_t, stride_o_h, scale, items,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    SEGMENTS: gl.constexpr, STAGES: gl.constexpr, FACTORS: gl.constexpr, HAS_NORMS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """P and o of every second chunk, from the state and U that the state's warpgroup hands over."""
    q_s, k_s, v_s, y_s, factor_s, ready, free, S_s, u_s, S_formed, S_taken, u_formed, u_taken = tiles
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    dtype: gl.constexpr = k_s.dtype
    zeros = gl.zeros([C, C], gl.float32, layout)
    mine_formed = S_formed.index(WHICH)
    mine_taken = S_taken.index(WHICH)
    mine_u_formed = u_formed.index(WHICH)
    mine_u_taken = u_taken.index(WHICH)
    turn = items * 0
    works_s, found, done = works
    for each in range(number_of_items(works)):
        work = found_item(works, each)
        active, first_chunk, chunks, end, length, hv, first_row, chunk_number, ahead = work[:9]
        if active:
            for i in range((turn + WHICH) % 2, chunks, 2):
                now = turn + i
                stage = now % STAGES
                phase = (now // 2) & 1
                mbarrier.wait(ready.index(stage), (now // STAGES) & 1)
                q = q_s.index(stage).load(operand)
                p = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                factors = factor_s.index(stage)
                decay = decay_between(factors, layout)
                factor_q = gl.exp2(factors.slice(0, C).load(rows))
                if FACTORS > 2:
                    scale_i = factors.slice(2 * C, C).load(rows)
                    factor_q *= scale_i
                    decay *= scale_i[:, None]
                else:
                    factor_q *= scale
                    decay *= scale
                p = warpgroup_mma_wait(0, [p])
                p = gl.convert_layout((p * decay).to(dtype), operand)
                if HAS_NORMS:
                    norms = inverse_norms(q, rows)
                mbarrier.wait(mine_formed, phase)
                o = warpgroup_mma(q, S_s.permute((1, 0)), zeros, use_acc=False, is_async=True)
                o = warpgroup_mma_wait(0, [o]) * factor_q[:, None]
                mbarrier.arrive(mine_taken)
                mbarrier.wait(mine_u_formed, phase)
                o = warpgroup_mma(p, u_s.permute((1, 0)), o, is_async=True)
                o = warpgroup_mma_wait(0, [o])
                mbarrier.arrive(mine_u_taken)
                if HAS_NORMS:
                    o *= norms[:, None]
                # v of this chunk has been read: its tile takes o
                v_s.index(stage).store(o.to(dtype))
                fence_async_shared()
                if i >= ahead:
                    store_rows(o_tiles, end, length, (first_chunk + i) * C, hv * V + first_row, v_s.index(stage))
                    tma.store_wait(0)
                mbarrier.arrive(free.index(stage))
            turn += chunks
        elif WHICH == 0:
            first = end - length
            last_row = first + gl.minimum((first_chunk + chunks) * C, length)
            write_zeros(o_ptr, first + first_chunk * C, last_row, hv, first_row, stride_o_t, stride_o_h, 1)
        mbarrier.arrive(done.index(each % FOUND))


@gluon.jit
def part_of_state(first_row, K: gl.constexpr, layout: gl.constexpr):
    """64 rows of a state from ``first_row`` on, and where their elements lie in it."""
    rows = first_row + gl.arange(0, C, gl.SliceLayout(1, layout))
    return rows, rows[:, None] * K + gl.arange(0, K, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def state(
    tiles, works, initial_tiles, pointers, strides, items,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr, IS_MAP: gl.constexpr, STAGES: gl.constexpr, HAS_NORMS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """64 rows of the state along the chunks, for one item after another."""
    q_s, k_s, v_s, y_s, factor_s, ready, free = tiles[:7]
    if not IS_MAP:
        if PARTS == 1:
            S_s, u_s, S_formed, S_taken, u_formed, u_taken = tiles[7:]
        else:
            p_s, o_s, decay_s, scale_s, norm_s, p_ready, norm_ready, o_ready, o_free = tiles[7:]
    initial_ptr, start_ptr, final_ptr, checkpoint_ptr, checkpoint_offset_ptr, kind_ptr, first_ptr = pointers
    stride_initial, stride_final, stride_checkpoint, num_checkpoints, checkpoint_chunks = strides
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    wide_operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, narrow)
    dtype: gl.constexpr = k_s.dtype
    # one warpgroup alone hands what o is made of to two others: each product of its own would be a link in its chain
    HANDS_OVER: gl.constexpr = PARTS == 1 and not IS_MAP
    HAS_OUTPUT: gl.constexpr = PARTS == 2 and not IS_MAP
    zeros = gl.zeros([C, C], gl.float32, narrow)
    turn = items * 0
    # turns that brought a state
    states = items * 0
    works_s, found, done = works
    for each in range(number_of_items(works)):
        work = found_item(works, each)
        active, first_chunk, chunks, end, length, hv, first_row, chunk_number, ahead = work[:9]
        n, number, later, is_last, read, write, known, keep, first_number, joined, exists, kind = work[9:]
        has_values = first_row < V
        rows, inner = part_of_state(first_row + PART * C, K, wide)
        checkpoint = n * 0
        checkpoint_end = n * 0
        if checkpoint_ptr is not None:
            checkpoint = gl.load(checkpoint_offset_ptr + n).to(gl.int64)
            checkpoint_end = gl.load(checkpoint_offset_ptr + n + 1).to(gl.int64)
            checkpoint_end = gl.minimum(checkpoint_end, n * 0 + num_checkpoints)
            checkpoint += (first_chunk + ahead) // checkpoint_chunks

        S = gl.zeros([C, K], gl.float32, wide)
        if IS_MAP:
            if PART == 0:
                if exists & (first_row == 0):
                    gl.store(kind_ptr + number * HV + hv, kind)
            if not has_values:
                diagonal = (rows - V)[:, None] == gl.arange(0, K, gl.SliceLayout(0, wide))[None, :]
                S = gl.where(diagonal, 1.0, S)
        else:
            if start_ptr is not None:
                if joined & (length >= SEGMENTS.map_tokens):
                    S = gl.load(start_ptr + ((number - 1) * HV + hv) * (V * K) + inner)
            if first_ptr is not None:
                if exists & (not (later | is_last)):
                    S = gl.load(first_ptr + (first_number * HV + hv) * (V * K) + inner)
            if initial_tiles is not None:
                if known:
                    stage = turn % STAGES
                    mbarrier.wait(ready.index(stage), (turn // STAGES) & 1)
                    S = loaded_state(tiles, stage, initial_tiles, K, PART, wide)
                    turn += 1
                    states += 1
            elif initial_ptr is not None:
                if known:
                    S = gl.load(initial_ptr + (read * stride_initial + hv * (V * K)) + inner).to(gl.float32)
        S16 = S.to(dtype)
        if HAS_OUTPUT:
            o = gl.zeros([C, C], dtype, narrow)
        if active:
            for i in range(chunks):
                stage = turn % STAGES
                phase = (turn // STAGES) & 1
                mbarrier.wait(ready.index(stage), phase)
                factors = factor_s.index(stage)
                k_tile = k_s.index(stage)
                factor_k = factors.slice(C, C).load(columns)
                last = gl.max(factors.slice(C - 1, 1).load(columns), 0)
                if not HAS_OUTPUT:
                    decay = gl.exp2(last - factors.slice(0, C).load(columns))
                if IS_MAP:
                    v = gl.zeros([C, C], dtype, narrow)
                    if has_values:
                        v = v_s.index(stage).slice(PART * C, C).permute((1, 0)).load(narrow)
                else:
                    v = v_s.index(stage).slice(PART * C, C).permute((1, 0)).load(narrow)
                if HANDS_OVER:
                    # chunks go to one warpgroup and the other; the chunk before has to be taken. Four warps that begin
                    # together are 1 % faster
                    _barrier()
                    mbarrier.wait(S_taken.index((turn + 1) % 2), ((turn + 1) // 2 + 1) & 1)
                    S_s.store(S16)
                S_operand = gl.convert_layout(S16, operand)
                ks = warpgroup_mma(S_operand, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
                if HANDS_OVER:
                    fence_async_shared()
                    mbarrier.arrive(S_formed.index(turn % 2))
                if HAS_OUTPUT:
                    # what is left of the chunk before, while the matrix units work
                    if initial_tiles is not None:
                        # the state's stage, not before the product has it in registers: arriving waits for no load
                        if (i == 0) & known:
                            mbarrier.arrive(free.index((turn - 1) % STAGES))
                    if i > 0:
                        mbarrier.arrive(free.index((turn - 1) % STAGES))
                        mbarrier.wait(o_free, (turn + states) & 1)
                        o_s.slice(PART * C, C).permute((1, 0)).store(o)
                        mbarrier.arrive(o_ready)
                ks = warpgroup_mma_wait(0, [ks])
                w = gl.convert_layout((v.to(gl.float32) - ks * factor_k[None, :]).to(dtype), operand)
                u = warpgroup_mma(w, y_s.index(stage), zeros, use_acc=False, is_async=True)
                S = S * gl.exp2(last)
                if HAS_OUTPUT:
                    mbarrier.wait(p_ready.index(stage), phase)
                    factor_q = scale_s.index(stage).load(columns)
                    decay = decay_s.index(stage).load(columns)
                u = warpgroup_mma_wait(0, [u])
                u_decayed = gl.convert_layout((u * decay[None, :]).to(dtype), wide_operand)
                if HAS_OUTPUT:
                    u_operand = gl.convert_layout(u.to(dtype), operand)
                    S_sum = warpgroup_mma(u_decayed, k_tile, S, is_async=True)
                    S_operand = gl.convert_layout(S16, operand)
                    qs = warpgroup_mma(S_operand, q_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                    qs = warpgroup_mma_wait(0, [qs])
                    o_scaled = qs * factor_q[None, :]
                    o_sum = warpgroup_mma(u_operand, p_s.index(stage).permute((1, 0)), o_scaled, is_async=True)
                    # nothing may be under way where S is rounded but what does not read its operand: ptxas serialises
                    # all else
                    S = warpgroup_mma_wait(1, [S_sum])
                    S16 = S.to(dtype)
                    o = warpgroup_mma_wait(0, [o_sum])
                    if HAS_NORMS:
                        mbarrier.wait(norm_ready.index(stage), phase)
                        o *= norm_s.index(stage).load(columns)[None, :]
                    o = o.to(dtype)
                else:
                    S_sum = warpgroup_mma(u_decayed, k_tile, S, is_async=True)
                    if HANDS_OVER:
                        mbarrier.wait(u_taken.index((turn + 1) % 2), ((turn + 1) // 2 + 1) & 1)
                        u_s.store(u.to(dtype))
                        fence_async_shared()
                        mbarrier.arrive(u_formed.index(turn % 2))
                    S = warpgroup_mma_wait(0, [S_sum])
                    S16 = S.to(dtype)
                    mbarrier.arrive(free.index(stage))
                if not IS_MAP and checkpoint_ptr is not None:
                    whole = (i >= ahead) & ((first_chunk + i + 1) % checkpoint_chunks == 0)
                    due = whole & ((first_chunk + i + 1) * C <= length)
                    if due & (checkpoint >= 0) & (checkpoint < checkpoint_end):
                        to = checkpoint_ptr + (checkpoint * stride_checkpoint + hv * (V * K))
                        gl.store(to + inner, S)
                    checkpoint += whole.to(gl.int64)
                turn += 1
            if HAS_OUTPUT:
                if chunks > 0:
                    mbarrier.wait(o_free, (turn + states) & 1)
                    o_s.slice(PART * C, C).permute((1, 0)).store(o)
                    mbarrier.arrive(o_ready)
                    mbarrier.arrive(free.index((turn - 1) % STAGES))
        # read again: kept along the chunks they would be spilled
        work = published(works_s.index(each % FOUND))
        hv, first_row, number, write, keep, kind = work[5], work[6], work[10], work[14], work[16], work[20]
        _, inner = part_of_state(first_row + PART * C, K, wide)
        if keep:
            if IS_MAP:
                to = final_ptr + (number * HV + hv) * ((V + K) * K)
                if kind == 1:
                    to = start_ptr + (number * HV + hv) * (V * K)
            else:
                to = final_ptr + (write * stride_final + hv * (V * K))
            gl.store(to + inner, S.to(to.dtype.element_ty))
        if HAS_OUTPUT and initial_tiles is not None:
            if work[15] & (work[2] == 0):
                mbarrier.arrive(free.index((turn - 1) % STAGES))
        mbarrier.arrive(done.index(each % FOUND))
    wait_for_predecessors()


@gluon.jit
def first_state(
    tiles, works, initial_tiles, pointers, strides, items,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr, IS_MAP: gl.constexpr, STAGES: gl.constexpr, HAS_NORMS: gl.constexpr,
):  # fmt: skip
    """:func:`state` for the program's own warps, whose part has to return something."""
    state(
        tiles, works, initial_tiles, pointers, strides, items,
        HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, HAS_NORMS, 0,
    )  # fmt: skip
    return (items,)


_UNSPECIALIZED = ["N", "T", "num_ordered", "items", "num_slots", "pad_slot_id", "num_checkpoints", "checkpoint_chunks"]


@gluon.jit(do_not_specialize=_UNSPECIALIZED)
def hopper_scan_kernel(
    q_tiles,
    k_tiles,
    upper_tiles,
    lower_tiles,
    factor_tiles,
    v_tiles,
    o_tiles,
    initial_tiles,
    o_ptr,
    initial_ptr,
    start_ptr,
    final_ptr,
    checkpoint_ptr,
    cu_seqlens_ptr,
    read_ptr,
    write_ptr,
    has_initial_ptr,
    checkpoint_offset_ptr,
    factor_ptr,
    kind_ptr,
    first_ptr,
    order_ptr,
    N: gl.int32,
    T: gl.int32,
    num_ordered: gl.int32,
    items: gl.int32,
    num_slots: gl.int32,
    pad_slot_id: gl.int32,
    num_checkpoints: gl.int32,
    checkpoint_chunks: gl.int32,
    stride_o_t,
    stride_o_h,
    stride_initial: gl.int64,
    stride_final: gl.int64,
    stride_checkpoint: gl.int64,
    scale,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    SEGMENTS: gl.constexpr,
    IS_MAP: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    FACTORS: gl.constexpr,
    HAS_NORMS: gl.constexpr,
    STATE_REGISTERS: gl.constexpr,
    AUXILIARY_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """PARTS * 64 rows of one head's state, along the chunks of one sequence or segment; one such item after another.

    As a map pass (IS_MAP) it walks every segment but a sequence's last and writes ``[V + K, K]`` to ``final`` or, where
    the segment forgets what came before it, ``[V, K]`` to ``start`` if that is needed; and which it was to ``kind``.
    """
    if IS_MAP:
        cuda.gdc_launch_dependents()
    dtype: gl.constexpr = k_tiles.dtype
    rows_of_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], dtype)
    rows_of_64: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, C, K], rows_of_K)
    y_s = gl.allocate_shared_memory(dtype, [STAGES, C, C], rows_of_64)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, PARTS * C, C], rows_of_64)
    factor_s = gl.allocate_shared_memory(gl.float32, [STAGES, FACTORS * C], factor_tiles.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=PARTS if IS_MAP else PARTS + 1)
    q_s = k_s
    if not IS_MAP:
        q_s = gl.allocate_shared_memory(dtype, [STAGES, C, K], rows_of_K)
    loaded = (q_s, k_s, v_s, y_s, factor_s, ready, free)
    if IS_MAP:
        own = ()
    elif PARTS == 1:
        S_s = gl.allocate_shared_memory(dtype, [C, K], rows_of_K)
        u_s = gl.allocate_shared_memory(dtype, [C, C], rows_of_64)
        S_formed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        S_taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        u_formed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        u_taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for which in gl.static_range(2):
            mbarrier.init(S_formed.index(which), count=1)
            mbarrier.init(S_taken.index(which), count=1)
            mbarrier.init(u_formed.index(which), count=1)
            mbarrier.init(u_taken.index(which), count=1)
        own = (S_s, u_s, S_formed, S_taken, u_formed, u_taken)
    else:
        p_s = gl.allocate_shared_memory(dtype, [STAGES, C, C], rows_of_64)
        o_s = gl.allocate_shared_memory(dtype, [PARTS * C, C], rows_of_64)
        decay_s = gl.allocate_shared_memory(gl.float32, [STAGES, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        scale_s = gl.allocate_shared_memory(gl.float32, [STAGES, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        p_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        o_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        o_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(p_ready.index(stage), count=1)
        mbarrier.init(o_ready, count=PARTS)
        mbarrier.init(o_free, count=1)
        norm_s = scale_s
        norm_ready = p_ready
        if HAS_NORMS:
            norm_s = gl.allocate_shared_memory(gl.float32, [STAGES, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            norm_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
            for stage in gl.static_range(STAGES):
                mbarrier.init(norm_ready.index(stage), count=1)
        own = (p_s, o_s, decay_s, scale_s, norm_s, p_ready, norm_ready, o_ready, o_free)
    works_s = gl.allocate_shared_memory(gl.int32, [FOUND, FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    found = gl.allocate_shared_memory(gl.int64, [FOUND, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [FOUND, 1], mbarrier.MBarrierLayout())
    for which in gl.static_range(FOUND):
        mbarrier.init(found.index(which), count=1)
        mbarrier.init(done.index(which), count=PARTS if IS_MAP else 3)
    works = (works_s, found, done)
    fence_async_shared()

    # Norms, which come after P, would hold up a copy behind them. Without them it is 1 % faster early where four heads
    # share q and k, and 2 to 10 % slower where fewer do: there DRAM binds
    COPIES_EARLY: gl.constexpr = HAS_NORMS or HV // H >= 4

    # sizes stay out of these tuples, where they would no longer be constants
    batch = (
        cu_seqlens_ptr, read_ptr, write_ptr, has_initial_ptr, factor_ptr, kind_ptr, first_ptr, order_ptr,
        N, T, num_slots, pad_slot_id, num_ordered,
    )  # fmt: skip
    tensors = (q_tiles, k_tiles, v_tiles, upper_tiles, lower_tiles, factor_tiles, initial_tiles)
    tiles = loaded + own
    pointers = (initial_ptr, start_ptr, final_ptr, checkpoint_ptr, checkpoint_offset_ptr, kind_ptr, first_ptr)
    strides = (stride_initial, stride_final, stride_checkpoint, num_checkpoints, checkpoint_chunks)
    if IS_MAP and PARTS == 1:
        gl.warp_specialize([
            (first_state, (tiles, works, initial_tiles, pointers, strides, items,
                           HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, HAS_NORMS)),
            (loader, (tensors, tiles, works, batch, items, H, HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, FACTORS)),
        ], [1], [LOADER_REGISTERS])  # fmt: skip
    elif IS_MAP:
        gl.warp_specialize([
            (first_state, (tiles, works, initial_tiles, pointers, strides, items,
                           HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, HAS_NORMS)),
            (state, (tiles, works, initial_tiles, pointers, strides, items,
                     HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, HAS_NORMS, 1)),
            (loader, (tensors, tiles, works, batch, items, H, HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, FACTORS)),
        ], [4, 1], [STATE_REGISTERS, LOADER_REGISTERS])  # fmt: skip
    elif PARTS == 1:
        gl.warp_specialize([
            (first_state, (tiles, works, initial_tiles, pointers, strides, items,
                           HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, HAS_NORMS)),
            (output, (tiles, works, o_tiles, o_ptr, stride_o_t, stride_o_h, scale, items,
                      HV, K, V, SEGMENTS, STAGES, FACTORS, HAS_NORMS, 0)),
            (output, (tiles, works, o_tiles, o_ptr, stride_o_t, stride_o_h, scale, items,
                      HV, K, V, SEGMENTS, STAGES, FACTORS, HAS_NORMS, 1)),
            (loader, (tensors, tiles, works, batch, items, H, HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, FACTORS)),
        ], [4, 4, 1], [AUXILIARY_REGISTERS, AUXILIARY_REGISTERS, LOADER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (first_state, (tiles, works, initial_tiles, pointers, strides, items,
                           HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, HAS_NORMS)),
            (state, (tiles, works, initial_tiles, pointers, strides, items,
                     HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, HAS_NORMS, 1)),
            (auxiliary, (tiles, works, initial_tiles, o_tiles, o_ptr, stride_o_t, stride_o_h, scale, items,
                         HV, K, V, PARTS, SEGMENTS, STAGES, FACTORS, HAS_NORMS, COPIES_EARLY)),
            (loader, (tensors, tiles, works, batch, items, H, HV, K, V, PARTS, SEGMENTS, IS_MAP, STAGES, FACTORS)),
        ], [4, 4, 1], [STATE_REGISTERS, AUXILIARY_REGISTERS, LOADER_REGISTERS])  # fmt: skip


def _layout(x, shape):
    return gl.NVMMASharedLayout.get_default_for(list(shape), getattr(gl, str(x.dtype).removeprefix("torch.")))


def _step(x):
    """Elements of [B, T, heads, size] from one token to the next; a dimension of 1 has any stride."""
    if x.shape[1] > 1:
        return x.stride(1)
    return x.stride(0) if x.shape[0] > 1 else x.shape[2] * x.shape[3]


def tiles_of(x, columns, width=CHUNK):
    """Descriptor of tiles of 64 tokens and ``columns`` columns of ``x``, [B, T, heads, size], that end anywhere.

    In shared memory ``width`` columns of all tokens come after another, as in a tile of NVMMA's layout: so one message
    copies what that layout's own descriptor would take several for.
    """
    stride = _step(x)
    extents = [x.shape[2] * x.shape[3] // width, SHIFTS, SHIFTS, ROWS, width]
    shape = (columns // width, 1, 1, CHUNK, width)
    return launch.descriptor(x, extents, [width, 2**34 - stride, stride, stride, 1], shape, _layout(x, shape))


def packed_tiles(y, lower_columns):
    """Descriptors of the two parts of a packed Y, in ``y`` of [places, HV, PACKED]: 32 rows of 64 columns, then 32 rows
    of 32, copied as tiles of ``lower_columns``."""
    half, tile = CHUNK // 2, [CHUNK // 2, lower_columns]
    upper = launch.descriptor(y, [y.numel() // CHUNK, CHUNK], [CHUNK, 1], [half, CHUNK], _layout(y, (half, CHUNK)))
    return upper, launch.descriptor(y, [y.numel() // half, half], [half, 1], tile, _layout(y, tile))


def state_tiles(states):
    """Descriptor of blocks of ``states``, [slots, HV, V, K]: 128 bytes of each of 64 rows."""
    slots, HV, V, K = states.shape
    width = 128 // states.element_size()
    shape = (1, 1, CHUNK, width)
    strides = [width, HV * V * K if slots == 1 else states.stride(0), K, 1]
    return launch.descriptor(states, [K // width, slots, HV * V, width], strides, shape, _layout(states, shape))


def fits_tiles(states):
    """Whether :func:`state_tiles` can be made."""
    if states is None or states.element_size() not in (2, 4):
        return False
    slots, step = states.shape[0], states.stride(0)
    # slots that share memory, as an expanded tensor's, are no tensor of TMA's
    in_steps = slots == 1 or (slots > 1 and step >= states.shape[1:].numel() and step * states.element_size() % 16 == 0)
    return in_steps and states.data_ptr() % 16 == 0


def fits(q, k, v, o):
    """Whether the kernel can address these tensors: tokens in equal steps, heads side by side, rows on 16 bytes."""
    B, T, _, K = q.shape
    if K not in (64, 128) or v.shape[3] % CHUNK or B * T == 0 or B * T > ROWS or q.element_size() != 2:
        return False
    return all(
        x.stride(3) == 1
        and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
        and _step(x) * 2 % 16 == 0
        and x.data_ptr() % 16 == 0
        and (B == 1 or x.stride(0) == T * _step(x))
        for x in (q, k, v, o)
    )


def scan(
    q,
    k,
    v,
    y,
    factors,
    o,
    initial,
    final,
    *,
    scale,
    norms_in_scan,
    config,
    map_config,
    segments,
    firsts,
    order,
    cu_seqlens,
    count,
    read,
    write,
    has_initial_state,
    pad_slot_id,
    checkpoints,
    checkpoint_offsets,
    checkpoint_interval,
):
    """Run the scan over ``count`` sequences; long ones in segments, where ``segments`` has more than one. ``firsts``:
    copies of what long sequences start from, where their slots are written in place. ``order``: sequences, longest
    first, where that matters. ``norms_in_scan``: divide by the norms of q, which ``factors`` do not have."""
    batch, tokens, H, K = q.shape
    HV, V = v.shape[2:]
    rows_of_factors = factors.shape[2]
    tiles = (
        tiles_of(q, K),
        tiles_of(k, K),
        *packed_tiles(y, CHUNK),
        launch.descriptor(
            factors, [factors.numel()], [1], [rows_of_factors * CHUNK], _layout(factors, (rows_of_factors * CHUNK,))
        ),
    )
    num_cut = chunk_segments.num_places(count, tokens, cu_seqlens, segments, segments.long_tokens)
    num_maps = chunk_segments.num_places(count, tokens, cu_seqlens, segments, segments.map_tokens)
    num_slots = final.shape[0]
    maps = starts = kinds = None
    if num_maps:
        maps = launch.empty(factors, num_maps, HV, V + K, K)
        starts = launch.empty(factors, num_maps, HV, V, K)
        kinds = launch.empty(factors, num_maps, HV, dtype=torch.int32)

    processors = launch.multiprocessors(q.device)
    # of few sequences in segments some programs would get more than others: there the hardware hands out the items
    spread = (
        num_cut > 0 and batch * tokens >= count * segments.long_tokens and count * HV * (V // CHUNK) < 2 * processors
    )

    # narrow programs of larger heads are for so few sequences that each has an SM
    has_order = config.parts * CHUNK == min(V, 2 * CHUNK)

    def start(config, initial, final, is_map, **tensors):
        rows = config.parts * CHUNK
        items = (num_maps if is_map else count + num_cut) * HV * ((V + K if is_map else V) // rows)
        launch.run(
            hopper_scan_kernel,
            (items if spread else min(items, processors),),
            *tiles,
            tiles_of(v, rows),
            tiles_of(o, rows),
            state_tiles(initial) if config.parts == 2 and not is_map and fits_tiles(initial) else None,
            o,
            initial,
            starts,
            final,
            tensors.get("checkpoints"),
            cu_seqlens,
            *(tensors.get(name) for name in ("read", "write", "has_initial_state", "checkpoint_offsets")),
            factors if num_cut else None,
            kinds if is_map else None,
            None if is_map else firsts,
            # where there is none, what has its type stands for it
            None if is_map or not has_order else cu_seqlens if order is None else order,
            count,
            tokens,
            0 if order is None else count,
            items,
            num_slots,
            pad_slot_id,
            0 if checkpoints is None else checkpoints.shape[0],
            checkpoint_interval // CHUNK,
            _step(o),
            o.stride(2),
            0 if initial is None else initial.stride(0),
            final.stride(0),
            0 if checkpoints is None else checkpoints.stride(0),
            scale,
            config=config,
            H=H,
            HV=HV,
            K=K,
            V=V,
            SEGMENTS=segments if num_cut else launch.NO_SEGMENTS,
            IS_MAP=is_map,
            PARTS=config.parts,
            STAGES=config.stages,
            FACTORS=rows_of_factors,
            # a map has no output
            HAS_NORMS=norms_in_scan and not is_map,
            STATE_REGISTERS=config.state_registers,
            AUXILIARY_REGISTERS=config.auxiliary_registers,
        )

    if num_maps:
        start(map_config, None, maps, True)
        chunk_segments.combine(
            maps,
            starts,
            kinds,
            initial,
            cu_seqlens=cu_seqlens,
            count=count,
            tokens=tokens,
            read=read,
            has_initial_state=has_initial_state,
            pad_slot_id=pad_slot_id,
            config=segments,
        )
    start(
        config,
        initial,
        final,
        False,
        checkpoints=checkpoints,
        read=read,
        write=write,
        has_initial_state=has_initial_state,
        checkpoint_offsets=checkpoint_offsets,
    )
