"""The preparation of the chunked gated delta rule: X, R and the row factors of every chunk.

What they are, and where they lie, is said in kernels/chunk.py. With n_k and n_q the inverse norms of the rows of k and
q (1 without l2norm):

    Y = (diag(n_k) T)^T, and the row factors                                                          inverse_kernel
    X = (Y diag(gamma_C / gamma)) k,   R = (scale n_q (G * (q k^T))) Y^T, in the place of Y           product_kernel

The inverse is a chain of small steps, and warps that wait for each other cost more than its arithmetic. So one warp
does a chunk alone, on 16x16 blocks. A product there is a b^T of two blocks that lie as results lie: transposed, such
a block lies as a right operand does, so that nothing leaves the registers. The products are wide, and move bytes.
Both share a key head's products between the value heads of a program.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels._math import gate, inv_l2norm, sigmoid
from gdn_kernels.kernels.recurrent import L2NORM_EPS, batch_stride, last_before, span

CHUNK = 64
C = tl.constexpr(CHUNK)
LOG2E = tl.constexpr(1.4426950408889634)
# Log2 of the smallest decay of one token: exp2(-60) is zero beside any state, and 64 of them still add up exactly.
MIN_LOG2_GATE = tl.constexpr(-60.0)
# Rows of a block: the smallest that matrix units take.
BLOCK = tl.constexpr(16)


@triton.jit
def place_of(cu_seqlens_ptr, n, start, T):
    """The scratch place of the first chunk of sequence ``n``, an int64, whose first token is ``start``."""
    place = n * ((T + C - 1) // C)
    if cu_seqlens_ptr is not None:
        place = start // C + n
    return place


@triton.jit
def chunk_of(cu_seqlens_ptr, place, asked, N, T):
    """The sequence at scratch place ``place``, its batch row, which of its chunks that is, first token and length.
    ``asked``: :func:`last_before`."""
    if cu_seqlens_ptr is not None:
        n = last_before(cu_seqlens_ptr, place, asked, N, T, C, 1)
    else:
        n = place // ((T + C - 1) // C)
    batch, start, length = span(cu_seqlens_ptr, n, T)
    return n, batch, place - place_of(cu_seqlens_ptr, n, start, T), start, length


@triton.jit
def transposed(x):
    """A block's transpose, through a dimension of 1: Triton moves ``tl.trans`` of an operand to shared memory."""
    return tl.reshape(tl.permute(tl.reshape(x, [1, BLOCK, BLOCK]), (0, 2, 1)), [BLOCK, BLOCK])


@triton.jit
def split(x, OPERAND: tl.constexpr):
    """x as a sum of two operands: twice the bits of one."""
    high = x.to(OPERAND)
    return high, (x - high.to(tl.float32)).to(OPERAND)


@triton.jit
def add_product(sums, a, b_high, b_low):
    """sums + a b^T, where b is a sum of two operands."""
    sums = tl.dot(a, transposed(b_low), sums)
    return tl.dot(a, transposed(b_high), sums)


@triton.jit
def add_whole_product(sums, a_high, a_low, b_high, b_low):
    """The same where a is a sum of two operands too."""
    sums = tl.dot(a_low, transposed(b_high), sums)
    return add_product(sums, a_high, b_high, b_low)


