"""The preparation of the chunked gated delta rule: X, R and the row factors of every chunk, in one kernel or in two.

What they are, and where they lie, is said in kernels/chunk.py. ``prep_kernel`` does a chunk and value head at once, on
64x64 tiles. The other form goes by blocks; with n_k and n_q the inverse norms of the rows (1 without l2norm):

    Y = (diag(n_k) T)^T                              inverse_kernel, in the place of R; n_k and gates in that of factors
    X = Y k,   R = (scale n_q) G * (tril(q k^T) Y^T)                    product_kernel, and the row factors

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
from gdn_kernels.kernels.recurrent import L2NORM_EPS, batch_stride, span

CHUNK = 64
C = tl.constexpr(CHUNK)
LOG2E = tl.constexpr(1.4426950408889634)
# Log2 of the smallest decay of one token: exp2(-60) is zero beside any state, and 64 of them still add up exactly.
MIN_LOG2_GATE = tl.constexpr(-60.0)
# Rows of a block: the smallest that matrix units take.
BLOCK = tl.constexpr(16)


@triton.jit
def unit_lower_inverse(L, OPERAND: tl.constexpr):
    """(I + L)^-1 of a strictly lower [64, 64] L, by doubling the solved diagonal blocks: T <- T - T (L * M_l) T.

    M_l keeps the off-diagonal blocks of level l. No product has entries beyond those of the inverse itself, so
    identical keys do no harm, which a power series of L would not survive. Rounding the operands to fp16 leaves an
    error of 1e-3, but 5e-2 where beta nears 2 on identical keys: one Newton step on a residual of twice the precision
    squares that.
    """
    r = tl.arange(0, C)[:, None]
    c = tl.arange(0, C)[None, :]
    eye = tl.where(r == c, 1.0, 0.0)
    T = eye - tl.where(r // 2 == c // 2, L, 0.0)
    for level in tl.static_range(1, 6):
        below = (r // (2**level) != c // (2**level)) & (r // (2 ** (level + 1)) == c // (2 ** (level + 1)))
        operand = T.to(OPERAND)
        U = tl.dot(tl.where(below, L, 0.0).to(OPERAND), operand)
        T = T - tl.dot(operand, U.to(OPERAND))
    L_high = L.to(OPERAND)
    T_high = T.to(OPERAND)
    residual = eye - T - tl.dot(L_high, T_high)
    residual -= tl.dot(L_high, (T - T_high.to(tl.float32)).to(OPERAND))
    residual -= tl.dot((L - L_high.to(tl.float32)).to(OPERAND), T_high)
    return T + tl.dot(T_high, residual.to(OPERAND))


@triton.jit
def chunk_of(cu_seqlens_ptr, place, N, T):
    """Batch row, first token and length of the sequence at scratch place ``place``, and which of its chunks that is."""
    if cu_seqlens_ptr is not None:
        low = place * 0
        high = low + N - 1
        while low < high:
            middle = (low + high + 1) // 2
            _, first, _ = span(cu_seqlens_ptr, middle, T)
            if first // C + middle <= place:
                low = middle
            else:
                high = middle - 1
        batch, start, length = span(cu_seqlens_ptr, low, T)
        chunk = place - (start // C + low)
    else:
        chunks = (T + C - 1) // C
        batch, start, length = span(cu_seqlens_ptr, place // chunks, T)
        chunk = place % chunks
    return batch, chunk, start, length


@triton.jit(do_not_specialize=["N", "T", "stride_g_b", "stride_g_t", "stride_beta_b", "stride_beta_t"])
def prep_kernel(
    q_ptr,
    k_ptr,
    g_ptr,
    beta_ptr,
    A_log_ptr,
    dt_bias_ptr,
    x_ptr,
    r_ptr,
    factor_ptr,
    o_ptr,
    cu_seqlens_ptr,
    N: tl.int32,
    T: tl.int32,
    key_columns: tl.int32,
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
    IS_RAW_GATE: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One chunk and value head: X, R and the row factors of the scan; and zeros for the tokens of no sequence."""
    pid = tl.program_id(0)
    hv = pid % HV
    place = (pid // HV).to(tl.int64)
    h = hv // (HV // H)
    o64 = tl.arange(0, C)

    if cu_seqlens_ptr is not None:
        end = tl.load(cu_seqlens_ptr + N).to(tl.int64)
        t = place * C + o64
        if (place + 1) * C > end:
            tail = (t >= end) & (t < T)
            columns = tl.arange(0, V)
            zeros = tl.zeros([C, V], dtype=o_ptr.dtype.element_ty)
            tl.store(o_ptr + t[:, None] * stride_o_t + hv * stride_o_h + columns[None, :], zeros, mask=tail[:, None])

    if N > 0:
        batch, chunk, start, length = chunk_of(cu_seqlens_ptr, place, N, T)
        if (chunk >= 0) & (chunk * C < length):
            first = start + chunk * C
            valid = o64 < length - chunk * C
            k_base = k_ptr + batch * stride_k_b + first * stride_k_t + h * stride_k_h
            q_base = q_ptr + batch * stride_q_b + first * stride_q_t + h * stride_q_h
            g_ptrs = g_ptr + batch * stride_g_b + (first + o64) * stride_g_t + hv
            beta_ptrs = beta_ptr + batch * stride_beta_b + (first + o64) * stride_beta_t + hv
            g = tl.load(g_ptrs, mask=valid, other=0.0).to(tl.float32)
            b = tl.load(beta_ptrs, mask=valid, other=0.0).to(tl.float32)
            if IS_RAW_GATE:
                A_log = tl.load(A_log_ptr + hv).to(tl.float32)
                dt_bias = tl.load(dt_bias_ptr + hv).to(tl.float32)
                g = tl.where(valid, gate(g, A_log, dt_bias), 0.0)
                b = tl.where(valid, beta_scale * sigmoid(b), 0.0)
            gates = tl.cumsum(tl.maximum(g * LOG2E, MIN_LOG2_GATE), axis=0)
            # the decay of the whole chunk is the last one, that of the last valid token: gates past it are 0
            total = tl.sum(tl.where(o64 == C - 1, gates, 0.0), axis=0)

            # 64 columns of k at a time, twice: whole rows as operands would not fit the registers. The bound is a
            # runtime number, because a loop of one known turn dissolves and its tiles live on (692 bytes of spills).
            row = o64[:, None]
            column = o64[None, :]
            k_offsets = row * stride_k_t + column
            q_offsets = row * stride_q_t + column
            kk = tl.zeros([C, C], dtype=tl.float32)
            squares = tl.zeros([C], dtype=tl.float32)
            for c in range(0, key_columns, C):
                k = tl.load(k_base + c + k_offsets, mask=valid[:, None], other=0.0)
                kk = tl.dot(k, tl.trans(k), kk)
                if USE_QK_L2NORM:
                    squares += tl.sum(k.to(tl.float32) * k.to(tl.float32), axis=1)
            norm_k = tl.full([C], 1.0, dtype=tl.float32)
            if USE_QK_L2NORM:
                norm_k = inv_l2norm(squares, L2NORM_EPS)
            kk = kk * norm_k[:, None] * norm_k[None, :]
            inverse = unit_lower_inverse(tl.where(row > column, kk * b[:, None], 0.0), OPERAND) * b[None, :]

            head = place * HV + hv
            qk = tl.zeros([C, C], dtype=tl.float32)
            squares = tl.zeros([C], dtype=tl.float32)
            decayed = inverse * norm_k[:, None] * tl.exp2(total - gates)[None, :]
            left = tl.trans(decayed.to(k_ptr.dtype.element_ty))
            for c in range(0, key_columns, C):
                k = tl.load(k_base + c + k_offsets, mask=valid[:, None], other=0.0)
                q = tl.load(q_base + c + q_offsets, mask=valid[:, None], other=0.0)
                x = tl.dot(left, k)
                tl.store(x_ptr + head * (C * K) + c + row * K + column, x.to(x_ptr.dtype.element_ty))
                qk = tl.dot(q, tl.trans(k), qk)
                if USE_QK_L2NORM:
                    squares += tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1)
            norm_q = tl.full([C], 1.0, dtype=tl.float32)
            if USE_QK_L2NORM:
                norm_q = inv_l2norm(squares, L2NORM_EPS)
            qk = tl.where(row >= column, qk * norm_q[:, None] * norm_k[None, :], 0.0)
            decay = tl.exp2(tl.where(row >= column, gates[:, None] - gates[None, :], 0.0))
            r = scale * decay * tl.dot(qk.to(k_ptr.dtype.element_ty), inverse.to(k_ptr.dtype.element_ty))
            tl.store(r_ptr + head * (C * C) + row * C + column, r.to(r_ptr.dtype.element_ty))

            factor_ptrs = factor_ptr + head * (4 * C) + o64
            decay = tl.exp2(gates)
            tl.store(factor_ptrs, decay * norm_k)
            tl.store(factor_ptrs + C, decay * norm_q * scale)
            tl.store(factor_ptrs + 2 * C, tl.exp2(total - gates))
            tl.store(factor_ptrs + 3 * C, tl.exp2(total + 0.0 * gates))


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

    Solved diagonal blocks are doubled, as in ``unit_lower_inverse``, for both at once: each is the other's operand.
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
    # one Newton step on the residual of twice the precision
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
def load_beta(beta_ptrs, valid, beta_scale, IS_RAW_GATE: tl.constexpr):
    b = tl.load(beta_ptrs, mask=valid, other=0.0).to(tl.float32)
    if IS_RAW_GATE:
        b = tl.where(valid, beta_scale * sigmoid(b), 0.0)
    return b


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


