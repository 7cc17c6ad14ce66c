"""``decode_step`` on a GPU: conv update, gate, l2norm, recurrence and gated norm of one token a sequence, one kernel.

    q | k | v = act(conv(window | x)), rounded to the dtype of x;   q, k <- q / |q|, k / |k|
    S <- exp(g) S;   S <- S + beta (v - S k) k^T;   o = scale S q, rounded to the dtype of x;   y = norm(o) * w * act(z)

and the same with the e4m3 store of the norm. mixed_qkv ``[N, D]``, conv_state ``[S, D, W - 1]`` of any strides, state
``[S, HV, V, K]``, z and out ``[N, HV, V]``. Bit for bit causal_conv1d_update, packed_decode and layer_norm_gated in
sequence: the formulas are theirs, sums have one order everywhere (``row_sum``), and no product is fused that theirs do
not fuse.

One program takes a sequence and a key head with all its value heads: conv windows are shifted in place, so who reads
the channels of q and k has to be the one who writes them. Each channel is convolved once and handed to all warps by
``mixed``, a tensor of the call: left to registers, the compiler has each warp convolve what it needs. Leaves out fp64,
which the reference covers.
"""

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels._math import (
    gate,
    inv_l2norm,
    is_slot,
    row_sum,
    sigmoid,
    silu,
    stride_unit,
    to_state,
    wait_for_inputs,
)
from gdn_kernels.kernels.norm import gated, parameter, scaled, store_tile
from gdn_kernels.kernels.recurrent import L2NORM_EPS, delta_step


@triton.jit
def _token(state, inner, rows, tile, values, q, k, g, beta, scale, valid, seed_ptr, slot, token, GROUPS: tl.constexpr):
    """One token on a tile of the state, stored back; its outputs. q and k stand once for each of GROUPS rows, which are
    those that the warps hold side by side: as parts of S they need no exchange."""
    P: tl.constexpr = tile.shape[0] // GROUPS
    S = tl.reshape(tile.to(tl.float32), [P, GROUPS, tile.shape[1]])
    v = tl.load(values + tl.arange(0, GROUPS)[:, None] * P + tl.arange(0, P)[None, :])
    S, o = delta_step(S, q, k, tl.trans(v).to(tl.float32), g, beta, scale)
    S = tl.reshape(S, [tile.shape[0], tile.shape[1]])
    S = to_state(S, state.dtype.element_ty, seed_ptr, slot, token, rows, tile.shape[1])
    tl.store(state + inner, S, mask=valid)
    return tl.reshape(tl.trans(o), [tile.shape[0]])