@triton.jit
def inverse_block(L, LT, OPERAND: tl.constexpr):
    """(I + L)^-1 of a strictly lower block, and its transpose; LT is that of L.

    Solved diagonal blocks are doubled, for both at once, as each is the other's operand: T <- T - T (L * M_l) T, where
    M_l keeps the off-diagonal blocks of level l. No product has entries beyond those of the inverse itself, so
    identical keys do no harm, which a power series of L would not survive. Rounding the operands to fp16 leaves an
    error of 1e-3, but 5e-2 where beta nears 2 on identical keys: one Newton step on a residual of twice the precision
    squares that.
    """
    r = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    eye = tl.where(r == c, 1.0, 0.0)
    pairs = r // 2 == c // 2
    T = eye - tl.where(pairs, L, 0.0)
    Y = eye - tl.where(pairs, LT, 0.0)
    for level in tl.static_range(1, 4):
        off = (r // (2**level) != c // (2**level)) & (r // (2 ** (level + 1)) == c // (2 ** (level + 1)))
        minus_L = tl.where(off, -L, 0.0).to(OPERAND)
        minus_LT = tl.where(off, -LT, 0.0).to(OPERAND)
        T_operand = T.to(OPERAND)
        Y_operand = Y.to(OPERAND)
        U = tl.dot(T_operand, transposed(minus_LT)).to(OPERAND)
        W = tl.dot(Y_operand, transposed(minus_L)).to(OPERAND)
        T = tl.dot(U, transposed(Y_operand), T)
        Y = tl.dot(W, transposed(T_operand), Y)
    Y_high, Y_low = split(Y, OPERAND)
    L_high, L_low = split(L, OPERAND)
    residual = add_whole_product(tl.zeros([BLOCK, BLOCK], dtype=tl.float32), Y_high, Y_low, L_high, L_low)
    residual = (eye - Y - residual).to(OPERAND)
    Y = tl.dot(residual, transposed(T.to(OPERAND)), Y)
    return tl.trans(Y), Y


@triton.jit
def side_by_side(a, b, c, d):
    """[16, 64] of four blocks."""
    left = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [BLOCK, 2 * BLOCK])
    right = tl.reshape(tl.permute(tl.join(c, d), (0, 2, 1)), [BLOCK, 2 * BLOCK])
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [BLOCK, 4 * BLOCK])


@triton.jit
def norms_of(squares, USE_QK_L2NORM: tl.constexpr):
    """Inverse norms of a block's rows along rows, and along columns, from the diagonal of its products."""
    r = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    if USE_QK_L2NORM:
        squares = tl.where(r == c, squares, 0.0)
        rows = inv_l2norm(tl.sum(squares, axis=1), L2NORM_EPS)[:, None]
        columns = inv_l2norm(tl.sum(squares, axis=0), L2NORM_EPS)[None, :]
    else:
        rows = tl.full([BLOCK, 1], 1.0, dtype=tl.float32)
        columns = tl.full([1, BLOCK], 1.0, dtype=tl.float32)
    return rows, columns


@triton.jit
def decayed(y, b, m, rows, columns):
    """A block of Y on the diagonal, with ``b`` along rows, ``m`` along columns and G."""
    # no exponent is positive on or above the diagonal
    return y * (b * m * tl.exp2(tl.minimum(columns - rows, 0.0)))


@triton.jit
def decayed_from(y, b, m, rows, columns, first):
    """The same for a block whose columns are of a later block: from a row to that block's ``first`` token, then on."""
    return y * ((b * tl.exp2(first - rows)) * (m * tl.exp2(columns - first)))


