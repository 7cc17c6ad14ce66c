"""The scan of the chunked gated delta rule on Hopper, in Gluon: asynchronous copies, products and warps of one job each.

With Y the preparation's (kernels/chunk_prep.py; gates, beta and norms of k folded in), per value head and chunk:

    P = scale G * tril(q^ k^T)                       auxiliary warps
    W = v - gamma * (k^ S^T),   U = W^T Y            one warpgroup for each 64 rows of V
    o = scale gamma * (q^ S^T) + P U^T,   S <- gamma_C S + ((gamma_C / gamma) * U) k

A program owns 64 or 128 rows of one head's state and walks the chunks of one sequence. One warp copies tiles into
shared memory, several chunks ahead; auxiliary warps form P; each state warpgroup holds its 64 rows in registers, as
fp32 and as operand. A copy ends with the sequence: rows past it arrive as zeros and are not written.
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

from gdn_kernels.kernels import recurrent

C = gl.constexpr(64)
# Rows of the dimension that a ragged copy is cut off at: see ragged().
BILLION = gl.constexpr(1 << 30)

span = gluon.jit(recurrent.span.fn)
slots = gluon.jit(recurrent.slots.fn)


@gluon.jit
def copy_rows(tiles, start, length, row, column, ready, to):
    """Copy 64 rows of a sequence from ``row`` on, zeros past its end."""
    shape: gl.constexpr = tiles.block_shape
    to = to._reinterpret(tiles.dtype, shape, tiles.layout)
    tma.async_copy_global_to_shared(tiles, [BILLION, start + length, BILLION - length + row, column], ready, to)


@gluon.jit
def loader(
    q_tiles, k_tiles, v_tiles, y_tiles, factor_tiles, q_s, k_s, v_s, y_s, factor_s, ready, free,
    chunks, start, length, head, q_column, v_column,
    HV: gl.constexpr, K: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for i in range(chunks):
        stage = i % STAGES
        bar = ready.index(stage)
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, (2 * C * K + C * C + PARTS * C * C) * 2 + 4 * C * 4)
        copy_rows(k_tiles, start, length, i * C, q_column, bar, k_s.index(stage))
        copy_rows(q_tiles, start, length, i * C, q_column, bar, q_s.index(stage))
        for part in gl.static_range(PARTS):
            to = v_s.index(stage * PARTS + part)
            copy_rows(v_tiles, start, length, i * C, v_column + part * C, bar, to)
        each = head + i * HV
        tma.async_copy_global_to_shared(factor_tiles, [each * (4 * C)], bar, factor_s.index(stage))
        tma.async_copy_global_to_shared(y_tiles, [each * C, 0], bar, y_s.index(stage))


@gluon.jit
def auxiliary(
    q_s, k_s, p_s, decay_s, factor_s, ready, free, p_ready, chunks, STAGES: gl.constexpr,
):  # fmt: skip
    """P of each chunk, and the decay from each token to the chunk's end."""
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
        decay = gl.exp2(last - factors.slice(0, C).load(line))
        decay_s.index(stage).store(decay)
        p = warpgroup_mma_wait(0, [p])
        p = p * (gl.exp2(gl.minimum(gates_i[:, None] - gates_j[None, :], 0.0)) * scale_i[:, None])
        p_s.index(stage).store(gl.where(lower, p, 0.0).to(p_s.dtype))
        fence_async_shared()
        mbarrier.arrive(p_ready.index(stage))
        mbarrier.arrive(free.index(stage))