@triton.jit(do_not_specialize=["N", "T", "stride_g_b", "stride_g_t", "stride_beta_b", "stride_beta_t"])
def inverse_kernel(
    k_ptr,
    g_ptr,
    beta_ptr,
    A_log_ptr,
    dt_bias_ptr,
    y_ptr,
    factor_ptr,
    cu_seqlens_ptr,
    N: tl.int32,
    T: tl.int32,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_g_b: tl.int64,
    stride_g_t: tl.int64,
    stride_beta_b: tl.int64,
    stride_beta_t: tl.int64,
    beta_scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    IS_RAW_GATE: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Y of one chunk and HEADS value heads of one key head, by one warp; n_k and gates in the place of factors."""
    pid = tl.program_id(0)
    hv0 = pid % (HV // HEADS) * HEADS
    place = (pid // (HV // HEADS)).to(tl.int64)
    h = hv0 // (HV // H)
    batch, chunk, start, length = chunk_of(cu_seqlens_ptr, place, N, T)
    if (chunk >= 0) & (chunk * C < length):
        first = start + chunk * C
        left = length - chunk * C
        o16 = tl.arange(0, BLOCK)
        r = o16[:, None]
        c = o16[None, :]
        # in a loop of its own, where registers are free
        o64 = tl.arange(0, C)
        g_base = g_ptr + batch * stride_g_b + first * stride_g_t + hv0
        for each in range(HEADS):
            factor_ptrs = factor_ptr + (place * HV + hv0 + each) * (4 * C) + o64
            g = tl.load(g_base + each + o64 * stride_g_t, mask=o64 < left, other=0.0).to(tl.float32)
            if IS_RAW_GATE:
                A_log = tl.load(A_log_ptr + hv0 + each).to(tl.float32)
                dt_bias = tl.load(dt_bias_ptr + hv0 + each).to(tl.float32)
                g = tl.where(o64 < left, gate(g, A_log, dt_bias), 0.0)
            tl.store(factor_ptrs + C, tl.cumsum(tl.maximum(g * LOG2E, MIN_LOG2_GATE), axis=0))

        # 128 columns at a time; narrower loads cost more than they save registers
        BLOCK_K: tl.constexpr = min(K, 128)
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
        for s in tl.static_range(0, K, BLOCK_K):
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
        for each in range(HEADS):
            norm_ptrs = factor_ptr + (place * HV + hv0 + each) * (4 * C) + r
            tl.store(norm_ptrs, n0)
            tl.store(norm_ptrs + 16, n1)
            tl.store(norm_ptrs + 32, n2)
            tl.store(norm_ptrs + 48, n3)

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
        beta_base = beta_ptr + batch * stride_beta_b + first * stride_beta_t + hv0
        tile = r * C + tl.arange(0, C)[None, :]
        DTYPE: tl.constexpr = y_ptr.dtype.element_ty
        none = zero.to(DTYPE)

        for each in range(HEADS):
            beta_ptrs = beta_base + each + o16 * stride_beta_t
            b0 = load_beta(beta_ptrs, o16 < left, beta_scale, IS_RAW_GATE)
            b1 = load_beta(beta_ptrs + 16 * stride_beta_t, 16 + o16 < left, beta_scale, IS_RAW_GATE)
            b2 = load_beta(beta_ptrs + 32 * stride_beta_t, 32 + o16 < left, beta_scale, IS_RAW_GATE)
            b3 = load_beta(beta_ptrs + 48 * stride_beta_t, 48 + o16 < left, beta_scale, IS_RAW_GATE)

            # T_ij = -T_ii diag(b_i) sum of A_ik T_kj over j <= k < i, transposed; by columns of T, which are rows of Y
            y_base = y_ptr + (place * HV + hv0 + each) * (C * C) + tile
            L = tl.where(lower, A33 * b3[:, None], 0.0)
            T33, Y33 = inverse_block(L, tl.where(upper, A33 * b3[None, :], 0.0), OPERAND)
            T3_high, T3_low = split(T33 * -b3[None, :], OPERAND)
            y = side_by_side(none, none, none, (Y33 * (b3[:, None] * m3)).to(DTYPE))
            tl.store(y_base + 48 * C, y)

            L = tl.where(lower, A22 * b2[:, None], 0.0)
            T22, Y22 = inverse_block(L, tl.where(upper, A22 * b2[None, :], 0.0), OPERAND)
            T2_high, T2_low = split(T22 * -b2[None, :], OPERAND)
            Y22_high, Y22_low = split(Y22, OPERAND)
            sums = add_whole_product(zero, Y22_high, Y22_low, A32_high, A32_low)
            Y32 = add_product(zero, sums.to(OPERAND), T3_high, T3_low)
            rows = b2[:, None]
            y = side_by_side(none, none, (Y22 * (rows * m2)).to(DTYPE), (Y32 * (rows * m3)).to(DTYPE))
            tl.store(y_base + 32 * C, y)

            L = tl.where(lower, A11 * b1[:, None], 0.0)
            T11, Y11 = inverse_block(L, tl.where(upper, A11 * b1[None, :], 0.0), OPERAND)
            T1_high, T1_low = split(T11 * -b1[None, :], OPERAND)
            Y11_high, Y11_low = split(Y11, OPERAND)
            sums = add_whole_product(zero, Y11_high, Y11_low, A21_high, A21_low)
            Y21 = add_product(zero, sums.to(OPERAND), T2_high, T2_low)
            sums = add_whole_product(zero, Y11_high, Y11_low, A31_high, A31_low)
            Y21_high, Y21_low = split(Y21, OPERAND)
            sums = add_whole_product(sums, Y21_high, Y21_low, A32_high, A32_low)
            Y31 = add_product(zero, sums.to(OPERAND), T3_high, T3_low)
            rows = b1[:, None]
            y = side_by_side(
                none, (Y11 * (rows * m1)).to(DTYPE), (Y21 * (rows * m2)).to(DTYPE), (Y31 * (rows * m3)).to(DTYPE)
            )
            tl.store(y_base + 16 * C, y)

            L = tl.where(lower, A00 * b0[:, None], 0.0)
            _, Y00 = inverse_block(L, tl.where(upper, A00 * b0[None, :], 0.0), OPERAND)
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
            rows = b0[:, None]
            y = side_by_side(
                (Y00 * (rows * m0)).to(DTYPE),
                (Y10 * (rows * m1)).to(DTYPE),
                (Y20 * (rows * m2)).to(DTYPE),
                (Y30 * (rows * m3)).to(DTYPE),
            )
            tl.store(y_base, y)


@triton.jit(do_not_specialize=["N", "T"])
def product_kernel(
    q_ptr,
    k_ptr,
    x_ptr,
    r_ptr,
    factor_ptr,
    o_ptr,
    cu_seqlens_ptr,
    N: tl.int32,
    T: tl.int32,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_o_t,
    stride_o_h,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
):
    """X, R (where Y was) and row factors of one chunk and HEADS value heads of one key head; zeros for no sequence's
    tokens."""
    # the last places first: what inverse_kernel wrote last is still in L2, and what the scan reads first will be
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    hv0 = pid % (HV // HEADS) * HEADS
    place = (pid // (HV // HEADS)).to(tl.int64)
    h = hv0 // (HV // H)
    o64 = tl.arange(0, C)

    if cu_seqlens_ptr is not None:
        end = tl.load(cu_seqlens_ptr + N).to(tl.int64)
        t = place * C + o64
        if (place + 1) * C > end:
            tail = (t >= end) & (t < T)
            columns = tl.arange(0, V)
            zeros = tl.zeros([C, V], dtype=o_ptr.dtype.element_ty)
            for each in range(HEADS):
                o_ptrs = o_ptr + t[:, None] * stride_o_t + (hv0 + each) * stride_o_h + columns[None, :]
                tl.store(o_ptrs, zeros, mask=tail[:, None])

    if N > 0:
        batch, chunk, start, length = chunk_of(cu_seqlens_ptr, place, N, T)
        if (chunk >= 0) & (chunk * C < length):
            first = start + chunk * C
            valid = o64 < length - chunk * C
            row = o64[:, None]
            column = o64[None, :]
            k_base = k_ptr + batch * stride_k_b + first * stride_k_t + h * stride_k_h
            q_base = q_ptr + batch * stride_q_b + first * stride_q_t + h * stride_q_h
            BLOCK_K: tl.constexpr = min(K, 128)
            columns = tl.arange(0, BLOCK_K)[None, :]
            qk = tl.zeros([C, C], dtype=tl.float32)
            squares_q = tl.zeros([C], dtype=tl.float32)
            for s in tl.static_range(0, K, BLOCK_K):
                q = tl.load(q_base + row * stride_q_t + s + columns, mask=valid[:, None], other=0.0)
                k = tl.load(k_base + row * stride_k_t + s + columns, mask=valid[:, None], other=0.0)
                qk = tl.dot(q, tl.trans(k), qk)
                if USE_QK_L2NORM:
                    squares_q += tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1)
            norm_q = tl.full([C], 1.0, dtype=tl.float32)
            if USE_QK_L2NORM:
                norm_q = inv_l2norm(squares_q, L2NORM_EPS)
            # rows of k keep their length here, because Y has the inverse norms
            qk = tl.where(row >= column, qk * norm_q[:, None], 0.0).to(k_ptr.dtype.element_ty)

            for each in range(HEADS):
                hv = hv0 + each
                head = place * HV + hv
                r_ptrs = r_ptr + head * (C * C) + row * C + column
                y = tl.load(r_ptrs)
                factor_ptrs = factor_ptr + head * (4 * C)
                norm_k = tl.load(factor_ptrs + o64)
                gates = tl.load(factor_ptrs + C + o64)
                # the decay of the whole chunk is the last one, that of the last valid token: gates past it are 0
                total = tl.load(factor_ptrs + 2 * C - 1)

                decay = tl.exp2(tl.where(row >= column, gates[:, None] - gates[None, :], 0.0))
                r = scale * decay * tl.dot(qk, tl.trans(y))
                for s in tl.static_range(0, K, BLOCK_K):
                    if K > BLOCK_K:
                        k = tl.load(k_base + row * stride_k_t + s + columns, mask=valid[:, None], other=0.0)
                    x = tl.dot(y, k) * tl.exp2(total - gates)[:, None]
                    tl.store(x_ptr + head * (C * K) + row * K + s + columns, x.to(x_ptr.dtype.element_ty))
                # all of Y and of the gates is read before R and factors take their places
                tl.debug_barrier()
                tl.store(r_ptrs, r.to(r_ptr.dtype.element_ty))

                decay = tl.exp2(gates)
                tl.store(factor_ptrs + o64, decay * norm_k)
                tl.store(factor_ptrs + C + o64, decay * norm_q * scale)
                tl.store(factor_ptrs + 2 * C + o64, tl.exp2(total - gates))
                tl.store(factor_ptrs + 3 * C + o64, tl.exp2(total + 0.0 * gates))


def _shared(heads: int, ratio: int) -> int:
    """Value heads a program: as many of ``heads`` as divide the value heads of a key head."""
    return max(each for each in range(1, heads + 1) if ratio % each == 0)


def prepare(
    q,
    k,
    g,
    beta,
    o,
    x,
    r,
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
    """Write x, r and factors, and zeros to the tokens of ``o`` of no sequence; ``r`` may hold Y in between."""
    tokens, H, K = q.shape[1:]
    places, HV = x.shape[:2]
    V = o.shape[3]
    if isinstance(config, launch.PrepConfig):
        launch.run(
            prep_kernel,
            (places * HV,),
            q,
            k,
            g,
            beta,
            A_log,
            dt_bias,
            x,
            r,
            factors,
            o,
            cu_seqlens,
            count,
            tokens,
            K,
            *(stride for t in (q, k) for stride in (batch_stride(t), t.stride(1), t.stride(2))),
            *(stride for t in (g, beta) for stride in (batch_stride(t), t.stride(1))),
            o.stride(1),
            o.stride(2),
            scale,
            beta_scale,
            config=config,
            H=H,
            HV=HV,
            K=K,
            V=V,
            IS_RAW_GATE=A_log is not None,
            USE_QK_L2NORM=use_qk_l2norm,
            # fp32 operands only in the interpreter, where they test the algebra to fp32's precision
            OPERAND=tl.float32 if q.dtype is torch.float32 else tl.float16,
        )
        return
    inverse_heads = _shared(config.inverse_heads, HV // H)
    heads = _shared(config.heads, HV // H)
    if count > 0:
        launch.run(
            inverse_kernel,
            (places * (HV // inverse_heads),),
            k,
            g,
            beta,
            A_log,
            dt_bias,
            r,
            factors,
            cu_seqlens,
            count,
            tokens,
            batch_stride(k),
            k.stride(1),
            k.stride(2),
            batch_stride(g),
            g.stride(1),
            batch_stride(beta),
            beta.stride(1),
            beta_scale,
            config=dataclasses.replace(config, num_warps=1),
            H=H,
            HV=HV,
            K=K,
            HEADS=inverse_heads,
            IS_RAW_GATE=A_log is not None,
            USE_QK_L2NORM=use_qk_l2norm,
            # fp32 operands only in the interpreter, where they test the algebra to fp32's precision
            OPERAND=tl.float32 if q.dtype is torch.float32 else tl.float16,
        )
    launch.run(
        product_kernel,
        (places * (HV // heads),),
        q,
        k,
        x,
        r,
        factors,
        o,
        cu_seqlens,
        count,
        tokens,
        *(stride for t in (q, k) for stride in (batch_stride(t), t.stride(1), t.stride(2))),
        o.stride(1),
        o.stride(2),
        scale,
        config=config,
        H=H,
        HV=HV,
        K=K,
        V=V,
        HEADS=heads,
        USE_QK_L2NORM=use_qk_l2norm,
    )
