"""The scan of the chunked gated delta rule on Hopper, in Gluon: asynchronous copies and products, a job for each warp.

With Y of the preparation (kernels/chunk_prep.py: gates, beta and inverse norms of k are in it), per head and chunk:

    P = scale G * tril(q^ k^T)                                          auxiliary warps
    W = v - gamma * (k^ S^T),   U = Y^T W                               a warpgroup for each 64 rows of the state
    o = scale gamma * (q^ S^T) + P U,   S <- gamma_C S + ((gamma_C / gamma) * U)^T k

A program owns 64 or 128 rows of one head's state and walks the chunks of a sequence, or of a segment of one. One warp
copies tiles into shared memory, some chunks ahead; auxiliary warps form P; each state warpgroup holds its 64 rows in
registers, as fp32 and as operand, everything transposed. Rows have the same bits in either size of program.

Rows of a tile past the end of the sequence arrive as zeros and are not written: a descriptor's first two dimensions
shift its base so that its third ends where the sequence does (the addresses wrap at 2^64). So no neighbour's token,
whatever it holds, enters.

A map pass runs segments without output, from a zero state and, without values, from the identity:
kernels/chunk_segments.py says what for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gdn_kernels import launch
from gdn_kernels.kernels import chunk_segments, recurrent

CHUNK = 64
C = gl.constexpr(CHUNK)
# Extent of the dimension that ends with the sequence, and of those that shift the base.
ROWS = 1 << 30
SHIFTS = 0x7FFF0000
BILLION = gl.constexpr(ROWS)

# Triton 3.9 has new names for what 3.6 has.
_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)

span = gluon.jit(recurrent.span.fn)
slots = gluon.jit(recurrent.slots.fn)
segment_of = gluon.jit(chunk_segments.segment_of.fn)
first_map = gluon.jit(chunk_segments.first_map.fn)


@gluon.jit
def load_rows(tiles, end, length, row, column, ready, to):
    """Copy 64 rows of the sequence of ``length`` rows before ``end``, from its row ``row`` on; zeros past its end."""
    shape: gl.constexpr = tiles.block_shape
    to = to.reshape(shape)
    _load(tiles, [BILLION, end, BILLION - length + row, column], ready, to)


@gluon.jit
def store_rows(tiles, end, length, row, column, values, through):
    """Write the transpose of ``values`` to the sequence's rows from ``row`` on, but nothing past its end."""
    shape: gl.constexpr = tiles.block_shape
    tma.store_wait(0)
    through.permute((1, 0)).store(values)
    fence_async_shared()
    source = through.reshape(shape)
    _store(tiles, [BILLION, end, BILLION - length + row, column], source)


@gluon.jit
def loader(
    tensors, tiles, work,
    HV: gl.constexpr, K: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, IS_MAP: gl.constexpr,
):  # fmt: skip
    """Tiles of each chunk, as stages come free."""
    q_tiles, k_tiles, v_tiles, y_tiles, factor_tiles = tensors
    q_s, k_s, v_s, y_s, factor_s, ready, free = tiles
    chunks, first_chunk, end, length, head, q_column, v_column, has_values = work
    BASE: gl.constexpr = (C * K + C * C) * 2 + 4 * C * 4
    VALUES: gl.constexpr = PARTS * C * C * 2
    for i in range(chunks):
        stage = i % STAGES
        bar = ready.index(stage)
        row = (first_chunk + i) * C
        each = head + i * HV
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        if IS_MAP:
            mbarrier.expect(bar, BASE + VALUES, pred=has_values)
            mbarrier.expect(bar, BASE, pred=not has_values)
        else:
            mbarrier.expect(bar, BASE + VALUES + C * K * 2)
        load_rows(k_tiles, end, length, row, q_column, bar, k_s.index(stage))
        _load(factor_tiles, [each * (4 * C)], bar, factor_s.index(stage))
        if has_values:
            for part in gl.static_range(PARTS):
                load_rows(v_tiles, end, length, row, v_column + part * C, bar, v_s.index(stage * PARTS + part))
        _load(y_tiles, [each * C, 0], bar, y_s.index(stage))
        if not IS_MAP:
            load_rows(q_tiles, end, length, row, q_column, bar, q_s.index(stage))