@triton.jit(
    do_not_specialize=["num_slots", "pad_slot_id", "stride_x", "stride_a", "stride_b", "stride_z_n"],
    do_not_specialize_on_alignment=["a_ptr", "b_ptr", "state_indices_ptr", "seed_ptr"],
)
def decode_step_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    z_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    conv_state_ptr,
    A_log_ptr,
    dt_bias_ptr,
    state_ptr,
    norm_weight_ptr,
    state_indices_ptr,
    seed_ptr,
    mixed_ptr,
    out_ptr,
    scales_ptr,
    num_slots: tl.int64,
    pad_slot_id: tl.int64,
    stride_x: tl.int64,
    stride_a: tl.int64,
    stride_b: tl.int64,
    stride_z_n: tl.int64,
    stride_z_h,
    stride_weight_d,
    stride_weight_w,
    stride_s_slot,
    stride_s_d,
    stride_s_c,
    stride_state,
    scale,
    eps,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    CONV_ACTIVATION: tl.constexpr,
    NORM_ACTIVATION: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    R: tl.constexpr = HV // H
    D: tl.constexpr = 2 * H * K + HV * V
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    h = tl.program_id(0) % H
    n = (tl.program_id(0) // H).to(tl.int64)
    # the channels of q, k and of the R value heads
    c = tl.arange(0, BLOCK_C)
    d = tl.where(c < 2 * K, tl.where(c < K, h * K, H * K + h * K - K), 2 * H * K + h * R * V - 2 * K) + c
    is_channel = c < 2 * K + R * V
    columns = tl.arange(0, K)[None, :] + tl.zeros([GROUPS, K], tl.int32)
    # A thread's rows follow one another, so that their values are one load.
    rows = tl.arange(0, BLOCK_V) % GROUPS * (BLOCK_V // GROUPS) + tl.arange(0, BLOCK_V) // GROUPS
    inner = rows[:, None] * K + tl.arange(0, K)[None, :]

    wait_for_inputs(PDL)
    slot = tl.load(state_indices_ptr + n).to(tl.int64)
    x = tl.load(x_ptr + n * (stride_x * STRIDE_UNIT) + d, mask=is_channel, other=0.0)
    valid = is_slot(slot, num_slots, pad_slot_id)
    window = conv_state_ptr + slot * stride_s_slot + d * stride_s_d
    known = is_channel & valid
    state = state_ptr + slot * stride_state + h * (R * V * K)
    # Windows come first, they are needed first; then as much of the state as is to be in flight at once.
    acc = tl.zeros([BLOCK_C], tl.float32)
    if conv_bias_ptr is not None:
        acc += tl.load(conv_bias_ptr + d, mask=is_channel, other=0.0).to(tl.float32)
    old = ()
    taps = ()
    for j in tl.static_range(W):
        tap = conv_weight_ptr + d * stride_weight_d + j * stride_weight_w
        taps = taps + (tl.load(tap, mask=is_channel, other=0.0).to(tl.float32),)
        if j < W - 1:
            old = old + (tl.load(window + j * stride_s_c, mask=known, other=0.0).to(tl.float32),)
    old = old + (x.to(tl.float32),)
    tiles = ()
    for i in tl.static_range(AHEAD):
        tiles = tiles + (tl.load(state + i * V * K + inner, mask=valid, other=0.0),)

    for j in tl.static_range(W):
        acc = tl.fma(taps[j], old[j], acc)
    if CONV_ACTIVATION is not None:
        acc = silu(acc)
    mixed = mixed_ptr + n * D
    tl.store(mixed + d, acc.to(dtype), mask=is_channel)
    # Other threads of this program read what is written here, and have read what is written below.
    tl.debug_barrier()
    for j in tl.static_range(W - 1):
        tl.store(window + j * stride_s_c, old[j + 1].to(conv_state_ptr.dtype.element_ty), mask=known)

    q = tl.load(mixed + h * K + columns).to(tl.float32)
    k = tl.load(mixed + H * K + h * K + columns).to(tl.float32)
    if USE_QK_L2NORM:
        q = q * inv_l2norm(row_sum(q * q), L2NORM_EPS)[:, None]
        k = k * inv_l2norm(row_sum(k * k), L2NORM_EPS)[:, None]

    heads = tl.arange(0, NORM_ROWS)
    cols = tl.arange(0, V)
    head_ok = (heads < R)[:, None]
    z_rows = z_ptr + n * (stride_z_n * STRIDE_UNIT) + ((h * R + heads) * (stride_z_h * STRIDE_UNIT))[:, None]
    z = tl.load(z_rows + cols[None, :], mask=head_ok, other=0.0).to(tl.float32)
    weight = parameter(norm_weight_ptr, cols, head_ok & (cols < V)[None, :])
    u = tl.zeros([NORM_ROWS, V], tl.float32)
    for i in tl.static_range(R):
        hv = h * R + i
        a = tl.load(a_ptr + n * stride_a + hv).to(tl.float32)
        b = tl.load(b_ptr + n * stride_b + hv).to(tl.float32)
        g = gate(a, tl.load(A_log_ptr + hv).to(tl.float32), tl.load(dt_bias_ptr + hv).to(tl.float32))
        beta = sigmoid(b)
        values = mixed + 2 * H * K + hv * V
        if BLOCK_V == V:
            head = state + i * V * K
            state_rows = hv * V + rows
            o = _token(
                head, inner, state_rows, tiles[i], values, q, k, g, beta, scale, valid, seed_ptr, slot, n * 0, GROUPS
            )
            if i + AHEAD < R:
                tiles = tiles + (tl.load(head + AHEAD * V * K + inner, mask=valid, other=0.0),)
        else:
            parts = tl.arange(0, V // BLOCK_V)[:, None]
            all_o = tl.zeros([V // BLOCK_V, BLOCK_V], tl.float32)
            for part in range(V // BLOCK_V):
                block = state + (i * V + part * BLOCK_V) * K
                tile = tl.load(block + inner, mask=valid, other=0.0)
                state_rows = hv * V + part * BLOCK_V + rows
                some_v = values + part * BLOCK_V
                part_o = _token(
                    block, inner, state_rows, tile, some_v, q, k, g, beta, scale, valid, seed_ptr, slot, n * 0, GROUPS
                )
                all_o = tl.where(parts == part, part_o[None, :], all_o)
            o = tl.reshape(all_o, [V])
        u = tl.where((heads == i)[:, None], o.to(dtype).to(tl.float32)[None, :], u)

    # No bit of u changes; but tied to z it is laid out as z was loaded, so that its sums stay within a warp.
    nothing = (z.to(tl.uint32, bitcast=True) >> 31) >> 1
    u = (tl.where(valid, u, 0.0).to(tl.uint32, bitcast=True) | nothing).to(tl.float32, bitcast=True)
    u, act = gated(u, z, NORM_ACTIVATION, NORM_BEFORE_GATE)
    y = scaled(u * inv_l2norm(row_sum(u * u) * (1.0 / V), eps)[:, None], weight, None, act, dtype)
    row = (n * HV + h * R + heads)[:, None]
    out_rows = out_ptr + row * V
    scale_rows = scales_ptr + row * (V // 128) if scales_ptr is not None else None
    store_tile(out_rows, scale_rows, y, 0, heads < R, head_ok, V, V)


def _launch(
    mixed_qkv,
    a,
    b,
    z,
    conv_weight,
    conv_bias,
    conv_state,
    A_log,
    dt_bias,
    state,
    norm_weight,
    state_indices,
    out,
    scales=None,
    *,
    num_k_heads,
    norm_before_gate,
    scale=None,
    use_qk_l2norm=True,
    eps=1e-6,
    conv_activation="silu",
    norm_activation="silu",
    pad_slot_id=-1,
    rounding_seed=None,
):
    """Both operators' launch, with their arguments and defaults."""
    N, D = mixed_qkv.shape
    HV, V, K = state.shape[1:]
    H, W = num_k_heads, conv_weight.shape[1]
    target = launch.target(mixed_qkv.device)
    config = launch.config("decode_step", K, V, target)
    lanes = 64 if target.backend == "hip" else 32
    threads = lanes * config.num_warps
    # Rows of K that all threads hold at 16 bytes each, and rows of V likewise: a row lies in one warp (fp32 rows of 256
    # in two), and q, k and z in the same registers as the rows they meet.
    groups = min(config.block_v, max(1, threads * 16 // (K * state.element_size())))
    norm_rows = max(triton.next_power_of_2(HV // H), threads * 16 // (V * mixed_qkv.element_size()))
    # a dimension of size 1 says nothing about alignment
    stride_x, stride_z_n = (tensor.stride(0) if N != 1 else 0 for tensor in (mixed_qkv, z))
    unit = stride_unit(mixed_qkv.element_size(), stride_x, stride_z_n, z.stride(1))
    launch.run(
        decode_step_kernel,
        (N * H,),
        mixed_qkv,
        a,
        b,
        z,
        conv_weight,
        conv_bias,
        conv_state,
        A_log,
        dt_bias,
        state,
        norm_weight,
        state_indices,
        rounding_seed,
        launch.empty(mixed_qkv, N, D),
        out,
        scales,
        state.shape[0],
        pad_slot_id,
        stride_x // unit,
        a.stride(0),
        b.stride(0),
        stride_z_n // unit,
        z.stride(1) // unit,
        *conv_weight.stride(),
        *conv_state.stride(),
        state.stride(0),
        K**-0.5 if scale is None else scale,
        float(eps),
        config=config,
        fp_fusion=False,
        H=H,
        HV=HV,
        K=K,
        V=V,
        W=W,
        STRIDE_UNIT=unit,
        BLOCK_C=triton.next_power_of_2(2 * K + HV // H * V),
        BLOCK_V=config.block_v,
        GROUPS=groups,
        AHEAD=min(config.ahead, HV // H) if config.block_v == V else 0,
        NORM_ROWS=norm_rows,
        CONV_ACTIVATION=None if conv_activation is None else "silu",
        NORM_ACTIVATION="sigmoid" if norm_activation == "sigmoid" else "silu",
        NORM_BEFORE_GATE=norm_before_gate,
        USE_QK_L2NORM=use_qk_l2norm,
    )


def decode_step(mixed_qkv, a, b, z, *others, **options):
    out = launch.empty(mixed_qkv, *z.shape)
    _launch(mixed_qkv, a, b, z, *others, out, **options)
    return out


def decode_step_fp8(mixed_qkv, a, b, z, *others, quant_group_size=128, **options):
    values = launch.empty(mixed_qkv, *z.shape, dtype=torch.float8_e4m3fn)
    scales = launch.empty(mixed_qkv, z.shape[0], z.shape[1:].numel() // quant_group_size, dtype=torch.float32)
    _launch(mixed_qkv, a, b, z, *others, values, scales, **options)
    return values, scales
