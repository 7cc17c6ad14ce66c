"""The gated delta rule over whole sequences on a GPU: chunks of C = 64 tokens, a preparation and a scan.

gamma_t is exp of the gates summed within the chunk, G_ij = gamma_i / gamma_j for i >= j (else 0), k^ and q^ the rows of
k and q (divided by their norms if asked), L the strictly lower part of diag(beta) k^ k^T:

    T = (I + L)^-1 diag(beta),   X = T^T k^,   R = scale G * (tril(q^ k^T) T)        preparation, all chunks at once
    W = v - gamma * (k^ S^T),    o = scale gamma * (q^ S^T) + R W,
    S <- gamma_C S + ((gamma_C / gamma) * W)^T X                                      scan, along each sequence

T does not depend on the gates, because (I + L * G)^-1 = G * (I + L)^-1. The scan has two dependent products a chunk.
S is [V, K] in fp32 registers; operands of the products have the dtype of q, bf16 or fp16, accumulators are fp32. Every
exponent is of a number that is not positive: i >= j is selected before the exponential.

A chunk of sequence n has a place in scratch that no other sequence shares, without a plan from the host: its number is
cu_seqlens[n] // 64 + n + (chunk of the sequence), so T // 64 + N + 1 places serve every batch of N sequences in T
tokens.

Left out: splitting one sequence over programs, sharing a key head's products between its value heads.
"""

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels._math import gate, inv_l2norm, sigmoid
from gdn_kernels.kernels.recurrent import L2NORM_EPS, batch_stride, slots, span

CHUNK = 64
C = tl.constexpr(CHUNK)
LOG2E = tl.constexpr(1.4426950408889634)
# Log2 of the smallest decay of one token: exp2(-60) is zero beside any state, and 64 of them still add up exactly.
MIN_LOG2_GATE = tl.constexpr(-60.0)


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
            left = tl.trans((inverse * norm_k[:, None]).to(k_ptr.dtype.element_ty))
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