@gluon.jit
def auxiliary(tiles, chunks, STAGES: gl.constexpr):
    """P of each chunk, and the decay from each token to the chunk's end."""
    q_s, k_s, p_s, decay_s, factor_s, ready, free, p_ready = tiles
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lower = gl.arange(0, C, rows)[:, None] >= gl.arange(0, C, columns)[None, :]
    zeros = gl.zeros([C, C], gl.float32, layout)
    for i in range(chunks):
        stage = i % STAGES
        # a stage that is ready again has been given back by all who read its P
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        p = warpgroup_mma(q_s.index(stage), k_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        factors = factor_s.index(stage)
        gates_i = factors.slice(0, C).load(rows)
        gates_j = factors.slice(0, C).load(columns)
        scale_i = factors.slice(3 * C, C).load(rows)
        last = gl.max(factors.slice(C - 1, 1).load(line), 0)
        decay_s.index(stage).store(gl.exp2(last - factors.slice(0, C).load(line)))
        p = warpgroup_mma_wait(0, [p])
        p = p * (gl.exp2(gl.minimum(gates_i[:, None] - gates_j[None, :], 0.0)) * scale_i[:, None])
        p_s.index(stage).store(gl.where(lower, p, 0.0).to(p_s.dtype))
        fence_async_shared()
        mbarrier.arrive(p_ready.index(stage))
        mbarrier.arrive(free.index(stage))


@gluon.jit
def state(
    tiles, pointers, work,
    V: gl.constexpr, K: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    IS_MAP: gl.constexpr,
):  # fmt: skip
    """64 rows of the state along the chunks."""
    q_s, k_s, v_s, y_s, p_s, o_s, decay_s, factor_s, ready, free, p_ready = tiles
    o_tiles, initial_ptr, start_ptr, final_ptr, checkpoint_ptr = pointers
    chunks, first_chunk, end, length, v_column, has_values, initial, start, final, known, later = work[:11]
    keep, checkpoint, checkpoint_end, checkpoint_chunks, stride_checkpoint, first_row = work[11:]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    wide_operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, narrow)
    dtype: gl.constexpr = k_s.dtype
    # one warpgroup has registers to keep the matrix units busy by itself; two fill each other's gaps
    IS_ALONE: gl.constexpr = PARTS == 1
    rows = first_row + PART * C + gl.arange(0, C, gl.SliceLayout(1, wide))
    inner = rows[:, None] * K + gl.arange(0, K, gl.SliceLayout(0, wide))[None, :]

    S = gl.zeros([C, K], gl.float32, wide)
    if IS_MAP:
        if not has_values:
            diagonal = (rows - V)[:, None] == gl.arange(0, K, gl.SliceLayout(0, wide))[None, :]
            S = gl.where(diagonal, 1.0, S)
    else:
        if start_ptr is not None:
            if later:
                S = gl.load(start_ptr + start + inner)
        if initial_ptr is not None:
            if known:
                S = gl.load(initial_ptr + initial + inner).to(gl.float32)
    S_operand = gl.convert_layout(S.to(dtype), operand)
    zeros = gl.zeros([C, C], gl.float32, narrow)
    if not IS_MAP:
        o_tile = o_s.index(PART)
        o = gl.zeros([C, C], dtype, narrow)
    for i in range(chunks):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        row = (first_chunk + i) * C
        mbarrier.wait(ready.index(stage), phase)
        ks = warpgroup_mma(S_operand, k_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if IS_ALONE and not IS_MAP:
            qs = warpgroup_mma(S_operand, q_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        # what is left of the chunk before, while the matrix units work
        if i > 0:
            mbarrier.arrive(free.index((i - 1) % STAGES))
            if not IS_MAP:
                store_rows(o_tiles, end, length, row - C, v_column + PART * C, o, o_tile)
        factors = factor_s.index(stage)
        factor_k = factors.slice(C, C).load(columns)
        v = gl.zeros([C, C], dtype, narrow)
        if has_values:
            v = v_s.index(stage * PARTS + PART).permute((1, 0)).load(narrow)
        if IS_ALONE and not IS_MAP:
            ks = warpgroup_mma_wait(1, [ks])
        else:
            ks = warpgroup_mma_wait(0, [ks])
        w = gl.convert_layout((v.to(gl.float32) - ks * factor_k[None, :]).to(dtype), operand)
        u = warpgroup_mma(w, y_s.index(stage), zeros, use_acc=False, is_async=True)
        last = gl.max(factors.slice(C - 1, 1).load(columns), 0)
        S = S * gl.exp2(last)
        if IS_MAP:
            decay = gl.exp2(last - factors.slice(0, C).load(columns))
        else:
            factor_q = factors.slice(2 * C, C).load(columns)
            if IS_ALONE:
                qs = warpgroup_mma_wait(1, [qs])
                o_sum = qs * factor_q[None, :]
            mbarrier.wait(p_ready.index(stage), phase)
            decay = decay_s.index(stage).load(columns)
        u = warpgroup_mma_wait(0, [u])
        u_decayed = gl.convert_layout((u * decay[None, :]).to(dtype), wide_operand)
        if IS_MAP:
            S = warpgroup_mma(u_decayed, k_s.index(stage), S, is_async=True)
            S = warpgroup_mma_wait(0, [S])
            S_operand = gl.convert_layout(S.to(dtype), operand)
        else:
            u_operand = gl.convert_layout(u.to(dtype), operand)
            S_sum = warpgroup_mma(u_decayed, k_s.index(stage), S, is_async=True)
            if not IS_ALONE:
                qs = warpgroup_mma(S_operand, q_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                qs = warpgroup_mma_wait(0, [qs])
                o_sum = qs * factor_q[None, :]
            o_sum = warpgroup_mma(u_operand, p_s.index(stage).permute((1, 0)), o_sum, is_async=True)
            # nothing may be under way where S is rounded but what does not read its operand: ptxas serialises all else
            S = warpgroup_mma_wait(1, [S_sum])
            S_operand = gl.convert_layout(S.to(dtype), operand)
            o = warpgroup_mma_wait(0, [o_sum]).to(dtype)
            if checkpoint_ptr is not None:
                whole = (first_chunk + i + 1) % checkpoint_chunks == 0
                due = whole & (row + C <= length) & (checkpoint >= 0) & (checkpoint < checkpoint_end)
                if due:
                    gl.store(checkpoint_ptr + checkpoint * stride_checkpoint + inner, S)
                checkpoint += whole.to(gl.int64)
    if not IS_MAP:
        if chunks > 0:
            store_rows(o_tiles, end, length, (first_chunk + chunks - 1) * C, v_column + PART * C, o, o_tile)
        tma.store_wait(0)
    if keep:
        gl.store(final_ptr + final + inner, S.to(final_ptr.dtype.element_ty))


@gluon.jit
def first_state(
    tiles, pointers, work,
    V: gl.constexpr, K: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    IS_MAP: gl.constexpr,
):  # fmt: skip
    """:func:`state` for the program's own warps, whose part has to return something."""
    state(
        tiles, pointers, work,
        V, K, PART, PARTS, STAGES, IS_MAP,
    )  # fmt: skip
    return (work[0],)


@gluon.jit(do_not_specialize=["N", "T", "num_slots", "pad_slot_id", "num_checkpoints", "checkpoint_chunks"])
def hopper_scan_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    y_tiles,
    factor_tiles,
    o_tiles,
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
    N: gl.int32,
    T: gl.int32,
    num_slots: gl.int32,
    pad_slot_id: gl.int32,
    num_checkpoints: gl.int32,
    checkpoint_chunks: gl.int32,
    stride_o_t,
    stride_o_h,
    stride_initial,
    stride_final,
    stride_checkpoint,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    MAX_SEGMENTS: gl.constexpr,
    MIN_TOKENS: gl.constexpr,
    LONG_TOKENS: gl.constexpr,
    IS_MAP: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    STATE_REGISTERS: gl.constexpr,
    AUXILIARY_REGISTERS: gl.constexpr,
):
    """PARTS * 64 rows of one head's state, along the chunks of one sequence or segment.

    As a map pass (IS_MAP) it walks every segment but a sequence's last and writes ``[V + K, K]`` to ``final``.
    """
    BLOCKS: gl.constexpr = (V + K if IS_MAP else V) // (PARTS * C)
    pid = gl.program_id(0)
    first_row = (pid % BLOCKS) * (PARTS * C)
    hv = (pid // BLOCKS) % HV
    n = (pid // (BLOCKS * HV)).to(gl.int64)
    h = hv // (HV // H)

    place_of_segment = n
    if IS_MAP:
        place_of_segment += N
    segment = n.to(gl.int32) * 0
    is_last = segment == 0
    first_chunk = segment
    if MAX_SEGMENTS > 1:
        n, segment, segments, first_chunk, chunks, batch, start, length = segment_of(
            cu_seqlens_ptr, place_of_segment, N, T, MAX_SEGMENTS, MIN_TOKENS, LONG_TOKENS
        )
        is_last = segment == segments - 1
    else:
        batch, start, length = span(cu_seqlens_ptr, n, T)
        chunks = (length + C - 1) // C
    if cu_seqlens_ptr is not None:
        place = start // C + n
    else:
        place = n * ((T + C - 1) // C)
    end = (batch * T + start + length).to(gl.int32)
    has_values = first_row < V
    checkpoint = n * 0
    checkpoint_end = n * 0
    if IS_MAP:
        known = has_values
        later = has_values
        keep = chunks > 0
        initial = n * 0
        final = ((place_of_segment - N) * HV + hv) * ((V + K) * K)
    else:
        read, write, active, keep, known = slots(
            read_ptr, write_ptr, has_initial_ptr, n, length, num_slots, pad_slot_id
        )
        later = segment > 0
        if MAX_SEGMENTS > 1:
            known = known & (segment == 0)
            keep = keep & is_last
        if not active:
            # a sequence without a slot: zeros
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // C, C // 8], [gl.num_warps(), 1], [1, 0])
            o16 = gl.arange(0, 16, gl.SliceLayout(1, layout))
            columns = gl.arange(0, C, gl.SliceLayout(0, layout))
            o_base = o_ptr + ((end - length).to(gl.int64) * stride_o_t + hv * stride_o_h + first_row)
            zeros = gl.zeros([16, C], o_ptr.dtype.element_ty, layout)
            for i in range(first_chunk * C, gl.minimum((first_chunk + chunks) * C, length), 16):
                for each in gl.static_range(PARTS):
                    to = (
                        o_base + i.to(gl.int64) * stride_o_t + (o16[:, None] * stride_o_t + each * C + columns[None, :])
                    )
                    gl.store(to, zeros, mask=(i + o16 < length)[:, None])
            chunks = chunks * 0
        if checkpoint_ptr is not None:
            checkpoint = gl.load(checkpoint_offset_ptr + n).to(gl.int64)
            checkpoint_end = gl.load(checkpoint_offset_ptr + n + 1).to(gl.int64)
            checkpoint_end = gl.minimum(checkpoint_end, n * 0 + num_checkpoints)
            checkpoint += first_chunk // checkpoint_chunks
            checkpoint_ptr += hv * (V * K)
        initial = read * stride_initial + hv * (V * K)
        final = write * stride_final + hv * (V * K)

    dtype: gl.constexpr = k_tiles.dtype
    rows_of_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], dtype)
    rows_of_64: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [STAGES, C, K], rows_of_K)
    y_s = gl.allocate_shared_memory(dtype, [STAGES, C, C], rows_of_64)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * PARTS, C, C], rows_of_64)
    factor_s = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * C], factor_tiles.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    p_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if IS_MAP:
        q_s = k_s
        p_s = y_s
        o_s = y_s
        decay_s = factor_s
    else:
        q_s = gl.allocate_shared_memory(dtype, [STAGES, C, K], rows_of_K)
        p_s = gl.allocate_shared_memory(dtype, [STAGES, C, C], rows_of_64)
        o_s = gl.allocate_shared_memory(dtype, [PARTS, C, C], rows_of_64)
        decay_s = gl.allocate_shared_memory(gl.float32, [STAGES, C], plain)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=PARTS if IS_MAP else PARTS + 1)
        mbarrier.init(p_ready.index(stage), count=1)
    fence_async_shared()

    begin = n * 0
    if MAX_SEGMENTS > 1 and not IS_MAP:
        before = first_map(cu_seqlens_ptr, n, start, T, MAX_SEGMENTS, MIN_TOKENS, LONG_TOKENS) + segment - 1
        begin = (before * HV + hv) * (V * K)
    q_column = h * K
    v_column = hv * V + first_row
    head = ((place + first_chunk) * HV + hv).to(gl.int32)
    # sizes stay out of these tuples, where they would no longer be constants
    tensors = (q_tiles, k_tiles, v_tiles, y_tiles, factor_tiles)
    loaded_tiles = (q_s, k_s, v_s, y_s, factor_s, ready, free)
    loads = (chunks, first_chunk, end, length, head, q_column, v_column, has_values)
    formed_tiles = (q_s, k_s, p_s, decay_s, factor_s, ready, free, p_ready)
    tiles = (q_s, k_s, v_s, y_s, p_s, o_s, decay_s, factor_s, ready, free, p_ready)
    pointers = (o_tiles, initial_ptr, start_ptr, final_ptr, checkpoint_ptr)
    work = (
        chunks, first_chunk, end, length, v_column, has_values, initial, begin, final, known, later,
        keep, checkpoint, checkpoint_end, checkpoint_chunks, stride_checkpoint, first_row,
    )  # fmt: skip
    if IS_MAP and PARTS == 1:
        gl.warp_specialize([
            (first_state, (tiles, pointers, work, V, K, 0, PARTS, STAGES, IS_MAP)),
            (loader, (tensors, loaded_tiles, loads, HV, K, PARTS, STAGES, IS_MAP)),
        ], [1], [40])  # fmt: skip
    elif IS_MAP:
        gl.warp_specialize([
            (first_state, (tiles, pointers, work, V, K, 0, PARTS, STAGES, IS_MAP)),
            (state, (tiles, pointers, work, V, K, 1, PARTS, STAGES, IS_MAP)),
            (loader, (tensors, loaded_tiles, loads, HV, K, PARTS, STAGES, IS_MAP)),
        ], [4, 1], [STATE_REGISTERS, 40])  # fmt: skip
    elif PARTS == 1:
        gl.warp_specialize([
            (first_state, (tiles, pointers, work, V, K, 0, PARTS, STAGES, IS_MAP)),
            (auxiliary, (formed_tiles, chunks, STAGES)),
            (loader, (tensors, loaded_tiles, loads, HV, K, PARTS, STAGES, IS_MAP)),
        ], [4, 1], [AUXILIARY_REGISTERS, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (first_state, (tiles, pointers, work, V, K, 0, PARTS, STAGES, IS_MAP)),
            (state, (tiles, pointers, work, V, K, 1, PARTS, STAGES, IS_MAP)),
            (auxiliary, (formed_tiles, chunks, STAGES)),
            (loader, (tensors, loaded_tiles, loads, HV, K, PARTS, STAGES, IS_MAP)),
        ], [4, 4, 1], [STATE_REGISTERS, AUXILIARY_REGISTERS, 40])  # fmt: skip


