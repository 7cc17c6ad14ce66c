"""The gated delta rule, token by token, on a GPU: functional, on a state pool, and for verification.

Per value head, everything in fp32, S of [V, K]:

    S <- exp(g) S;   S <- S + beta (v - S k) k^T;   o = scale S q

One program owns BLOCK_V rows of one head's state of one sequence and walks its tokens with the state in registers:
nothing of the rest of the batch enters. q and k are [.., H, K], v and o [.., HV, V], states [slot, HV, V, K] with K
last. Decode is this kernel with one token a sequence.
"""

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels._math import gate, inv_l2norm, is_slot, row_sum, sigmoid, to_state, wait_for_inputs

L2NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def load_token(q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, ok, rows, K: tl.constexpr):
    """q, k, v, g, beta of the token the pointers stand at, as they are stored; zeros where not ``ok``."""
    columns = tl.arange(0, K)
    q = tl.load(q_ptr + columns, mask=ok, other=0.0)
    k = tl.load(k_ptr + columns, mask=ok, other=0.0)
    v = tl.load(v_ptr + rows, mask=ok, other=0.0)
    g = tl.load(g_ptr, mask=ok, other=0.0)
    beta = tl.load(beta_ptr, mask=ok, other=0.0)
    return q, k, v, g, beta


@triton.jit
def prepare_token(q, k, v, g, beta, A_log, dt_bias, beta_scale, IS_RAW_GATE: tl.constexpr, USE_QK_L2NORM: tl.constexpr):
    """What the delta step takes of a loaded token, in fp32."""
    q = q.to(tl.float32)
    k = k.to(tl.float32)
    v = v.to(tl.float32)
    g = g.to(tl.float32)
    beta = beta.to(tl.float32)
    if USE_QK_L2NORM:
        q = q * inv_l2norm(row_sum(q * q), L2NORM_EPS)
        k = k * inv_l2norm(row_sum(k * k), L2NORM_EPS)
    if IS_RAW_GATE:
        g = gate(g, A_log, dt_bias)
        beta = beta_scale * sigmoid(beta)
    return q, k, v, g, beta