@triton.jit(do_not_specialize=["N", "T", "heads", "stride_g_b", "stride_g_t", "stride_beta_b", "stride_beta_t"])
def inverse_kernel(
    q_ptr,
    k_ptr,
    g_ptr,
    beta_ptr,
    A_log_ptr,
    dt_bias_ptr,
    y_ptr,
    factor_ptr,
    o_ptr,
    cu_seqlens_ptr,
    N: tl.int32,
    T: tl.int32,
    heads: tl.int32,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_g_b: tl.int64,
    stride_g_t: tl.int64,
    stride_beta_b: tl.int64,
    stride_beta_t: tl.int64,
    stride_o_t,
    stride_o_h,
    scale,
    beta_scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    IS_RAW_GATE: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Y and row factors of one chunk and HEADS value heads of one key head, by one warp; zeros for no sequence's
    tokens."""
    pid = tl.program_id(0)
    hv0 = pid % (HV // HEADS) * HEADS
    place = (pid // (HV // HEADS)).to(tl.int64)
    h = hv0 // (HV // H)
    o16 = tl.arange(0, BLOCK)

    if cu_seqlens_ptr is not None:
        end = tl.load(cu_seqlens_ptr + N).to(tl.int64)
        if (place + 1) * C > end:
            zeros = tl.zeros([BLOCK, V], dtype=o_ptr.dtype.element_ty)
            for t0 in range(0, C, BLOCK):
                t = (place * C + t0 + o16)[:, None]
                o_ptrs = o_ptr + t * stride_o_t + hv0 * stride_o_h + tl.arange(0, V)[None, :]
                for each in range(HEADS):
                    tl.store(o_ptrs + each * stride_o_h, zeros, mask=(t >= end) & (t < T))

    if N == 0:
        return
    n, batch, chunk, start, length = chunk_of(cu_seqlens_ptr, place, tl.arange(0, 64), N, T)
    if (chunk >= 0) & (chunk * C < length):
        first = start + chunk * C
        left = length - chunk * C
        r = o16[:, None]
        c = o16[None, :]
        # what needs 64 rows at once goes first, where registers are free
        o64 = tl.arange(0, C)
        norm_q = tl.full([C], 1.0, dtype=tl.float32)
        if USE_QK_L2NORM:
            squares = tl.zeros([C], dtype=tl.float32)
            q_base = q_ptr + batch * stride_q_b + first * stride_q_t + h * stride_q_h
            q_ptrs = q_base + o64[:, None] * stride_q_t + tl.arange(0, 64)[None, :]
            for s in tl.static_range(0, K, 64):
                q = tl.load(q_ptrs + s, mask=o64[:, None] < left, other=0.0).to(tl.float32)
                squares += tl.sum(q * q, axis=1)
            norm_q = inv_l2norm(squares, L2NORM_EPS)
        norm_q *= scale
        g_ptrs = g_ptr + batch * stride_g_b + (first + o64) * stride_g_t + hv0
        beta_ptrs = beta_ptr + batch * stride_beta_b + (first + o64) * stride_beta_t + hv0
        for each in range(HEADS):
            factor_ptrs = factor_ptr + (place * HV + hv0 + each) * (4 * C) + o64
            g = tl.load(g_ptrs + each, mask=o64 < left, other=0.0).to(tl.float32)
            b = tl.load(beta_ptrs + each, mask=o64 < left, other=0.0).to(tl.float32)
            if IS_RAW_GATE:
                A_log = tl.load(A_log_ptr + hv0 + each).to(tl.float32)
                dt_bias = tl.load(dt_bias_ptr + hv0 + each).to(tl.float32)
                g = tl.where(o64 < left, gate(g, A_log, dt_bias), 0.0)
                b = tl.where(o64 < left, beta_scale * sigmoid(b), 0.0)
            # those of tokens past the last valid one are 0, so that the last sum is the whole chunk's
            gates = tl.cumsum(tl.maximum(g * LOG2E, MIN_LOG2_GATE), axis=0)
            tl.store(factor_ptrs, gates)
            # until Y is known, whose blocks take it from here: registers are short there
            tl.store(factor_ptrs + C, b)
            tl.store(factor_ptrs + 2 * C, tl.exp2(gates) * norm_q)
            tl.store(factor_ptrs + 3 * C, norm_q)

        # rows of 128 columns at once, longer ones by 64, in turns of a loop: what fits the registers
        BLOCK_K: tl.constexpr = K if K <= 128 else 64
        columns = tl.arange(0, BLOCK_K)[None, :]
        k_base = k_ptr + batch * stride_k_b + first * stride_k_t + h * stride_k_h
        zero = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        A00 = zero
        A10 = zero
        A11 = zero
        A20 = zero
        A21 = zero
        A22 = zero
        A30 = zero
        A31 = zero
        A32 = zero
        A33 = zero
        for s in tl.range(0, K, BLOCK_K):
            k0 = tl.load(k_base + r * stride_k_t + s + columns, mask=r < left, other=0.0)
            k1 = tl.load(k_base + (16 + r) * stride_k_t + s + columns, mask=16 + r < left, other=0.0)
            k2 = tl.load(k_base + (32 + r) * stride_k_t + s + columns, mask=32 + r < left, other=0.0)
            k3 = tl.load(k_base + (48 + r) * stride_k_t + s + columns, mask=48 + r < left, other=0.0)
            A00 = tl.dot(k0, tl.trans(k0), A00)
            A10 = tl.dot(k1, tl.trans(k0), A10)
            A11 = tl.dot(k1, tl.trans(k1), A11)
            A20 = tl.dot(k2, tl.trans(k0), A20)
            A21 = tl.dot(k2, tl.trans(k1), A21)
            A22 = tl.dot(k2, tl.trans(k2), A22)
            A30 = tl.dot(k3, tl.trans(k0), A30)
            A31 = tl.dot(k3, tl.trans(k1), A31)
            A32 = tl.dot(k3, tl.trans(k2), A32)
            A33 = tl.dot(k3, tl.trans(k3), A33)
        n0, m0 = norms_of(A00, USE_QK_L2NORM)
        n1, m1 = norms_of(A11, USE_QK_L2NORM)
        n2, m2 = norms_of(A22, USE_QK_L2NORM)
        n3, m3 = norms_of(A33, USE_QK_L2NORM)
        A00 *= n0 * m0
        A11 *= n1 * m1
        A22 *= n2 * m2
        A33 *= n3 * m3
        # rounding them to one operand each would leave the errors that the Newton steps take away
        A10_high, A10_low = split(A10 * (n1 * m0), OPERAND)
        A20_high, A20_low = split(A20 * (n2 * m0), OPERAND)
        A21_high, A21_low = split(A21 * (n2 * m1), OPERAND)
        A30_high, A30_low = split(A30 * (n3 * m0), OPERAND)
        A31_high, A31_low = split(A31 * (n3 * m1), OPERAND)
        A32_high, A32_low = split(A32 * (n3 * m2), OPERAND)

        lower = r > c
        upper = r < c
        tile = r * C + tl.arange(0, C)[None, :]
        DTYPE: tl.constexpr = y_ptr.dtype.element_ty
        none = zero.to(DTYPE)

        # threads read what others have written
        tl.debug_barrier()
        # a runtime number of turns, because a loop of one known turn dissolves, and registers spill
        for each in range(heads):
            gate_ptrs = factor_ptr + (place * HV + hv0 + each) * (4 * C)
            # T_ij = -T_ii diag(b_i) sum of A_ik T_kj over j <= k < i, transposed; by columns of T, which are rows of Y
            y_base = y_ptr + (place * HV + hv0 + each) * (C * C) + tile
            # all of them before the first store, which loads do not pass
            b0 = tl.load(gate_ptrs + C + 0 + r)
            c0 = tl.load(gate_ptrs + C + 0 + c)
            g0 = tl.load(gate_ptrs + 0 + r)
            h0 = tl.load(gate_ptrs + 0 + c)
            b1 = tl.load(gate_ptrs + C + 16 + r)
            c1 = tl.load(gate_ptrs + C + 16 + c)
            g1 = tl.load(gate_ptrs + 16 + r)
            h1 = tl.load(gate_ptrs + 16 + c)
            b2 = tl.load(gate_ptrs + C + 32 + r)
            c2 = tl.load(gate_ptrs + C + 32 + c)
            g2 = tl.load(gate_ptrs + 32 + r)
            h2 = tl.load(gate_ptrs + 32 + c)
            b3 = tl.load(gate_ptrs + C + 48 + r)
            c3 = tl.load(gate_ptrs + C + 48 + c)
            g3 = tl.load(gate_ptrs + 48 + r)
            h3 = tl.load(gate_ptrs + 48 + c)
            f1 = tl.load(gate_ptrs + 16)
            f2 = tl.load(gate_ptrs + 32)
            f3 = tl.load(gate_ptrs + 48)
            L = tl.where(lower, A33 * b3, 0.0)
            T33, Y33 = inverse_block(L, tl.where(upper, A33 * c3, 0.0), OPERAND)
            T3_high, T3_low = split(T33 * -c3, OPERAND)
            y = side_by_side(none, none, none, decayed(Y33, b3, m3, g3, h3).to(DTYPE))
            tl.store(y_base + 48 * C, y)

            L = tl.where(lower, A22 * b2, 0.0)
            T22, Y22 = inverse_block(L, tl.where(upper, A22 * c2, 0.0), OPERAND)
            T2_high, T2_low = split(T22 * -c2, OPERAND)
            Y22_high, Y22_low = split(Y22, OPERAND)
            sums = add_whole_product(zero, Y22_high, Y22_low, A32_high, A32_low)
            Y32 = add_product(zero, sums.to(OPERAND), T3_high, T3_low)
            y = side_by_side(
                none,
                none,
                decayed(Y22, b2, m2, g2, h2).to(DTYPE),
                decayed_from(Y32, b2, m3, g2, h3, f3).to(DTYPE),
            )
            tl.store(y_base + 32 * C, y)

            L = tl.where(lower, A11 * b1, 0.0)
            T11, Y11 = inverse_block(L, tl.where(upper, A11 * c1, 0.0), OPERAND)
            T1_high, T1_low = split(T11 * -c1, OPERAND)
            Y11_high, Y11_low = split(Y11, OPERAND)
            sums = add_whole_product(zero, Y11_high, Y11_low, A21_high, A21_low)
            Y21 = add_product(zero, sums.to(OPERAND), T2_high, T2_low)
            sums = add_whole_product(zero, Y11_high, Y11_low, A31_high, A31_low)
            Y21_high, Y21_low = split(Y21, OPERAND)
            sums = add_whole_product(sums, Y21_high, Y21_low, A32_high, A32_low)
            Y31 = add_product(zero, sums.to(OPERAND), T3_high, T3_low)
            y = side_by_side(
                none,
                decayed(Y11, b1, m1, g1, h1).to(DTYPE),
                decayed_from(Y21, b1, m2, g1, h2, f2).to(DTYPE),
                decayed_from(Y31, b1, m3, g1, h3, f3).to(DTYPE),
            )
            tl.store(y_base + 16 * C, y)

            L = tl.where(lower, A00 * b0, 0.0)
            _, Y00 = inverse_block(L, tl.where(upper, A00 * c0, 0.0), OPERAND)
            Y00_high, Y00_low = split(Y00, OPERAND)
            sums = add_whole_product(zero, Y00_high, Y00_low, A10_high, A10_low)
            Y10 = add_product(zero, sums.to(OPERAND), T1_high, T1_low)
            Y10_high, Y10_low = split(Y10, OPERAND)
            sums = add_whole_product(zero, Y00_high, Y00_low, A20_high, A20_low)
            sums = add_whole_product(sums, Y10_high, Y10_low, A21_high, A21_low)
            Y20 = add_product(zero, sums.to(OPERAND), T2_high, T2_low)
            sums = add_whole_product(zero, Y00_high, Y00_low, A30_high, A30_low)
            sums = add_whole_product(sums, Y10_high, Y10_low, A31_high, A31_low)
            Y20_high, Y20_low = split(Y20, OPERAND)
            sums = add_whole_product(sums, Y20_high, Y20_low, A32_high, A32_low)
            Y30 = add_product(zero, sums.to(OPERAND), T3_high, T3_low)
            y = side_by_side(
                decayed(Y00, b0, m0, g0, h0).to(DTYPE),
                decayed_from(Y10, b0, m1, g0, h1, f1).to(DTYPE),
                decayed_from(Y20, b0, m2, g0, h2, f2).to(DTYPE),
                decayed_from(Y30, b0, m3, g0, h3, f3).to(DTYPE),
            )
            tl.store(y_base, y)

            # no thread reads beta any more
            tl.debug_barrier()
            tl.store(gate_ptrs + C + c, tl.exp2(h0) * m0)
            tl.store(gate_ptrs + C + 16 + c, tl.exp2(h1) * m1)
            tl.store(gate_ptrs + C + 32 + c, tl.exp2(h2) * m2)
            tl.store(gate_ptrs + C + 48 + c, tl.exp2(h3) * m3)


@triton.jit(do_not_specialize=["N", "T"])
def product_kernel(
    q_ptr,
    k_ptr,
    x_ptr,
    r_ptr,
    factor_ptr,
    cu_seqlens_ptr,
    N: tl.int32,
    T: tl.int32,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
):
    """X and R (where Y was) of one chunk and HEADS value heads of one key head."""
    # the last places first: what inverse_kernel wrote last is still in L2, and what the scan reads first will be
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    hv0 = pid % (HV // HEADS) * HEADS
    place = (pid // (HV // HEADS)).to(tl.int64)
    h = hv0 // (HV // H)
    n, batch, chunk, start, length = chunk_of(cu_seqlens_ptr, place, tl.arange(0, 64), N, T)
    if (chunk >= 0) & (chunk * C < length):
        first = start + chunk * C
        o64 = tl.arange(0, C)
        row = o64[:, None]
        column = o64[None, :]
        valid = row < length - chunk * C
        k_base = k_ptr + batch * stride_k_b + first * stride_k_t + h * stride_k_h
        q_base = q_ptr + batch * stride_q_b + first * stride_q_t + h * stride_q_h
        BLOCK_K: tl.constexpr = min(K, 128)
        columns = tl.arange(0, BLOCK_K)[None, :]
        qk = tl.zeros([C, C], dtype=tl.float32)
        for s in tl.static_range(0, K, BLOCK_K):
            q = tl.load(q_base + row * stride_q_t + s + columns, mask=valid, other=0.0)
            k = tl.load(k_base + row * stride_k_t + s + columns, mask=valid, other=0.0)
            qk = tl.dot(q, tl.trans(k), qk)
        qk = tl.where(row >= column, qk, 0.0)

        for each in range(HEADS):
            head = place * HV + hv0 + each
            r_ptrs = r_ptr + head * (C * C) + row * C + column
            y = tl.load(r_ptrs)
            factor_ptrs = factor_ptr + head * (4 * C)
            gates = tl.load(factor_ptrs + o64)
            norm_q = tl.load(factor_ptrs + 3 * C + o64)
            total = tl.load(factor_ptrs + C - 1)

            # rows of k keep their length here, because Y has the inverse norms
            p = qk * tl.exp2(tl.minimum(gates[:, None] - gates[None, :], 0.0)) * norm_q[:, None]
            r = tl.dot(p.to(y.dtype), tl.trans(y))
            left = (y.to(tl.float32) * tl.exp2(total - gates)[None, :]).to(y.dtype)
            for s in tl.static_range(0, K, BLOCK_K):
                if K > BLOCK_K:
                    k = tl.load(k_base + row * stride_k_t + s + columns, mask=valid, other=0.0)
                x = tl.dot(left, k)
                tl.store(x_ptr + head * (C * K) + row * K + s + columns, x.to(x_ptr.dtype.element_ty))
            # all of Y is read before R takes its place
            tl.debug_barrier()
            tl.store(r_ptrs, r.to(r_ptr.dtype.element_ty))


def _shared(heads: int, ratio: int) -> int:
    """Value heads a program: as many of ``heads`` as divide the value heads of a key head."""
    return max(each for each in range(1, heads + 1) if ratio % each == 0)


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
):
    """Write Y to ``y`` [places, HV, C, C], the row factors to ``factors`` [places, HV, 4, C], and zeros to the tokens
    of ``o`` of no sequence. ``count``: sequences."""
    tokens, H, K = q.shape[1:]
    places, HV = y.shape[:2]
    heads = _shared(config.inverse_heads, HV // H)
    launch.run(
        inverse_kernel,
        (places * (HV // heads),),
        q,
        k,
        g,
        beta,
        A_log,
        dt_bias,
        y,
        factors,
        o,
        cu_seqlens,
        count,
        tokens,
        heads,
        *(stride for t in (q, k) for stride in (batch_stride(t), t.stride(1), t.stride(2))),
        *(stride for t in (g, beta) for stride in (batch_stride(t), t.stride(1))),
        o.stride(1),
        o.stride(2),
        scale,
        beta_scale,
        config=dataclasses.replace(config, num_warps=1),
        H=H,
        HV=HV,
        K=K,
        V=o.shape[3],
        HEADS=heads,
        IS_RAW_GATE=A_log is not None,
        USE_QK_L2NORM=use_qk_l2norm,
        # fp32 operands only in the interpreter, where they test the algebra to fp32's precision
        OPERAND=tl.float32 if q.dtype is torch.float32 else tl.float16,
    )


def prepare_products(q, k, x, r, factors, *, config, count, cu_seqlens):
    """Write X to ``x`` [places, HV, C, K] and R to ``r`` [places, HV, C, C], which holds Y; ``factors`` are read."""
    if count == 0:
        return
    tokens, H, K = q.shape[1:]
    places, HV = x.shape[:2]
    heads = _shared(config.heads, HV // H)
    launch.run(
        product_kernel,
        (places * (HV // heads),),
        q,
        k,
        x,
        r,
        factors,
        cu_seqlens,
        count,
        tokens,
        *(stride for t in (q, k) for stride in (batch_stride(t), t.stride(1), t.stride(2))),
        config=config,
        H=H,
        HV=HV,
        K=K,
        HEADS=heads,
    )