def _layout(x, shape):
    return gl.NVMMASharedLayout.get_default_for(list(shape), getattr(gl, str(x.dtype).removeprefix("torch.")))


def _tiles(x, columns):
    """Descriptor of tiles of 64 tokens and ``columns`` columns of ``x``, [B, T, heads, size], that end anywhere."""
    stride = x.stride(1)
    shape = (1, 1, CHUNK, columns)
    extents = [SHIFTS, SHIFTS, ROWS, x.shape[2] * x.shape[3]]
    return launch.descriptor(x, extents, [2**34 - stride, stride, stride, 1], shape, _layout(x, shape))


def fits(q, k, v, o):
    """Whether the kernel can address these tensors: tokens in equal steps, heads side by side, rows on 16 bytes."""
    B, T, _, K = q.shape
    if K not in (64, 128) or v.shape[3] % CHUNK or B * T == 0 or B * T > ROWS or q.element_size() != 2:
        return False
    return all(
        x.stride(3) == 1
        and x.stride(2) == x.shape[3]
        and x.stride(1) * 2 % 16 == 0
        and x.data_ptr() % 16 == 0
        and (B == 1 or x.stride(0) == T * x.stride(1))
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
    config,
    map_config,
    segments,
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
    """Run the scan over ``count`` sequences; long ones in segments, where ``segments`` has more than one."""
    tokens, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    tiles = (
        *(_tiles(x, columns) for x, columns in ((q, K), (k, K), (v, CHUNK))),
        launch.descriptor(y, [y.numel() // CHUNK, CHUNK], [CHUNK, 1], [CHUNK, CHUNK], _layout(y, (CHUNK, CHUNK))),
        launch.descriptor(factors, [factors.numel()], [1], [4 * CHUNK], _layout(factors, (4 * CHUNK,))),
        _tiles(o, CHUNK),
    )
    starts = None
    num_maps = chunk_segments.num_maps(count, tokens, cu_seqlens, segments) if segments.max_segments > 1 else 0
    if num_maps:
        maps = launch.empty(factors, num_maps, HV, V + K, K)
        starts = launch.empty(factors, num_maps, HV, V, K)

    def start(config, initial, final, is_map, **tensors):
        launch.run(
            hopper_scan_kernel,
            ((num_maps if is_map else count + num_maps) * HV * ((V + K if is_map else V) // (config.parts * CHUNK)),),
            *tiles,
            o,
            initial,
            tensors.get("starts"),
            final,
            tensors.get("checkpoints"),
            cu_seqlens,
            *(tensors.get(name) for name in ("read", "write", "has_initial_state", "checkpoint_offsets")),
            count,
            tokens,
            final.shape[0],
            pad_slot_id,
            0 if checkpoints is None else checkpoints.shape[0],
            checkpoint_interval // CHUNK,
            o.stride(1),
            o.stride(2),
            0 if initial is None else initial.stride(0),
            final.stride(0),
            0 if checkpoints is None else checkpoints.stride(0),
            config=config,
            H=H,
            HV=HV,
            K=K,
            V=V,
            MAX_SEGMENTS=segments.max_segments if num_maps else 1,
            MIN_TOKENS=segments.min_tokens,
            LONG_TOKENS=segments.long_tokens,
            IS_MAP=is_map,
            PARTS=config.parts,
            STAGES=config.stages,
            STATE_REGISTERS=config.state_registers,
            AUXILIARY_REGISTERS=config.auxiliary_registers,
        )

    if starts is not None:
        start(map_config, None, maps, True)
        chunk_segments.combine(
            maps,
            starts,
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
        starts=starts,
        checkpoints=checkpoints,
        read=read,
        write=write,
        has_initial_state=has_initial_state,
        checkpoint_offsets=checkpoint_offsets,
    )