@triton.jit(do_not_specialize=["T", "num_slots", "pad_slot_id", "num_checkpoints", "checkpoint_chunks"])
def scan_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    x_ptr,
    r_ptr,
    factor_ptr,
    o_ptr,
    initial_ptr,
    final_ptr,
    checkpoint_ptr,
    cu_seqlens_ptr,
    read_ptr,
    write_ptr,
    has_initial_ptr,
    checkpoint_offset_ptr,
    T: tl.int32,
    num_slots: tl.int32,
    pad_slot_id: tl.int32,
    num_checkpoints: tl.int32,
    checkpoint_chunks: tl.int32,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_o_b,
    stride_o_t,
    stride_o_h,
    stride_initial,
    stride_final,
    stride_checkpoint,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_V rows of one head's state, along the chunks of one sequence."""
    pid = tl.program_id(0)
    block = pid % (V // BLOCK_V)
    hv = (pid // (V // BLOCK_V)) % HV
    n = (pid // (V // BLOCK_V * HV)).to(tl.int64)
    h = hv // (HV // H)
    rows = block * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.arange(0, K)
    o64 = tl.arange(0, C)
    inner = (hv * V + rows)[:, None] * K + columns[None, :]

    batch, start, length = span(cu_seqlens_ptr, n, T)
    if cu_seqlens_ptr is not None:
        place = start // C + n
    else:
        place = n * ((T + C - 1) // C)
    read, write, active, keep, known = slots(read_ptr, write_ptr, has_initial_ptr, n, length, num_slots, pad_slot_id)

    S = tl.zeros([BLOCK_V, K], dtype=tl.float32)
    if initial_ptr is not None:
        S = tl.load(initial_ptr + read * stride_initial + inner, mask=known, other=0.0).to(tl.float32)
    checkpoint = n * 0
    checkpoint_end = n * 0
    if checkpoint_ptr is not None:
        checkpoint = tl.load(checkpoint_offset_ptr + n).to(tl.int64)
        checkpoint_end = tl.load(checkpoint_offset_ptr + n + 1).to(tl.int64)
        checkpoint_end = tl.minimum(checkpoint_end, n * 0 + num_checkpoints)

    q_base = q_ptr + batch * stride_q_b + start * stride_q_t + h * stride_q_h
    k_base = k_ptr + batch * stride_k_b + start * stride_k_t + h * stride_k_h
    v_base = v_ptr + batch * stride_v_b + start * stride_v_t + hv * stride_v_h
    o_base = o_ptr + batch * stride_o_b + start * stride_o_t + hv * stride_o_h
    # offsets within a chunk stay in 32 bits, the chunk's base is one 64-bit scalar: fewer registers than 64-bit tiles
    k_offsets = o64[:, None] * stride_k_t + columns[None, :]
    q_offsets = o64[:, None] * stride_q_t + columns[None, :]
    v_offsets = o64[:, None] * stride_v_t + rows[None, :]
    o_offsets = o64[:, None] * stride_o_t + rows[None, :]
    x_offsets = o64[:, None] * K + columns[None, :]
    r_offsets = o64[:, None] * C + o64[None, :]
    chunks = (length + C - 1) // C
    if active:
        for i in tl.range(0, chunks, num_stages=STAGES):
            t = n * 0 + i * C
            valid = (o64 < length - i * C)[:, None]
            head = (place + i) * HV + hv
            k = tl.load(k_base + t * stride_k_t + k_offsets, mask=valid, other=0.0)
            q = tl.load(q_base + t * stride_q_t + q_offsets, mask=valid, other=0.0)
            v = tl.load(v_base + t * stride_v_t + v_offsets, mask=valid, other=0.0)
            x = tl.load(x_ptr + head * (C * K) + x_offsets)
            r = tl.load(r_ptr + head * (C * C) + r_offsets)
            factor_ptrs = factor_ptr + head * (4 * C) + o64
            factor_k = tl.load(factor_ptrs)
            factor_q = tl.load(factor_ptrs + C)
            factor_w = tl.load(factor_ptrs + 2 * C)
            total = tl.load(factor_ptr + head * (4 * C) + 3 * C)

            operand = S.to(k.dtype)
            ks = tl.dot(operand, tl.trans(k))
            qs = tl.dot(operand, tl.trans(q))
            w = tl.trans(v).to(tl.float32) - ks * factor_k[None, :]
            o = tl.dot(w.to(k.dtype), tl.trans(r), qs * factor_q[None, :])
            S = tl.dot((w * factor_w[None, :]).to(k.dtype), x, S * total)
            tl.store(o_base + t * stride_o_t + o_offsets, tl.trans(o).to(o_ptr.dtype.element_ty), mask=valid)

            if checkpoint_ptr is not None:
                due = ((i + 1) % checkpoint_chunks == 0) & ((i + 1) * C <= length)
                due = due & (checkpoint >= 0) & (checkpoint < checkpoint_end)
                tl.store(checkpoint_ptr + checkpoint * stride_checkpoint + inner, S, mask=due)
                checkpoint += ((i + 1) % checkpoint_chunks == 0).to(tl.int64)
    else:
        for i in range(chunks):
            zeros = tl.zeros([C, BLOCK_V], dtype=o_ptr.dtype.element_ty)
            tl.store(o_base + (n * 0 + i * C) * stride_o_t + o_offsets, zeros, mask=(o64 < length - i * C)[:, None])
    tl.store(final_ptr + write * stride_final + inner, S.to(final_ptr.dtype.element_ty), mask=keep)


def _launch(
    q,
    k,
    v,
    g,
    beta,
    o,
    initial,
    final,
    *,
    cu_seqlens,
    scale,
    use_qk_l2norm,
    A_log,
    dt_bias,
    beta_scale,
    read=None,
    write=None,
    has_initial_state=None,
    pad_slot_id=-1,
    checkpoints=None,
    checkpoint_offsets=None,
    checkpoint_interval=CHUNK,
):
    batch, tokens, H, K = q.shape
    HV, V = v.shape[2:]
    if cu_seqlens is None:
        count = batch
        places = batch * triton.cdiv(tokens, CHUNK)
    else:
        count = cu_seqlens.shape[0] - 1
        places = tokens // CHUNK + count + 1
    target = launch.target(q.device)
    prep = launch.config("chunk_prep", target)
    scan = launch.config("chunk_scan", K, target)
    x = launch.empty(q, places, HV, CHUNK, K)
    r = launch.empty(q, places, HV, CHUNK, CHUNK)
    factors = launch.empty(q, places, HV, 4, CHUNK, dtype=torch.float32)
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
        K**-0.5 if scale is None else scale,
        beta_scale,
        config=prep,
        H=H,
        HV=HV,
        K=K,
        V=V,
        IS_RAW_GATE=A_log is not None,
        USE_QK_L2NORM=use_qk_l2norm,
        # fp32 operands only in the interpreter, where they test the algebra to fp32's precision
        OPERAND=tl.float32 if q.dtype is torch.float32 else tl.float16,
    )
    launch.run(
        scan_kernel,
        (count * HV * (V // scan.block_v),),
        q,
        k,
        v,
        x,
        r,
        factors,
        o,
        initial,
        final,
        checkpoints,
        cu_seqlens,
        read,
        write,
        has_initial_state,
        checkpoint_offsets,
        tokens,
        final.shape[0],
        pad_slot_id,
        0 if checkpoints is None else checkpoints.shape[0],
        checkpoint_interval // CHUNK,
        *(stride for t in (q, k, v, o) for stride in (batch_stride(t), t.stride(1), t.stride(2))),
        0 if initial is None else initial.stride(0),
        final.stride(0),
        0 if checkpoints is None else checkpoints.stride(0),
        config=scan,
        H=H,
        HV=HV,
        K=K,
        V=V,
        BLOCK_V=scan.block_v,
        STAGES=scan.num_stages,
    )


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    *,
    scale=None,
    initial_state=None,
    cu_seqlens=None,
    use_qk_l2norm=False,
    A_log=None,
    dt_bias=None,
    beta_scale=1.0,
):
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = launch.empty(v, *v.shape)
    final = launch.empty(v, count, v.shape[2], v.shape[3], q.shape[3], dtype=torch.float32)
    _launch(
        q,
        k,
        v,
        g,
        beta,
        o,
        initial_state,
        final,
        cu_seqlens=cu_seqlens,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
    )
    return o, final


def chunk_gated_delta_rule_paged(
    q,
    k,
    v,
    g,
    beta,
    state,
    out,
    state_indices,
    cu_seqlens,
    *,
    has_initial_state=None,
    write_indices=None,
    scale=None,
    use_qk_l2norm=False,
    A_log=None,
    dt_bias=None,
    beta_scale=1.0,
    pad_slot_id=-1,
):
    _launch(
        q,
        k,
        v,
        g,
        beta,
        out,
        state,
        state,
        cu_seqlens=cu_seqlens,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
        read=state_indices,
        write=write_indices,
        has_initial_state=has_initial_state,
        pad_slot_id=pad_slot_id,
    )


def chunk_gated_delta_rule_paged_checkpoints(
    q,
    k,
    v,
    g,
    beta,
    state,
    out,
    checkpoints,
    state_indices,
    cu_seqlens,
    checkpoint_offsets,
    *,
    checkpoint_interval,
    has_initial_state=None,
    write_indices=None,
    scale=None,
    use_qk_l2norm=False,
    A_log=None,
    dt_bias=None,
    beta_scale=1.0,
    pad_slot_id=-1,
):
    _launch(
        q,
        k,
        v,
        g,
        beta,
        out,
        state,
        state,
        cu_seqlens=cu_seqlens,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
        read=state_indices,
        write=write_indices,
        has_initial_state=has_initial_state,
        pad_slot_id=pad_slot_id,
        checkpoints=checkpoints,
        checkpoint_offsets=checkpoint_offsets,
        checkpoint_interval=checkpoint_interval,
    )
