"""The gated delta rule over whole sequences on a GPU: chunks of C = 64 tokens, a preparation and a scan.

gamma_t is exp of the gates summed within the chunk, G_ij = gamma_i / gamma_j for i >= j (else 0), k^ and q^ the rows of
k and q (divided by their norms if asked), L the strictly lower part of diag(beta) k^ k^T:

    T = G * ((I + L)^-1 diag(beta)),   X = T^T diag(gamma_C / gamma) k^,   R = scale (G * (q^ k^T)) T
                                                                                     preparation, all chunks at once
    W = v - gamma * (k^ S^T),   o = scale gamma * (q^ S^T) + R W,   S <- gamma_C S + W^T X
                                                                                     scan, along each sequence

The inverse does not depend on the gates, because (I + L * G)^-1 = G * (I + L)^-1. The scan has two dependent products a
chunk. Four rows of factors are fp32: the gates summed within the chunk, in log2; gamma / |k|; scale gamma / |q|; and
scale / |q|, where a norm is 1 unless k and q are to be normalised. On Hopper there are but the first two, or with norms
in fp16 those two and the last.
S is [V, K] in fp32 registers; operands of the products have the dtype of q, bf16 or fp16, accumulators are fp32. Every
exponent is of a number that is not positive.

A chunk of sequence n has a place in scratch that no other sequence shares, without a plan from the host: its number is
cu_seqlens[n] // 64 + n + (chunk of the sequence), so T // 64 + N + 1 places serve every batch of N sequences in T
tokens.

The preparation is in kernels/chunk_prep.py. Where Hopper's kernels can address the tensors, the inverses are formed in
kernels/chunk_hopper_inverse.py, and kernels/chunk_hopper.py scans with them, without X and R; only there are sequences
split over programs.
"""

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels import chunk_segments
from gdn_kernels.kernels.chunk_prep import CHUNK, C, place_of, prepare_inverse, prepare_products
from gdn_kernels.kernels.recurrent import batch_stride, slots, span


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
    place = place_of(cu_seqlens_ptr, n, start, T)
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
            factor_k = tl.load(factor_ptrs + C)
            factor_q = tl.load(factor_ptrs + 2 * C)
            total = tl.exp2(tl.load(factor_ptr + head * (4 * C) + C - 1))

            operand = S.to(k.dtype)
            ks = tl.dot(operand, tl.trans(k))
            qs = tl.dot(operand, tl.trans(q))
            w = tl.trans(v).to(tl.float32) - ks * factor_k[None, :]
            o = tl.dot(w.to(k.dtype), tl.trans(r), qs * factor_q[None, :])
            S = tl.dot(w.to(k.dtype), x, S * total)
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


def _takes_hopper(target, *tensors):
    """Whether the scan is Hopper's. Its module is imported there alone: not every Triton has what it imports."""
    if not launch.has_descriptors(target) or launch.is_pinned("chunk_scan"):
        return False
    from gdn_kernels.kernels import chunk_hopper

    return chunk_hopper.fits(*tensors)


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
    scale = K**-0.5 if scale is None else scale
    gates = {"use_qk_l2norm": use_qk_l2norm, "A_log": A_log, "dt_bias": dt_bias, "beta_scale": beta_scale}
    if _takes_hopper(target, q, k, v, o):
        from gdn_kernels.kernels import chunk_hopper, chunk_hopper_inverse

        y = launch.empty(q, places, HV, chunk_hopper.PACKED.value)
        # o is multiplied by the norms of q, where nothing waits for them. Without them P may exceed what fp16 holds:
        # there they are in P, and come from the inverses
        norms_in_scan = use_qk_l2norm and q.dtype is torch.bfloat16
        # with scale / |q| a third row, and one for TMA, which takes powers of two
        rows = 4 if use_qk_l2norm and not norms_in_scan else 2
        factors = launch.empty(q, places, HV, rows, CHUNK, dtype=torch.float32)
        segments = launch.config("chunk_segments", HV, V, target, launch.prefill_policy(), count * HV)
        firsts = None
        num_long = chunk_segments.num_long(count, tokens, cu_seqlens, segments.long_tokens)
        if num_long > 0 and segments.max_segments > 1 and read is not None:
            firsts = launch.empty(factors, num_long, HV, V, K)
        order = None
        if cu_seqlens is not None and chunk_segments.in_order(count, HV, V, launch.multiprocessors(q.device)):
            order = launch.empty(cu_seqlens, count)
        chunk_hopper_inverse.prepare_inverse(
            q,
            k,
            g,
            beta,
            o,
            y,
            factors,
            config=launch.config("chunk_hopper_inverse"),
            count=count,
            cu_seqlens=cu_seqlens,
            scale=scale,
            order=order,
            firsts=firsts,
            long_tokens=segments.long_tokens,
            initial=initial,
            read=read,
            has_initial_state=has_initial_state,
            pad_slot_id=pad_slot_id,
            **gates,
        )
        chunk_hopper.scan(
            q,
            k,
            v,
            y,
            factors,
            o,
            initial,
            final,
            scale=scale,
            norms_in_scan=norms_in_scan,
            config=launch.config(
                "chunk_hopper_scan", V, chunk_segments.num_states(count, batch * tokens, HV, segments)
            ),
            map_config=launch.config("chunk_map", K, V),
            segments=segments,
            firsts=firsts,
            order=order,
            cu_seqlens=cu_seqlens,
            count=count,
            read=read,
            write=write,
            has_initial_state=has_initial_state,
            pad_slot_id=pad_slot_id,
            checkpoints=checkpoints,
            checkpoint_offsets=checkpoint_offsets,
            checkpoint_interval=checkpoint_interval,
        )
        return
    preparation = {"config": launch.config("chunk_prep", HV), "count": count, "cu_seqlens": cu_seqlens}
    scan = launch.config("chunk_scan", K, target)
    factors = launch.empty(q, places, HV, 4, CHUNK, dtype=torch.float32)
    r = launch.empty(q, places, HV, CHUNK, CHUNK)
    x = launch.empty(q, places, HV, CHUNK, K)
    prepare_inverse(q, k, g, beta, o, r, factors, **preparation, **gates, scale=scale)
    prepare_products(q, k, x, r, factors, **preparation)
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