@triton.jit
def _pairs(x):
    """Even and odd columns of the last dimension; neighbours are in one thread, so nothing moves."""
    return tl.split(tl.reshape(x, x.shape[:-1] + (x.shape[-1] // 2, 2)))


@triton.jit
def row_dot(x, y):
    """Sum of x y over the last dimension; of four neighbouring columns by fused steps, because a sum of products that
    the compiler may not fuse takes twice the instructions."""
    x0, x1 = _pairs(x)
    y0, y1 = _pairs(tl.broadcast_to(y, x.shape))
    x00, x01 = _pairs(x0)
    x10, x11 = _pairs(x1)
    y00, y01 = _pairs(y0)
    y10, y11 = _pairs(y1)
    return row_sum(tl.fma(x11, y11, tl.fma(x01, y01, tl.fma(x10, y10, x00 * y00))))


@triton.jit
def delta_step(S, q, k, v, g, beta, scale):
    """One token: the new state and the output. S is [rows, .., K], q and k [.., K], v [rows, ..].

    Both sums are over the old state, so that they run side by side: S' q = decay S q + delta (k q). Sums have a fixed
    order, kernels are launched without fused products, and the fused ones are spelled out: so a token has the same bits
    in whichever kernel it runs.
    """
    decay = tl.exp(g)
    k_row = tl.expand_dims(k, 0)
    kS = row_dot(S, k_row)
    qS = row_dot(S, tl.expand_dims(q, 0))
    delta = beta * tl.fma(-decay, kS, v)
    S = tl.fma(tl.expand_dims(delta, len(S.shape) - 1), k_row, decay * S)
    return S, scale * tl.fma(row_sum(q * k), delta, decay * qS)


@triton.jit
def span(cu_seqlens_ptr, n, T):
    """Batch row, first token and length of sequence n; rows of T tokens where there are no offsets.

    Offsets outside the T tokens are cut off at them: a wrong one gives a shorter sequence, not a stray address.
    """
    if cu_seqlens_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0), T)
        end = tl.minimum(tl.load(cu_seqlens_ptr + n + 1).to(tl.int64), T)
        length = tl.maximum(end - start, 0).to(tl.int32)
        batch = n * 0
    else:
        start = n * 0
        length = T
        batch = n
    return batch, start, length


@triton.jit
def last_before(cu_seqlens_ptr, place, asked, N, T, TOKENS: tl.constexpr, EACH: tl.constexpr):
    """The last of N > 0 sequences whose places begin at or before ``place``, an int64. Every TOKENS tokens have a place
    and, if EACH is 1, every sequence one more. ``asked`` counts from 0 to the sequences that are looked at at once."""
    n = place * 0
    for i in range(1, N, asked.shape[0]):
        number = i + asked
        start = tl.load(cu_seqlens_ptr + number, mask=number < N, other=0)
        start = tl.minimum(tl.maximum(start, 0), T).to(tl.int32)
        begun = (number < N) & (start // TOKENS + number * EACH <= place.to(tl.int32))
        n += tl.sum(begun.to(tl.int32), 0)
    return n


@triton.jit
def slots(read_ptr, write_ptr, has_initial_ptr, n, length, num_slots, pad_slot_id):
    """Slots that sequence n reads and writes, whether it is active, keeps its state, and has one to start from.

    Without indices sequence n has slot n of a functional call.
    """
    read = n
    write = n
    active = length >= 0
    keep = active
    if read_ptr is not None:
        read = tl.load(read_ptr + n).to(tl.int64)
        active = is_slot(read, num_slots, pad_slot_id)
        # an empty sequence leaves its slot as it is
        keep = active & (length > 0)
        write = read
        if write_ptr is not None:
            write = tl.load(write_ptr + n).to(tl.int64)
            keep = keep & is_slot(write, num_slots, pad_slot_id)
    known = active
    if has_initial_ptr is not None:
        known = known & (tl.load(has_initial_ptr + n) != 0)
    return read, write, active, keep, known


# Counts and slot numbers change from batch to batch: specialising on them would build a binary for each class.
_UNSPECIALIZED = ["T", "num_slots", "pad_slot_id", "stride_g_b", "stride_g_t", "stride_beta_b", "stride_beta_t"]


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=["seed_ptr"])
def recurrent_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    A_log_ptr,
    dt_bias_ptr,
    o_ptr,
    initial_ptr,
    final_ptr,
    cu_seqlens_ptr,
    read_ptr,
    write_ptr,
    has_initial_ptr,
    seed_ptr,
    T: tl.int32,
    num_slots: tl.int32,
    pad_slot_id: tl.int32,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_g_b: tl.int64,
    stride_g_t: tl.int64,
    stride_beta_b: tl.int64,
    stride_beta_t: tl.int64,
    stride_initial,
    stride_final,
    scale,
    beta_scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IS_ONE_TOKEN: tl.constexpr,
    IS_RAW_GATE: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    block = pid % (V // BLOCK_V)
    hv = (pid // (V // BLOCK_V)) % HV
    n = (pid // (V // BLOCK_V * HV)).to(tl.int64)
    h = hv // (HV // H)
    rows = block * BLOCK_V + tl.arange(0, BLOCK_V)
    # The scalar part joins the base pointer, so that a thread's addresses differ by constants.
    tile = (hv * V + block * BLOCK_V) * K
    inner = tl.arange(0, BLOCK_V)[:, None] * K + tl.arange(0, K)[None, :]
    wait_for_inputs(PDL)
    state_rows = hv * V + rows

    batch, start, length = span(cu_seqlens_ptr, n, T)
    read, write, active, keep, known = slots(read_ptr, write_ptr, has_initial_ptr, n, length, num_slots, pad_slot_id)
    o_t = o_ptr + ((batch * T + start) * HV + hv) * V + rows
    q_t = q_ptr + batch * stride_q_b + start * stride_q_t + h * stride_q_h
    k_t = k_ptr + batch * stride_k_b + start * stride_k_t + h * stride_k_h
    v_t = v_ptr + batch * stride_v_b + start * stride_v_t + hv * stride_v_h
    g_t = g_ptr + batch * stride_g_b + start * stride_g_t + hv
    beta_t = beta_ptr + batch * stride_beta_b + start * stride_beta_t + hv
    # Before the state, whose address waits for a slot; each next token is loaded before the work on its predecessor.
    token = load_token(q_t, k_t, v_t, g_t, beta_t, length > 0, rows, K)
    A_log = 0.0
    dt_bias = 0.0
    if IS_RAW_GATE:
        A_log = tl.load(A_log_ptr + hv).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + hv).to(tl.float32)

    S = tl.zeros([BLOCK_V, K], dtype=tl.float32)
    if initial_ptr is not None:
        S = tl.load(initial_ptr + (read * stride_initial + tile) + inner, mask=known, other=0.0).to(tl.float32)

    if IS_ONE_TOKEN:
        q, k, v, g, beta = prepare_token(*token, A_log, dt_bias, beta_scale, IS_RAW_GATE, USE_QK_L2NORM)
        S, o = delta_step(S, q, k, v, g, beta, scale)
        tl.store(o_t, tl.where(active, o, 0.0).to(o_ptr.dtype.element_ty))
    elif active:
        for i in range(length):
            q, k, v, g, beta = prepare_token(*token, A_log, dt_bias, beta_scale, IS_RAW_GATE, USE_QK_L2NORM)
            q_t += stride_q_t
            k_t += stride_k_t
            v_t += stride_v_t
            g_t += stride_g_t
            beta_t += stride_beta_t
            token = load_token(q_t, k_t, v_t, g_t, beta_t, i + 1 < length, rows, K)
            S, o = delta_step(S, q, k, v, g, beta, scale)
            tl.store(o_t, o.to(o_ptr.dtype.element_ty))
            o_t += HV * V
    else:
        for _ in range(length):
            tl.store(o_t, tl.zeros([BLOCK_V], dtype=o_ptr.dtype.element_ty))
            o_t += HV * V
    S = to_state(S, final_ptr.dtype.element_ty, seed_ptr, write, length - 1, state_rows, K)
    tl.store(final_ptr + (write * stride_final + tile) + inner, S, mask=keep)


@triton.jit(
    do_not_specialize=[
        *_UNSPECIALIZED,
        "num_rows",
        "num_steps",
        "stride_index",
        "stride_parent",
    ],
    do_not_specialize_on_alignment=["seed_ptr"],
)
def verify_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    A_log_ptr,
    dt_bias_ptr,
    o_ptr,
    state_ptr,
    kept_ptr,
    cu_seqlens_ptr,
    index_ptr,
    kept_index_ptr,
    accepted_ptr,
    has_initial_ptr,
    parent_ptr,
    seed_ptr,
    T: tl.int32,
    num_slots: tl.int32,
    num_rows: tl.int32,
    num_steps: tl.int32,
    pad_slot_id: tl.int32,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_g_b: tl.int64,
    stride_g_t: tl.int64,
    stride_beta_b: tl.int64,
    stride_beta_t: tl.int64,
    stride_index: tl.int64,
    stride_parent: tl.int64,
    stride_state,
    stride_kept_row,
    stride_kept_step,
    scale,
    beta_scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IS_SLOT_PER_TOKEN: tl.constexpr,
    IS_RAW_GATE: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Keeps the state after every token: in a slot of its own (IS_SLOT_PER_TOKEN), or at [row, step] of a buffer."""
    pid = tl.program_id(0)
    block = pid % (V // BLOCK_V)
    hv = (pid // (V // BLOCK_V)) % HV
    n = (pid // (V // BLOCK_V * HV)).to(tl.int64)
    h = hv // (HV // H)
    rows = block * BLOCK_V + tl.arange(0, BLOCK_V)
    # The scalar part joins the base pointer, so that a thread's addresses differ by constants.
    tile = (hv * V + block * BLOCK_V) * K
    inner = tl.arange(0, BLOCK_V)[:, None] * K + tl.arange(0, K)[None, :]
    wait_for_inputs(PDL)
    state_rows = hv * V + rows

    batch, start, length = span(cu_seqlens_ptr, n, T)
    column = n * 0
    in_range = length >= 0
    if accepted_ptr is not None:
        # a count of zero, or a stale one past the row, must not become an address
        column = tl.load(accepted_ptr + n).to(tl.int64) - 1
        in_range = (column >= 0) & (column < num_steps)
        column = tl.where(in_range, column, 0)
    read = tl.load(index_ptr + n * stride_index + column).to(tl.int64)
    active = in_range & is_slot(read, num_slots, pad_slot_id)
    known = active
    if has_initial_ptr is not None:
        known = known & (tl.load(has_initial_ptr + n) != 0)
    row = n
    if kept_index_ptr is not None:
        row = tl.load(kept_index_ptr + n).to(tl.int64)
    has_row = (row >= 0) & (row < num_rows)

    o_t = o_ptr + ((batch * T + start) * HV + hv) * V + rows
    q_t = q_ptr + batch * stride_q_b + start * stride_q_t + h * stride_q_h
    k_t = k_ptr + batch * stride_k_b + start * stride_k_t + h * stride_k_h
    v_t = v_ptr + batch * stride_v_b + start * stride_v_t + hv * stride_v_h
    g_t = g_ptr + batch * stride_g_b + start * stride_g_t + hv
    beta_t = beta_ptr + batch * stride_beta_b + start * stride_beta_t + hv
    # Before the state, whose address waits for a slot; each next token is loaded before the work on its predecessor.
    token = load_token(q_t, k_t, v_t, g_t, beta_t, length > 0, rows, K)
    A_log = 0.0
    dt_bias = 0.0
    if IS_RAW_GATE:
        A_log = tl.load(A_log_ptr + hv).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + hv).to(tl.float32)
    parent = n * 0 - 1
    if parent_ptr is not None:
        # the first has none to go on from: loaded for the others, whose address then waits for no memory
        parent = tl.load(parent_ptr + n * stride_parent, mask=(length > 0) & (num_steps > 0), other=-1).to(tl.int64)
    initial_ptrs = state_ptr + (read * stride_state + tile) + inner
    # A tree goes on from what is stored. S holds that, in its dtype, so that what a token needs can be loaded over it.
    IS_STORED: tl.constexpr = parent_ptr is not None and kept_ptr.dtype == state_ptr.dtype
    S = tl.load(initial_ptrs, mask=known, other=0.0)
    if not IS_STORED:
        S = S.to(tl.float32)

    if active:
        for i in range(length):
            if parent_ptr is not None:
                from_token = has_row & (parent >= 0) & (parent < i)
                # other threads of this program wrote what is read here
                tl.debug_barrier()
                kept = kept_ptr + (row * stride_kept_row + parent * stride_kept_step + tile) + inner
                if IS_STORED:
                    # the root at first, then the state after the token before
                    from_root = (i > 0) & (from_token == 0)
                    S = tl.load(kept, mask=from_token & (parent + 1 < i), other=S)
                    S = tl.load(initial_ptrs, mask=from_root & known, other=S)
                    if has_initial_ptr is not None:
                        S = tl.where(from_root & (known == 0), tl.zeros_like(S), S)
                else:
                    ours = tl.load(kept, mask=from_token, other=0.0).to(tl.float32)
                    root = tl.load(initial_ptrs, mask=known & (from_token == 0), other=0.0).to(tl.float32)
                    S = tl.where(from_token, ours, root)
            q, k, v, g, beta = prepare_token(*token, A_log, dt_bias, beta_scale, IS_RAW_GATE, USE_QK_L2NORM)
            q_t += stride_q_t
            k_t += stride_k_t
            v_t += stride_v_t
            g_t += stride_g_t
            beta_t += stride_beta_t
            token = load_token(q_t, k_t, v_t, g_t, beta_t, i + 1 < length, rows, K)
            if parent_ptr is not None:
                in_tree = (i + 1 < length) & (i + 1 < num_steps)
                parent = tl.load(parent_ptr + n * stride_parent + (i + 1), mask=in_tree, other=-1).to(tl.int64)
            S, o = delta_step(S.to(tl.float32), q, k, v, g, beta, scale)
            tl.store(o_t, o.to(o_ptr.dtype.element_ty))
            o_t += HV * V
            step = n * 0 + i
            if IS_SLOT_PER_TOKEN:
                slot = tl.load(index_ptr + n * stride_index + i, mask=i < num_steps, other=-1).to(tl.int64)
                keep = is_slot(slot, num_slots, pad_slot_id)
                stored = to_state(S, kept_ptr.dtype.element_ty, seed_ptr, slot, step, state_rows, K)
                tl.store(kept_ptr + (slot * stride_kept_row + tile) + inner, stored, mask=keep)
            else:
                kept = kept_ptr + (row * stride_kept_row + step * stride_kept_step + tile) + inner
                stored = to_state(S, kept_ptr.dtype.element_ty, seed_ptr, row, step, state_rows, K)
                tl.store(kept, stored, mask=has_row & (i < num_steps))
                if IS_STORED:
                    S = stored
    else:
        for _ in range(length):
            tl.store(o_t, tl.zeros([BLOCK_V], dtype=o_ptr.dtype.element_ty))
            o_t += HV * V


def batch_stride(tensor: torch.Tensor) -> int:
    """The stride of the leading dimension; 0 where it has one entry, so that it does not follow the token count."""
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


def _inputs(q, k, v, g, beta):
    return (
        *(stride for x in (q, k, v) for stride in (batch_stride(x), x.stride(1), x.stride(2))),
        *(stride for x in (g, beta) for stride in (batch_stride(x), x.stride(1))),
    )


def _output(v, cu_seqlens):
    # tokens past the last offset belong to no program
    return launch.empty(v, *v.shape) if cu_seqlens is None else launch.empty(v, *v.shape, zero=True)


def launch_recurrent(
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
    read,
    write,
    has_initial_state,
    scale,
    use_qk_l2norm,
    A_log,
    dt_bias,
    beta_scale,
    pad_slot_id,
    rounding_seed=None,
    is_one_token=False,
):
    """Launch the kernel on 4-D q, k, v. ``is_one_token``: rows of one token each, without offsets; a binary of its own,
    with the same bits."""
    batch, tokens, H, K = q.shape
    HV, V = v.shape[2:]
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    config = launch.config("recurrent", K)
    launch.run(
        recurrent_kernel,
        (count * HV * (V // config.block_v),),
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        o,
        initial,
        final,
        cu_seqlens,
        read,
        write,
        has_initial_state,
        rounding_seed,
        tokens,
        final.shape[0],
        pad_slot_id,
        *_inputs(q, k, v, g, beta),
        0 if initial is None else initial.stride(0),
        final.stride(0),
        K**-0.5 if scale is None else scale,
        beta_scale,
        config=config,
        fp_fusion=False,
        H=H,
        HV=HV,
        K=K,
        V=V,
        BLOCK_V=config.block_v,
        IS_ONE_TOKEN=is_one_token,
        IS_RAW_GATE=A_log is not None,
        USE_QK_L2NORM=use_qk_l2norm,
    )


def recurrent_gated_delta_rule(
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
    o = _output(v, cu_seqlens)
    final = launch.empty(v, count, v.shape[2], v.shape[3], q.shape[3], dtype=torch.float32)
    launch_recurrent(
        q,
        k,
        v,
        g,
        beta,
        o,
        initial_state,
        final,
        cu_seqlens=cu_seqlens,
        read=None,
        write=None,
        has_initial_state=None,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
        pad_slot_id=-1,
    )
    return o, final


def recurrent_gated_delta_rule_paged(
    q,
    k,
    v,
    g,
    beta,
    state,
    state_indices,
    *,
    cu_seqlens=None,
    write_indices=None,
    num_accepted_tokens=None,
    has_initial_state=None,
    scale=None,
    use_qk_l2norm=False,
    A_log=None,
    dt_bias=None,
    beta_scale=1.0,
    pad_slot_id=-1,
    rounding_seed=None,
):
    o = _output(v, cu_seqlens)
    options = dict(
        cu_seqlens=cu_seqlens,
        has_initial_state=has_initial_state,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
        pad_slot_id=pad_slot_id,
        rounding_seed=rounding_seed,
    )
    if state_indices.dim() == 1:
        launch_recurrent(q, k, v, g, beta, o, state, state, read=state_indices, write=write_indices, **options)
    else:
        _launch_verify(
            q,
            k,
            v,
            g,
            beta,
            o,
            state,
            state,
            state_indices,
            accepted=num_accepted_tokens,
            num_steps=state_indices.shape[1],
            **options,
        )
    return o


def _launch_verify(
    q,
    k,
    v,
    g,
    beta,
    o,
    state,
    kept,
    state_indices,
    *,
    num_steps,
    cu_seqlens,
    has_initial_state,
    scale,
    use_qk_l2norm,
    A_log,
    dt_bias,
    beta_scale,
    pad_slot_id,
    rounding_seed,
    accepted=None,
    kept_indices=None,
    parents=None,
):
    batch, tokens, H, K = q.shape
    HV, V = v.shape[2:]
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    config = launch.config("verify", K, kept.element_size())
    launch.run(
        verify_kernel,
        (count * HV * (V // config.block_v),),
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        o,
        state,
        kept,
        cu_seqlens,
        state_indices,
        kept_indices,
        accepted,
        has_initial_state,
        parents,
        rounding_seed,
        tokens,
        state.shape[0],
        kept.shape[0],
        num_steps,
        pad_slot_id,
        *_inputs(q, k, v, g, beta),
        state_indices.stride(0),
        0 if parents is None else parents.stride(0),
        state.stride(0),
        kept.stride(0),
        kept.stride(1),
        K**-0.5 if scale is None else scale,
        beta_scale,
        config=config,
        fp_fusion=False,
        H=H,
        HV=HV,
        K=K,
        V=V,
        BLOCK_V=config.block_v,
        IS_SLOT_PER_TOKEN=state_indices.dim() == 2,
        IS_RAW_GATE=A_log is not None,
        USE_QK_L2NORM=use_qk_l2norm,
    )


def recurrent_gated_delta_rule_verify(
    q,
    k,
    v,
    g,
    beta,
    state,
    intermediate_states,
    state_indices,
    *,
    intermediate_indices=None,
    cu_seqlens=None,
    parents=None,
    has_initial_state=None,
    scale=None,
    use_qk_l2norm=False,
    A_log=None,
    dt_bias=None,
    beta_scale=1.0,
    pad_slot_id=-1,
    rounding_seed=None,
):
    o = _output(v, cu_seqlens)
    _launch_verify(
        q,
        k,
        v,
        g,
        beta,
        o,
        state,
        intermediate_states,
        state_indices,
        num_steps=intermediate_states.shape[1],
        cu_seqlens=cu_seqlens,
        has_initial_state=has_initial_state,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
        pad_slot_id=pad_slot_id,
        rounding_seed=rounding_seed,
        kept_indices=intermediate_indices,
        parents=parents,
    )
    return o