@gluon.jit
def state(
    q_s, k_s, v_s, y_s, p_s, o_s, decay_s, factor_s, o_tiles, initial_ptr, final_ptr, checkpoint_ptr,
    ready, free, p_ready,
    chunks, start, length, v_column, initial, final, known, keep,
    checkpoint, checkpoint_end, checkpoint_chunks, stride_checkpoint, first_row,
    K: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of the state along the chunks of the sequence."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    wide_operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, narrow)
    dtype: gl.constexpr = q_s.dtype
    rows = first_row + PART * C + gl.arange(0, C, gl.SliceLayout(1, wide))
    inner = rows[:, None] * K + gl.arange(0, K, gl.SliceLayout(0, wide))[None, :]

    S = gl.zeros([C, K], gl.float32, wide)
    if initial_ptr is not None:
        if known:
            S = gl.load(initial_ptr + initial + inner).to(gl.float32)
    S_operand = gl.convert_layout(S.to(dtype), operand)
    zeros = gl.zeros([C, C], gl.float32, narrow)
    o_tile = o_s.index(PART)
    if PARTS == 1:
        o = gl.zeros([C, C], dtype, narrow)
    for i in range(chunks):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(ready.index(stage), phase)
        ks = warpgroup_mma(S_operand, k_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if PARTS == 1:
            # one warpgroup has registers enough to keep the matrix units busy by itself; two fill each other's gaps
            qs = warpgroup_mma(S_operand, q_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if i > 0:
            mbarrier.arrive(free.index((i - 1) % STAGES))
            if PARTS == 1:
                store_rows(o_tiles, start, length, i * C - C, v_column + PART * C, o, o_tile)
        factors = factor_s.index(stage)
        factor_k = factors.slice(C, C).load(columns)
        v = v_s.index(stage * PARTS + PART).permute((1, 0)).load(narrow)
        ks = warpgroup_mma_wait(2 - PARTS, [ks])
        w = gl.convert_layout((v.to(gl.float32) - ks * factor_k[None, :]).to(dtype), operand)
        u = warpgroup_mma(w, y_s.index(stage), zeros, use_acc=False, is_async=True)
        S = S * gl.exp2(gl.max(factors.slice(C - 1, 1).load(columns), 0))
        factor_q = factors.slice(2 * C, C).load(columns)
        if PARTS == 1:
            qs = warpgroup_mma_wait(1, [qs])
            o_sum = qs * factor_q[None, :]
        mbarrier.wait(p_ready.index(stage), phase)
        decay = decay_s.index(stage).load(columns)
        u = warpgroup_mma_wait(0, [u])
        u_operand = gl.convert_layout(u.to(dtype), operand)
        u_decayed = gl.convert_layout((u * decay[None, :]).to(dtype), wide_operand)
        S_sum = warpgroup_mma(u_decayed, k_s.index(stage), S, is_async=True)
        if PARTS == 2:
            qs = warpgroup_mma(S_operand, q_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            qs = warpgroup_mma_wait(0, [qs])
            o_sum = qs * factor_q[None, :]
        o_sum = warpgroup_mma(u_operand, p_s.index(stage).permute((1, 0)), o_sum, is_async=True)
        S = warpgroup_mma_wait(1, [S_sum])
        S_operand = gl.convert_layout(S.to(dtype), operand)
        o_sum = warpgroup_mma_wait(0, [o_sum])
        if PARTS == 1:
            o = o_sum.to(dtype)
        else:
            store_rows(o_tiles, start, length, i * C, v_column + PART * C, o_sum.to(dtype), o_tile)
        if checkpoint_ptr is not None:
            whole = (i + 1) % checkpoint_chunks == 0
            if whole & ((i + 1) * C <= length) & (checkpoint >= 0) & (checkpoint < checkpoint_end):
                gl.store(checkpoint_ptr + checkpoint * stride_checkpoint + inner, S)
            checkpoint += whole.to(gl.int64)
    if PARTS == 1:
        if chunks > 0:
            store_rows(o_tiles, start, length, chunks * C - C, v_column + PART * C, o, o_tile)
    tma.store_wait(0)
    if keep:
        gl.store(final_ptr + final + inner, S.to(final_ptr.dtype.element_ty))


@gluon.jit
def store_rows(tiles, start, length, row, column, values, through):
    """Write [columns, 64 rows] to the sequence's rows from ``row`` on, but none past its end."""
    shape: gl.constexpr = tiles.block_shape
    tma.store_wait(0)
    through.permute((1, 0)).store(values)
    fence_async_shared()
    source = through._reinterpret(tiles.dtype, shape, tiles.layout)
    tma.async_copy_shared_to_global(tiles, [BILLION, start + length, BILLION - length + row, column], source)


@gluon.jit
def first_state(
    q_s, k_s, v_s, y_s, p_s, o_s, decay_s, factor_s, o_tiles, initial_ptr, final_ptr, checkpoint_ptr,
    ready, free, p_ready,
    chunks, start, length, v_column, initial, final, known, keep,
    checkpoint, checkpoint_end, checkpoint_chunks, stride_checkpoint, first_row,
    K: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """:func:`state` where the program's own warps do it: such a part has to return something."""
    state(
        q_s, k_s, v_s, y_s, p_s, o_s, decay_s, factor_s, o_tiles, initial_ptr, final_ptr, checkpoint_ptr,
        ready, free, p_ready,
        chunks, start, length, v_column, initial, final, known, keep,
        checkpoint, checkpoint_end, checkpoint_chunks, stride_checkpoint, first_row,
        K, PART, PARTS, STAGES,
    )  # fmt: skip
    return (chunks,)


@gluon.jit(do_not_specialize=["T", "num_slots", "pad_slot_id", "num_checkpoints", "checkpoint_chunks"])
def hopper_scan_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    y_tiles,
    factor_tiles,
    o_tiles,
    o_ptr,
    initial_ptr,
    final_ptr,
    checkpoint_ptr,
    cu_seqlens_ptr,
    read_ptr,
    write_ptr,
    has_initial_ptr,
    checkpoint_offset_ptr,
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
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    STATE_REGISTERS: gl.constexpr,
    AUXILIARY_REGISTERS: gl.constexpr,
):
    """PARTS * 64 rows of one head's state, along the chunks of one sequence."""
    BLOCKS: gl.constexpr = V // (PARTS * C)
    pid = gl.program_id(0)
    block = pid % BLOCKS
    hv = (pid // BLOCKS) % HV
    n = (pid // (BLOCKS * HV)).to(gl.int64)
    h = hv // (HV // H)

    batch, start, length = span(cu_seqlens_ptr, n, T)
    if cu_seqlens_ptr is not None:
        place = start // C + n
    else:
        place = n * ((T + C - 1) // C)
    read, write, active, keep, known = slots(read_ptr, write_ptr, has_initial_ptr, n, length, num_slots, pad_slot_id)
    start = (batch * T + start).to(gl.int32)
    first_row = hv * V + block * (PARTS * C)
    column = block * (PARTS * C)
    chunks = (length + C - 1) // C
    if not active:
        # a sequence without a slot: zeros
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // C, C // 8], [gl.num_warps(), 1], [1, 0])
        o16 = gl.arange(0, 16, gl.SliceLayout(1, layout))
        columns = gl.arange(0, C, gl.SliceLayout(0, layout))
        o_base = o_ptr + (start.to(gl.int64) * stride_o_t + hv * stride_o_h + column)
        zeros = gl.zeros([16, C], o_ptr.dtype.element_ty, layout)
        for i in range(0, length, 16):
            for part in gl.static_range(PARTS):
                to = o_base + i.to(gl.int64) * stride_o_t + (o16[:, None] * stride_o_t + part * C + columns[None, :])
                gl.store(to, zeros, mask=(i + o16 < length)[:, None])
        chunks = chunks * 0
    checkpoint = n * 0
    checkpoint_end = n * 0
    if checkpoint_ptr is not None:
        checkpoint = gl.load(checkpoint_offset_ptr + n).to(gl.int64)
        checkpoint_end = gl.load(checkpoint_offset_ptr + n + 1).to(gl.int64)
        checkpoint_end = gl.minimum(checkpoint_end, n * 0 + num_checkpoints)

    dtype: gl.constexpr = q_tiles.dtype
    rows_of_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], dtype)
    rows_of_64: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(dtype, [STAGES, C, K], rows_of_K)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, C, K], rows_of_K)
    y_s = gl.allocate_shared_memory(dtype, [STAGES, C, C], rows_of_64)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * PARTS, C, C], rows_of_64)
    p_s = gl.allocate_shared_memory(dtype, [STAGES, C, C], rows_of_64)
    o_s = gl.allocate_shared_memory(dtype, [PARTS, C, C], rows_of_64)
    factor_s = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * C], factor_tiles.layout)
    decay_s = gl.allocate_shared_memory(gl.float32, [STAGES, C], plain)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    p_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=PARTS + 1)
        mbarrier.init(p_ready.index(stage), count=1)
    fence_async_shared()

    initial = read * stride_initial
    final = write * stride_final
    q_column = h * K
    v_column = hv * V + column
    head = (place * HV + hv).to(gl.int32)
    if PARTS == 1:
        gl.warp_specialize([
            (first_state, (
                q_s, k_s, v_s, y_s, p_s, o_s, decay_s, factor_s, o_tiles, initial_ptr, final_ptr, checkpoint_ptr,
                ready, free, p_ready,
                chunks, start, length, v_column, initial, final, known, keep,
                checkpoint, checkpoint_end, checkpoint_chunks, stride_checkpoint, first_row,
                K, 0, PARTS, STAGES,
            )),
            (auxiliary, (q_s, k_s, p_s, decay_s, factor_s, ready, free, p_ready, chunks, STAGES)),
            (loader, (
                q_tiles, k_tiles, v_tiles, y_tiles, factor_tiles, q_s, k_s, v_s, y_s, factor_s,
                ready, free, chunks, start, length, head, q_column, v_column, HV, K, PARTS, STAGES,
            )),
        ], [4, 1], [AUXILIARY_REGISTERS, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (first_state, (
                q_s, k_s, v_s, y_s, p_s, o_s, decay_s, factor_s, o_tiles, initial_ptr, final_ptr, checkpoint_ptr,
                ready, free, p_ready,
                chunks, start, length, v_column, initial, final, known, keep,
                checkpoint, checkpoint_end, checkpoint_chunks, stride_checkpoint, first_row,
                K, 0, PARTS, STAGES,
            )),
            (state, (
                q_s, k_s, v_s, y_s, p_s, o_s, decay_s, factor_s, o_tiles, initial_ptr, final_ptr, checkpoint_ptr,
                ready, free, p_ready,
                chunks, start, length, v_column, initial, final, known, keep,
                checkpoint, checkpoint_end, checkpoint_chunks, stride_checkpoint, first_row,
                K, 1, PARTS, STAGES,
            )),
            (auxiliary, (q_s, k_s, p_s, decay_s, factor_s, ready, free, p_ready, chunks, STAGES)),
            (loader, (
                q_tiles, k_tiles, v_tiles, y_tiles, factor_tiles, q_s, k_s, v_s, y_s, factor_s,
                ready, free, chunks, start, length, head, q_column, v_column, HV, K, PARTS, STAGES,
            )),
        ], [4, 4, 1], [STATE_REGISTERS, AUXILIARY_REGISTERS, 40])  # fmt: skip
