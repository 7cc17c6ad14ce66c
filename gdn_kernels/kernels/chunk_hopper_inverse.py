"""The inverses of the chunked gated delta rule on Hopper, in Gluon: what kernels/chunk_prep.py's inverse_kernel forms.

Its formulas, of one warp a chunk on 16x16 blocks; what differs is where things lie. Such a warp is a chain of small
products, which only other warps and other blocks hide. So the blocks of k k^T are in shared memory, as operands of
twice the precision of one, and 12 warps fit an SM where 8 did. Diagonal blocks are inverted in pairs, and those beside
them follow by diagonals, by substitution: it corrects its own errors, as a product of inverses does not. Only Y is
formed, not its transpose T: movmatrix turns a block of 16 bits in registers. k arrives and Y leaves by TMA.

Y, upper triangular, is stored without its quarter of zeros: its upper 32 rows, then the right half of its lower ones.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from gdn_kernels import launch
from gdn_kernels.kernels import _math, chunk_hopper, chunk_prep, chunk_segments, recurrent

CHUNK = chunk_prep.CHUNK
C = gl.constexpr(CHUNK)
B = gl.constexpr(16)
# Columns of k at a time: 128 bytes.
STEP = gl.constexpr(64)
# Columns of q at a time.
Q_STEP = gl.constexpr(32)
PACKED = chunk_hopper.PACKED
# Programs that run at once: 12 an SM.
AT_ONCE = gl.constexpr(12 * launch.HOPPER_SMS)
LOG2E = gl.constexpr(chunk_prep.LOG2E.value)
MIN_LOG2_GATE = gl.constexpr(chunk_prep.MIN_LOG2_GATE.value)
L2NORM_EPS = gl.constexpr(recurrent.L2NORM_EPS.value)

RESULT = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, RESULT.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, RESULT.value, 2))
ROWS = gl.constexpr(gl.SliceLayout(1, RESULT.value))
COLUMNS = gl.constexpr(gl.SliceLayout(0, RESULT.value))
TOKENS = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))
# of q, 8 columns a thread
LINES = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0]))

# A thread has 8 elements of a 16x16 block. 2 and 3 lie in the quarter that is 0 in an upper triangular one. The
# diagonal goes through 0, 1, 6 and 7, and an element right of it in the same pair of columns is 1 or 7.
_ABOVE = (0, 1, 4, 5, 6, 7)
UPPER_DECAY = gl.constexpr(
    "{ .reg .f32 e; mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000; "
    + "".join(
        f"abs.f32 e, ${8 + i}; neg.f32 e, e; ex2.approx.ftz.f32 e, e; mul.f32 ${i}, e, ${16 + i}; " for i in _ABOVE
    )
    + "}"
)
UPPER_REST = gl.constexpr(
    "{ .reg .b16 a, b; .reg .f32 c, d; mov.b32 $1, $13; "
    + "".join(
        f"mov.b32 {{a, b}}, ${12 + i}; cvt.f32.f16 c, a; cvt.f32.f16 d, b; sub.f32 c, ${4 + 2 * i}, c; "
        f"sub.f32 d, ${5 + 2 * i}, d; cvt.rn.f16x2.f32 ${i}, d, c; "
        for i in (0, 2, 3)
    )
    + "}"
)
SOLVED_PAIRS = gl.constexpr(
    "{ .reg .f32 e; mov.f32 $0, $24; mov.f32 $6, $30; "
    + "".join(f"mov.f32 ${i}, 0f00000000; " for i in (2, 3, 4, 5))
    + "".join(f"mul.f32 e, ${16 + i}, ${32 + i}; fma.rn.f32 ${i}, e, ${8 + i}, ${24 + i}; " for i in (1, 7))
    + "}"
)

_store = chunk_hopper._store
load_rows = chunk_hopper.load_rows
opaque = chunk_hopper.opaque
_barrier = chunk_hopper._barrier
chunk_of = gluon.jit(chunk_prep.chunk_of.fn)
number_of_long = gluon.jit(chunk_segments.number_of_long.fn)
slots = gluon.jit(recurrent.slots.fn)
wait_for_inputs = gluon.jit(_math.wait_for_inputs.fn)
gate = gluon.jit(_math.gate.fn)
sigmoid = gluon.jit(_math.sigmoid.fn)
inv_l2norm = gluon.jit(_math.inv_l2norm.fn)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def left(x):
    return gl.convert_layout(x, LEFT)


@gluon.jit
def right(x):
    """x^T as a right operand: nothing moves."""
    return gl.convert_layout(x.permute((1, 0)), RIGHT)


@gluon.jit
def turned(x):
    """The transpose of a 16x16 block of 16 bits, in the same layout."""
    return gl.inline_asm_elementwise(
        """
        movmatrix.sync.aligned.m8n8.trans.b16 $0, $4;
        movmatrix.sync.aligned.m8n8.trans.b16 $1, $6;
        movmatrix.sync.aligned.m8n8.trans.b16 $2, $5;
        movmatrix.sync.aligned.m8n8.trans.b16 $3, $7;
        """,
        "=r,=r,=r,=r,r,r,r,r",
        [x],
        dtype=x.dtype,
        is_pure=True,
        pack=8,
    )


@gluon.jit
def minus_masked(x, mask):
    """-x of 16 bits where ``mask`` has all its bits, 0 where it has none."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0x80008000, $2, 0x28;",  # (a ^ b) & c
        "=r,r,r",
        [x, mask],
        dtype=x.dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def operand(x):
    """x of fp32 as operand."""
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def rest(x, high):
    """x less ``high``, its operand, as one more."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b16 a, b;
        .reg .f32 c, d;
        mov.b32 {a, b}, $3;
        cvt.f32.f16 c, a;
        cvt.f32.f16 d, b;
        sub.f32 c, $1, c;
        sub.f32 d, $2, d;
        cvt.rn.f16x2.f32 $0, d, c;
        }
        """,
        "=r,f,f,r",
        [x, high],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def split(x):
    """x as a sum of two operands: twice the bits of one."""
    high = operand(x)
    return high, rest(x, high)


@gluon.jit
def upper_rest(x, high):
    """:func:`rest` of an upper triangular block."""
    return gl.inline_asm_elementwise(
        UPPER_REST,
        "=&r,=&r,=&r,=&r,f,f,f,f,f,f,f,f,r,r,r,r",
        [x, high],
        dtype=gl.float16,
        is_pure=True,
        pack=8,
    )


@gluon.jit
def add_product(sums, a, b_high, b_low):
    """sums + a b, b a sum of two right operands."""
    sums = mma_v2(left(a), b_low, sums)
    return mma_v2(left(a), b_high, sums)


@gluon.jit
def add_whole_product(sums, a_high, a_low, b_high, b_low):
    """The same where a is a sum of two operands too."""
    sums = mma_v2(left(a_low), b_high, sums)
    return add_product(sums, a_high, b_high, b_low)


@gluon.jit
def solved_pairs(A, c, eye, minus_pairs):
    """eye + minus_pairs * A diag(c), where minus_pairs is not 0 only beside the diagonal."""
    return gl.inline_asm_elementwise(
        SOLVED_PAIRS,
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
        [A, c[None, :].broadcast_to((B, B)), eye, minus_pairs],
        dtype=gl.float32,
        is_pure=True,
        pack=8,
    )


@gluon.jit
def inverse_blocks(A0, b0, c0, A1, b1, c1, masks):
    """((I + L)^-1)^T of two L = diag(b) A below the diagonal, side by side; c is b along columns.

    As chunk_prep.inverse_block: solved diagonal blocks are doubled, Y <- Y - Y (M_l * L^T) Y, and one Newton step on a
    residual of twice the precision squares what rounding the operands to fp16 left.
    """
    row = gl.arange(0, B, ROWS)[:, None]
    column = gl.arange(0, B, COLUMNS)[None, :]
    eye = gl.where(row == column, 1.0, 0.0)
    pairs = (row < column) & (row // 2 == column // 2)
    zeros = gl.zeros([B, B], gl.float32, RESULT)
    L0_high, L0_low = split(gl.where(row > column, A0 * b0[:, None], 0.0))
    L1_high, L1_low = split(gl.where(row > column, A1 * b1[:, None], 0.0))
    minus_pairs = gl.where(pairs, -1.0, 0.0)
    Y0 = solved_pairs(A0, c0, eye, minus_pairs)
    Y1 = solved_pairs(A1, c1, eye, minus_pairs)
    Y0_high = operand(Y0)
    Y1_high = operand(Y1)
    Y0_right = right(turned(Y0_high))
    Y1_right = right(turned(Y1_high))
    for level in gl.static_range(3):
        W0 = mma_v2(left(Y0_high), right(minus_masked(L0_high, masks[level])), zeros)
        W1 = mma_v2(left(Y1_high), right(minus_masked(L1_high, masks[level])), zeros)
        Y0 = mma_v2(left(operand(W0)), Y0_right, Y0)
        Y1 = mma_v2(left(operand(W1)), Y1_right, Y1)
        Y0_high = operand(Y0)
        Y1_high = operand(Y1)
        Y0_right = right(turned(Y0_high))
        Y1_right = right(turned(Y1_high))
    R0 = add_whole_product(Y0 - eye, Y0_high, upper_rest(Y0, Y0_high), right(L0_high), right(L0_low))
    R1 = add_whole_product(Y1 - eye, Y1_high, upper_rest(Y1, Y1_high), right(L1_high), right(L1_low))
    Y0 = mma_v2(left(operand(-R0)), Y0_right, Y0)
    Y1 = mma_v2(left(operand(-R1)), Y1_right, Y1)
    return Y0, Y1


@gluon.jit
def right_pair(high, low):
    """A block that is a sum of two operands, as a right operand."""
    return right(turned(high)), right(turned(low))


@gluon.jit
def factor(tile, i: gl.constexpr, layout: gl.constexpr):
    return tile.slice(i * B, B).load(layout)


@gluon.jit
def upper_decay(exponents, b):
    """b exp2(exponents), none of them positive, in what is not 0 of an upper triangular block."""
    return gl.inline_asm_elementwise(
        UPPER_DECAY,
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
        [exponents, b[:, None].broadcast_to((B, B))],
        dtype=gl.float32,
        is_pure=True,
        pack=8,
    )


@gluon.jit
def decayed(i: gl.constexpr, Y, b, gates_s, norm_s, HAS_NORM: gl.constexpr):
    """Block (i, i) of Y with beta, the norms of k and decay."""
    # no exponent is positive on or above the diagonal
    exponents = factor(gates_s, i, COLUMNS)[None, :] - factor(gates_s, i, ROWS)[:, None]
    y = Y * upper_decay(exponents, b)
    if HAS_NORM:
        y *= factor(norm_s, i, COLUMNS)[None, :]
    return y


@gluon.jit
def decayed_from(i: gl.constexpr, j: gl.constexpr, Y, across, down_s, up_s):
    """Block (i, j) of a later block's columns: decay from a row to the next block's first token, ``across`` from there
    to that of this block, then on."""
    return Y * ((factor(down_s, i, ROWS) * across)[:, None] * factor(up_s, j, COLUMNS)[None, :])


@gluon.jit
def last_product(sums, minus_b, Y_high, Y_low):
    """-sums diag(b) Y, Y a sum of two right operands."""
    zeros = gl.zeros([B, B], gl.float32, RESULT)
    return add_product(zeros, operand(sums * minus_b[None, :]), Y_high, Y_low)


@gluon.jit
def first_of(tile, i: gl.constexpr):
    return gl.max(tile.slice(i * B, 1).load(ROWS), 0)


@gluon.jit
def side_by_side(a, b):
    """Two tensors of 16 rows, one beside the other."""
    return gl.convert_layout(chunk_hopper.side_by_side(a, b), RESULT)


@gluon.jit
def load_operand(a_s, which: gl.constexpr):
    """Block ``which`` of k k^T, transposed, as a right operand of twice the precision."""
    return a_s.index(2 * which).permute((1, 0)).load(RIGHT), a_s.index(2 * which + 1).permute((1, 0)).load(RIGHT)


@gluon.jit
def store_operand(a_s, which: gl.constexpr, A):
    high, low = split(A)
    a_s.index(2 * which).store(high)
    a_s.index(2 * which + 1).store(low)


@gluon.jit
def write_zeros(o_ptr, place, hv0, heads, end, T, stride_o_t, stride_o_h, V: gl.constexpr):
    """Zeros in what lies past the token ``end`` of 64 rows of the output of ``heads`` heads."""
    first = gl.maximum(place * C, end)
    last = gl.minimum((place + 1) * C, T)
    if first < last:
        for each in range(heads):
            chunk_hopper.write_zeros(o_ptr, first, last, hv0 + each, 0, stride_o_t, stride_o_h, V // C)


@gluon.jit
def write_rank(order_ptr, cu_seqlens_ptr, n, N):
    """Sequence ``n`` to its place among all, longest first."""
    length = gl.load(cu_seqlens_ptr + n + 1) - gl.load(cu_seqlens_ptr + n)
    rank = n * 0
    for i in range(0, N, 128):
        numbers, lengths = chunk_hopper.lengths_from(cu_seqlens_ptr, i, N)
        before = (lengths > length) | ((lengths == length) & (numbers < n))
        rank += gl.sum(before.to(gl.int32), 0)
    gl.store(order_ptr + rank, n.to(order_ptr.dtype.element_ty))


@gluon.jit
def gates_of_heads(row_ptr, stride_t, left_over, first_head, heads, WIDTH: gl.constexpr):
    """Gates, or beta, of a chunk's tokens and of WIDTH value heads from ``first_head`` on, side by side."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // WIDTH, WIDTH], [1, 1], [1, 0])
    token = gl.arange(0, C, gl.SliceLayout(1, layout))[:, None]
    head = first_head + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    mask = (token < left_over) & (head < heads)
    return gl.load(row_ptr + token * stride_t + head, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def store_by_head(tile, factor_ptr, first_head, heads, FACTORS: gl.constexpr):
    """Store them head by head, where a row of each head's factors will be."""
    token = gl.arange(0, C, gl.SliceLayout(1, tile.type.layout))[:, None]
    head = first_head + gl.arange(0, tile.shape[1], gl.SliceLayout(0, tile.type.layout))[None, :]
    gl.store(factor_ptr + head * (FACTORS * C) + token, tile, mask=(head < heads) & (token >= 0))


@gluon.jit
def gates_and_beta(g, b, valid, A_log_ptr, dt_bias_ptr, hv, beta_scale, IS_RAW_GATE: gl.constexpr):
    """One head's gates, summed within the chunk, in log2, and beta; of what was loaded for both."""
    g = g.to(gl.float32)
    b = b.to(gl.float32)
    if IS_RAW_GATE:
        A_log = gl.load(A_log_ptr + hv).to(gl.float32)
        dt_bias = gl.load(dt_bias_ptr + hv).to(gl.float32)
        g = gl.where(valid, gate(g, A_log, dt_bias), 0.0)
        b = gl.where(valid, beta_scale * sigmoid(b), 0.0)
    # those of tokens past the last valid one are 0, so that the last sum is the whole chunk's
    return gl.associative_scan(gl.maximum(g * LOG2E, MIN_LOG2_GATE), 0, _add), b


_UNSPECIALIZED = ["N", "T", "heads", "num_first", "last_heads", "num_places", "num_ordered", "num_slots", "pad_slot_id"]
_UNSPECIALIZED += ["stride_g_b", "stride_g_t", "stride_beta_b", "stride_beta_t"]


@gluon.jit(do_not_specialize=_UNSPECIALIZED)
def hopper_inverse_kernel(
    k_tiles,
    upper_tiles,
    lower_tiles,
    q_ptr,
    g_ptr,
    beta_ptr,
    A_log_ptr,
    dt_bias_ptr,
    factor_ptr,
    o_ptr,
    order_ptr,
    first_ptr,
    initial_ptr,
    cu_seqlens_ptr,
    read_ptr,
    has_initial_ptr,
    N: gl.int32,
    T: gl.int32,
    heads: gl.int32,
    num_first: gl.int32,
    last_heads: gl.int32,
    num_places: gl.int32,
    num_ordered: gl.int32,
    num_slots: gl.int32,
    pad_slot_id: gl.int32,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_g_b: gl.int64,
    stride_g_t: gl.int64,
    stride_beta_b: gl.int64,
    stride_beta_t: gl.int64,
    stride_o_t,
    stride_o_h,
    stride_initial,
    scale,
    beta_scale,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    IS_RAW_GATE: gl.constexpr,
    FACTORS: gl.constexpr,
    LONG_TOKENS: gl.constexpr,
    COPIERS: gl.constexpr,
    USE_QK_L2NORM: gl.constexpr,
    PDL: gl.constexpr,
):
    """Y and row factors of one chunk and ``heads`` value heads of one key head, ``last_heads`` in the places after
    ``num_first`` (of ``num_places``), by one warp; zeros for no sequence's tokens; a part of what a long sequence
    starts from, for kernels/chunk_segments.py; and one sequence's place in the order of the scan."""
    pid = gl.program_id(0)
    place = pid // (HV // heads)
    part = pid % (HV // heads)
    if place >= num_first:
        part = pid - num_first * (HV // heads)
        heads = last_heads
        place = num_first + part // (HV // heads)
        part = part % (HV // heads)
    hv0 = part * heads
    if gl.num_programs(0) > AT_ONCE:
        # backwards: what the scan begins with is written last, and still in the L2
        place = num_places - 1 - place
    place = place.to(gl.int64)
    h = hv0 // (HV // H)
    # value heads whose gates are loaded at once
    WIDTH: gl.constexpr = HV // H if HV // H < 3 else 4
    wait_for_inputs(PDL)

    end = place * 0
    if cu_seqlens_ptr is not None:
        end = gl.load(cu_seqlens_ptr + N).to(gl.int64)
        if N == 0:
            write_zeros(o_ptr, place, hv0, heads, end, T, stride_o_t, stride_o_h, V)
    if N == 0:
        return
    n, batch, chunk, start, length = chunk_of(cu_seqlens_ptr, place, gl.arange(0, 64, TOKENS), N, T)
    if (chunk >= 0) & (chunk * C < length):
        first = start + chunk * C
        left_over = length - chunk * C
        gates_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        beta_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        norm_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        # decay from a token to the next block's first, with beta, and from a block's first token, with the norms of k
        down_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        up_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        # its place is that of A and Y later on
        k_s = gl.allocate_shared_memory(
            k_tiles.dtype, [K // STEP, C, STEP], gl.NVMMASharedLayout.get_default_for([C, STEP], k_tiles.dtype)
        )
        ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(ready, count=1)
        fence_async_shared()
        mbarrier.expect(ready, C * K * 2)
        first_row = (chunk * C).to(gl.int32)
        sequence_end = (batch * T + start + length).to(gl.int32)
        load_rows(k_tiles, sequence_end, length, first_row, h * K, ready, k_s)

        token = gl.arange(0, C, TOKENS)
        valid = token < left_over
        g_row = g_ptr + (batch * stride_g_b + first * stride_g_t + hv0)
        beta_row = beta_ptr + (batch * stride_beta_b + first * stride_beta_t + hv0)
        # A head's gates lie in 64 lines, of which 32 bytes are loaded each. Loads of them for every head alone kept the
        # shared memory of all warps waiting. So those of several heads are loaded at once, written to where their
        # factors will be, and read from there head by head
        head_ptr = factor_ptr + (place * HV + hv0) * (FACTORS * C)
        together = gl.where(heads > 1, heads, 0)
        g_tile = gates_of_heads(g_row, stride_g_t, left_over, 0, together, WIDTH)
        beta_tile = gates_of_heads(beta_row, stride_beta_t, left_over, 0, together, WIDTH)
        alone = valid & (heads == 1)
        g = gl.load(g_row + token * stride_g_t, mask=alone, other=0.0).to(gl.float32)
        beta = gl.load(beta_row + token * stride_beta_t, mask=alone, other=0.0).to(gl.float32)

        norm_q = gl.full([C], 1.0, gl.float32, TOKENS)
        if FACTORS > 2:
            row = gl.arange(0, C, gl.SliceLayout(1, LINES))[:, None]
            column = gl.arange(0, Q_STEP, gl.SliceLayout(0, LINES))[None, :]
            q_ptrs = q_ptr + batch * stride_q_b + first * stride_q_t + h * stride_q_h + row * stride_q_t + column
            squares = gl.zeros([C, Q_STEP], gl.float32, LINES)
            for s in gl.static_range(0, K, Q_STEP):
                q = gl.load(q_ptrs + s, mask=row < left_over, other=0.0).to(gl.float32)
                squares += q * q
            norm_q = scale * gl.convert_layout(inv_l2norm(gl.sum(squares, 1), L2NORM_EPS), TOKENS)

        A00 = gl.zeros([B, B], gl.float32, RESULT)
        A10 = gl.zeros([B, B], gl.float32, RESULT)
        A11 = gl.zeros([B, B], gl.float32, RESULT)
        A20 = gl.zeros([B, B], gl.float32, RESULT)
        A21 = gl.zeros([B, B], gl.float32, RESULT)
        A22 = gl.zeros([B, B], gl.float32, RESULT)
        A30 = gl.zeros([B, B], gl.float32, RESULT)
        A31 = gl.zeros([B, B], gl.float32, RESULT)
        A32 = gl.zeros([B, B], gl.float32, RESULT)
        A33 = gl.zeros([B, B], gl.float32, RESULT)
        mbarrier.wait(ready, 0)
        if heads > 1:
            store_by_head(g_tile, head_ptr, 0, heads, FACTORS)
            store_by_head(beta_tile, head_ptr + C, 0, heads, FACTORS)
            for i in range(WIDTH, heads, WIDTH):
                g_tile = gates_of_heads(g_row, stride_g_t, left_over, i, heads, WIDTH)
                beta_tile = gates_of_heads(beta_row, stride_beta_t, left_over, i, heads, WIDTH)
                store_by_head(g_tile, head_ptr, i, heads, FACTORS)
                store_by_head(beta_tile, head_ptr + C, i, heads, FACTORS)
            _barrier()
            g = gl.load(head_ptr + token)
            beta = gl.load(head_ptr + C + token)
        for s in gl.static_range(K // STEP):
            k0_s = k_s.index(s).slice(0, B)
            k1_s = k_s.index(s).slice(16, B)
            k2_s = k_s.index(s).slice(32, B)
            k3_s = k_s.index(s).slice(48, B)
            k1 = k1_s.load(LEFT)
            k2 = k2_s.load(LEFT)
            k3 = k3_s.load(LEFT)
            other = k0_s.permute((1, 0)).load(RIGHT)
            A00 = mma_v2(k0_s.load(LEFT), other, A00)
            A10 = mma_v2(k1, other, A10)
            A20 = mma_v2(k2, other, A20)
            A30 = mma_v2(k3, other, A30)
            other = k1_s.permute((1, 0)).load(RIGHT)
            A11 = mma_v2(k1, other, A11)
            A21 = mma_v2(k2, other, A21)
            A31 = mma_v2(k3, other, A31)
            other = k2_s.permute((1, 0)).load(RIGHT)
            A22 = mma_v2(k2, other, A22)
            A32 = mma_v2(k3, other, A32)
            other = k3_s.permute((1, 0)).load(RIGHT)
            A33 = mma_v2(k3, other, A33)

        gates, b = gates_and_beta(g, beta, valid, A_log_ptr, dt_bias_ptr, hv0, beta_scale, IS_RAW_GATE)
        norm_k = gl.full([C], 1.0, gl.float32, TOKENS)
        if USE_QK_L2NORM:
            r = gl.arange(0, B, ROWS)[:, None]
            c = gl.arange(0, B, COLUMNS)[None, :]
            norm_s.slice(0, B).store(gl.sum(gl.where(r == c, A00, 0.0), 1))
            norm_s.slice(16, B).store(gl.sum(gl.where(r == c, A11, 0.0), 1))
            norm_s.slice(32, B).store(gl.sum(gl.where(r == c, A22, 0.0), 1))
            norm_s.slice(48, B).store(gl.sum(gl.where(r == c, A33, 0.0), 1))
            norm_k = inv_l2norm(norm_s.load(TOKENS), L2NORM_EPS)
            norm_s.store(norm_k)
            n1 = factor(norm_s, 1, ROWS)[:, None]
            n2 = factor(norm_s, 2, ROWS)[:, None]
            n3 = factor(norm_s, 3, ROWS)[:, None]
            m0 = factor(norm_s, 0, COLUMNS)[None, :]
            m1 = factor(norm_s, 1, COLUMNS)[None, :]
            m2 = factor(norm_s, 2, COLUMNS)[None, :]
            A00 *= factor(norm_s, 0, ROWS)[:, None] * m0
            A10 *= n1 * m0
            A11 *= n1 * m1
            A20 *= n2 * m0
            A21 *= n2 * m1
            A22 *= n2 * m2
            A30 *= n3 * m0
            A31 *= n3 * m1
            A32 *= n3 * m2
            A33 *= n3 * factor(norm_s, 3, COLUMNS)[None, :]
        a_s = gl.allocate_shared_memory(gl.float16, [12, B, B], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
        d_s = gl.allocate_shared_memory(gl.float32, [4, B, B], gl.SwizzledSharedLayout(8, 2, 2, [1, 0]))
        upper_s = gl.allocate_shared_memory(upper_tiles.dtype, [C // 2, C], upper_tiles.layout)
        lower_s = gl.allocate_shared_memory(upper_tiles.dtype, [C // 2, C // 2], lower_tiles.layout)
        d_s.index(0).store(A00)
        d_s.index(1).store(A11)
        d_s.index(2).store(A22)
        d_s.index(3).store(A33)
        # rounding them to one operand each would leave the errors that the Newton steps take away
        store_operand(a_s, 0, A10)
        store_operand(a_s, 1, A20)
        store_operand(a_s, 2, A21)
        store_operand(a_s, 3, A30)
        store_operand(a_s, 4, A31)
        store_operand(a_s, 5, A32)

        row = gl.arange(0, B, ROWS)[:, None]
        column = gl.arange(0, B, COLUMNS)[None, :]
        none = gl.zeros([B, B], gl.int16, RESULT)
        mask_4 = gl.where((row // 2 != column // 2) & (row // 4 == column // 4), none - 1, none)
        mask_8 = gl.where((row // 4 != column // 4) & (row // 8 == column // 8), none - 1, none)
        mask_16 = gl.where(row // 8 != column // 8, none - 1, none)
        masks = (mask_4, mask_8, mask_16)
        zeros = gl.zeros([B, B], gl.float32, RESULT)

        for each in range(heads):
            gates_s.store(gates)
            beta_s.store(b)
            head = place * HV + hv0 + each
            again = opaque(token)
            factor_ptrs = factor_ptr + head * (FACTORS * C) + again
            gl.store(factor_ptrs, gates)
            gl.store(factor_ptrs + C, gl.exp2(gates) * norm_k)
            if FACTORS > 2:
                gl.store(factor_ptrs + 2 * C, norm_q)
            # of the next head: they are on their way while this one is worked on, and so is their chain of sums
            more = (again < C) & (each + 1 < heads)
            g = gl.load(factor_ptrs + FACTORS * C, mask=more, other=0.0)
            beta = gl.load(factor_ptrs + (FACTORS + 1) * C, mask=more, other=0.0)
            first_1 = first_of(gates_s, 1)
            first_2 = first_of(gates_s, 2)
            first_3 = first_of(gates_s, 3)
            next_first = gl.where(token < B, first_1, gl.where(token < 2 * B, first_2, first_3))
            own_first = gl.where(token < 2 * B, first_1, gl.where(token < 3 * B, first_2, first_3))
            down_s.store(b * gl.exp2(gl.minimum(next_first - gates, 0.0)))
            up_s.store(gl.exp2(gl.minimum(gates - own_first, 0.0)) * norm_k)

            # T_ij = -T_ii diag(b_i) sum of A_ik T_kj over j <= k < i, transposed: columns of T are rows of Y
            b3 = factor(beta_s, 3, ROWS)
            b2 = factor(beta_s, 2, ROWS)
            c3 = factor(beta_s, 3, COLUMNS)
            c2 = factor(beta_s, 2, COLUMNS)
            Y33, Y22 = inverse_blocks(d_s.index(3).load(RESULT), b3, c3, d_s.index(2).load(RESULT), b2, c2, masks)
            A32_high, A32_low = load_operand(a_s, 5)
            Y33_high, Y33_low = split(Y33)
            Y22_high, Y22_low = split(Y22)
            R3_high, R3_low = right_pair(Y33_high, Y33_low)
            R2_high, R2_low = right_pair(Y22_high, Y22_low)
            sums = add_whole_product(zeros, Y22_high, Y22_low, A32_high, A32_low)
            Y23 = last_product(sums, -c3, R3_high, R3_low)
            y33 = decayed(3, Y33, b3, gates_s, norm_s, USE_QK_L2NORM)
            y22 = decayed(2, Y22, b2, gates_s, norm_s, USE_QK_L2NORM)
            y23 = decayed_from(2, 3, Y23, 1.0, down_s, up_s)
            # what was written for the head before has been read
            tma.store_wait(0)
            dtype: gl.constexpr = upper_s.dtype
            lower_s.slice(B, B).store(side_by_side(zeros, y33).to(dtype))
            lower_s.slice(0, B).store(side_by_side(y22, y23).to(dtype))

            b1 = factor(beta_s, 1, ROWS)
            b0 = factor(beta_s, 0, ROWS)
            c1 = factor(beta_s, 1, COLUMNS)
            c0 = factor(beta_s, 0, COLUMNS)
            Y11, Y00 = inverse_blocks(d_s.index(1).load(RESULT), b1, c1, d_s.index(0).load(RESULT), b0, c0, masks)
            next_head = gl.minimum(hv0 + each + 1, HV - 1)
            gates, b = gates_and_beta(g, beta, valid, A_log_ptr, dt_bias_ptr, next_head, beta_scale, IS_RAW_GATE)
            Y11_high, Y11_low = split(Y11)
            Y00_high, Y00_low = split(Y00)
            R1_high, R1_low = right_pair(Y11_high, Y11_low)
            A10_high, A10_low = load_operand(a_s, 0)
            A21_high, A21_low = load_operand(a_s, 2)
            # loaded again: kept since the blocks before, they would be spilled
            c2 = -factor(beta_s, 2, COLUMNS)
            c3 = -factor(beta_s, 3, COLUMNS)
            sums_0 = add_whole_product(zeros, Y00_high, Y00_low, A10_high, A10_low)
            sums_1 = add_whole_product(zeros, Y11_high, Y11_low, A21_high, A21_low)
            Y01 = last_product(sums_0, -c1, R1_high, R1_low)
            Y12 = last_product(sums_1, c2, R2_high, R2_low)
            y11 = decayed(1, Y11, b1, gates_s, norm_s, USE_QK_L2NORM)
            y00 = decayed(0, Y00, b0, gates_s, norm_s, USE_QK_L2NORM)
            y11 = side_by_side(zeros, y11).to(dtype)
            y00 = side_by_side(y00, decayed_from(0, 1, Y01, 1.0, down_s, up_s)).to(dtype)

            A31_high, A31_low = load_operand(a_s, 4)
            A20_high, A20_low = load_operand(a_s, 1)
            Y12_high, Y12_low = split(Y12)
            Y01_high, Y01_low = split(Y01)
            sums_1 = add_whole_product(zeros, Y11_high, Y11_low, A31_high, A31_low)
            sums_0 = add_whole_product(zeros, Y00_high, Y00_low, A20_high, A20_low)
            sums_1 = add_whole_product(sums_1, Y12_high, Y12_low, A32_high, A32_low)
            sums_0 = add_whole_product(sums_0, Y01_high, Y01_low, A21_high, A21_low)
            Y13 = last_product(sums_1, c3, R3_high, R3_low)
            Y02 = last_product(sums_0, c2, R2_high, R2_low)
            y12 = decayed_from(1, 2, Y12, 1.0, down_s, up_s)
            y12 = side_by_side(y12, decayed_from(1, 3, Y13, gl.exp2(first_3 - first_2), down_s, up_s)).to(dtype)
            upper_s.slice(B, B).store(side_by_side(y11, y12))

            A30_high, A30_low = load_operand(a_s, 3)
            Y02_high, Y02_low = split(Y02)
            sums_0 = add_whole_product(zeros, Y00_high, Y00_low, A30_high, A30_low)
            sums_0 = add_whole_product(sums_0, Y01_high, Y01_low, A31_high, A31_low)
            sums_0 = add_whole_product(sums_0, Y02_high, Y02_low, A32_high, A32_low)
            Y03 = last_product(sums_0, c3, R3_high, R3_low)
            y02 = decayed_from(0, 2, Y02, gl.exp2(first_2 - first_1), down_s, up_s)
            y03 = decayed_from(0, 3, Y03, gl.exp2(first_3 - first_1), down_s, up_s)
            upper_s.slice(0, B).store(side_by_side(y00, side_by_side(y02, y03).to(dtype)))
            fence_async_shared()
            number = head.to(gl.int32)
            _store(upper_tiles, [number * (PACKED // C), 0], upper_s)
            _store(lower_tiles, [number * (PACKED // (C // 2)) + C, 0], lower_s)
        if first_ptr is not None:
            # the scan may write the slot before it has read it
            if (length >= LONG_TOKENS) & (chunk < COPIERS):
                read, _, active, _, known = slots(read_ptr, None, has_initial_ptr, n, length, num_slots, pad_slot_id)
                if active:
                    columns = gl.arange(0, K, gl.BlockedLayout([4], [32], [1], [0]))
                    number_of_first = number_of_long(cu_seqlens_ptr, n, start, LONG_TOKENS) * HV + hv0
                    for each in range(heads):
                        for i in gl.static_range(V // COPIERS):
                            inner = (chunk * (V // COPIERS) + i) * K + columns
                            S_ptrs = initial_ptr + read * stride_initial + (hv0 + each) * (V * K) + inner
                            S = gl.load(S_ptrs, mask=known, other=0.0).to(gl.float32)
                            gl.store(first_ptr + (number_of_first + each) * (V * K) + inner, S)
    if cu_seqlens_ptr is not None:
        if pid < num_ordered:
            write_rank(order_ptr, cu_seqlens_ptr, pid, N)
        write_zeros(o_ptr, place, hv0, heads, end, T, stride_o_t, stride_o_h, V)
    tma.store_wait(0)


def shares(places, num_v_heads, ratio):
    """Value heads a program, of ``ratio`` that share a key head, in how many places, and how many in the places after.

    Value heads of a program share products and the wait for k, but the fewer they are, the more programs hide each
    other's chains: where all run at once, 4 to 10 an SM are best. Beyond, whole rounds of programs of many heads come
    first and then programs of fewer, so that the last round is short. No bits and no binary depend on it.

    H100, 2026-11-26, us with 1, 2, 4: heads 8/32 1x512 7.8, 9.1, 12.6; 1x2048 12.2, 11.3, 14.5; 1x8192 37, 34, 30; 4/16
    1x8192 21, 17, 17. The whole with two heads, and with two, then one: 16/32 8x1024 131, 126; 32x256 165, 162.
    """
    chunk_heads = places * num_v_heads
    divisors = [each for each in range(1, ratio + 1) if ratio % each == 0]
    most = max((each for each in divisors if 1 < each <= 4), default=ratio)
    in_a_round = max(1, AT_ONCE.value * most // num_v_heads)
    if places > in_a_round:
        return most, places // in_a_round * in_a_round, max(each for each in divisors if each < most or each == 1)
    heads = 1
    if chunk_heads >= 8 * launch.HOPPER_SMS:
        at_once = (each for each in divisors if 1 < each <= most and chunk_heads <= 10 * launch.HOPPER_SMS * each)
        heads = next(at_once, most)
    return heads, places, heads


def prepare_inverse(
    q,
    k,
    g,
    beta,
    o,
    y,
    factors,
    *,
    config,
    count,
    cu_seqlens,
    scale,
    use_qk_l2norm,
    A_log,
    dt_bias,
    beta_scale,
    order,
    firsts,
    long_tokens,
    initial,
    read,
    has_initial_state,
    pad_slot_id,
):
    """Write Y, packed, to ``y`` [places, HV, PACKED], and zeros to the tokens of ``o`` of no sequence; to ``factors``
    [places, HV, 2 or 4, C] the gates summed within the chunk, in log2, gamma / |k|, and of four rows scale / |q|.
    ``count``: sequences. To ``order`` [count], if given, their numbers, longest first. To ``firsts`` [number of a
    sequence of ``long_tokens`` or more, HV, V, K], if given, the slots ``read`` of the pool ``initial``."""
    tokens, H, K = k.shape[1:]
    places, HV = factors.shape[:2]
    heads, num_first, last_heads = shares(places, HV, HV // H)
    # without them their facts are left out, so that they decide no binary
    num_slots = stride_initial = copiers = 0
    q_strides = 0, 0, 0
    if factors.shape[2] > 2:
        q_strides = recurrent.batch_stride(q), q.stride(1), q.stride(2)
    else:
        q, scale = None, 1.0
    if firsts is None:
        initial = read = has_initial_state = None
        long_tokens = 0
    else:
        num_slots, stride_initial = initial.shape[0], initial.stride(0)
        # chunks of a long sequence that copy a part of what it starts from: a power of two, which divides V
        copiers = 1 << (min(CHUNK, long_tokens // CHUNK).bit_length() - 1)
    launch.run(
        hopper_inverse_kernel,
        (num_first * (HV // heads) + (places - num_first) * (HV // last_heads),),
        chunk_hopper.tiles_of(k, K, STEP.value),
        *chunk_hopper.packed_tiles(y, CHUNK // 2),
        q,
        g,
        beta,
        A_log,
        dt_bias,
        factors,
        o,
        cu_seqlens if order is None else order,
        firsts,
        initial,
        cu_seqlens,
        read,
        has_initial_state,
        count,
        tokens,
        heads,
        num_first,
        last_heads,
        places,
        0 if order is None else count,
        num_slots,
        pad_slot_id,
        *q_strides,
        *(stride for t in (g, beta) for stride in (recurrent.batch_stride(t), t.stride(1))),
        o.stride(1),
        o.stride(2),
        stride_initial,
        scale,
        beta_scale,
        config=config,
        H=H,
        HV=HV,
        K=K,
        V=o.shape[3],
        IS_RAW_GATE=A_log is not None,
        FACTORS=factors.shape[2],
        LONG_TOKENS=long_tokens,
        COPIERS=copiers,
        USE_QK_L2NORM=use_qk_l2norm,
    )
