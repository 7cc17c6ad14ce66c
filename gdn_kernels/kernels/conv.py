"""Depthwise causal convolution over a packed batch, its update by a few tokens, and its form for drafts.

    y[t, d] = act(bias[d] + sum_j weight[d, j] * path[t - (W - 1) + j, d])

``path`` is the slot's window of the last W-1 columns followed by the sequence's tokens: column c >= 0 is token c,
column c < 0 is column W-1+c of the window. x ``[T, D]`` or ``[N, t, D]``, last dim contiguous; conv_state
``[S, D, L]`` with any strides, newest column last; weight ``[D, W]`` with any strides, W of 2 to 4. Sums are fp32, from
the oldest column to the newest, in all three operators alike, so that they agree bit for bit. Leaves out fp64, which
the reference covers.
"""

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels._math import is_slot, silu, stride_unit, wait_for_inputs

# Elements of a tile of columns in the update and the verify kernel: 16 a thread of four warps.
MAX_TILE = 2048


@triton.jit
def _channel_mask(row_ok, d, D: tl.constexpr, block_d: tl.constexpr):
    """Rows in range, and channels in range where D does not fill its blocks."""
    if D % block_d == 0:
        mask = row_ok[:, None]
    else:
        mask = row_ok[:, None] & (d < D)[None, :]
    return mask


@triton.jit
def _column(x_ptr, window_ptr, c, ok, use_window, d, stride_x_t, stride_w_d, stride_w_c, W: tl.constexpr):
    """Column c of each row's path, fp32 ``[rows, channels]``; zero where not ok, or in a window not used."""
    token = tl.load(x_ptr + c[:, None] * stride_x_t + d[None, :], mask=ok & (c >= 0)[:, None], other=0.0)
    offsets = (W - 1 + c)[:, None] * stride_w_c + d[None, :] * stride_w_d
    old = tl.load(window_ptr + offsets, mask=ok & ((c < 0) & use_window)[:, None], other=0.0)
    return tl.where((c >= 0)[:, None], token.to(tl.float32), old.to(tl.float32))


@triton.jit
def _tap(weight_ptr, j: tl.constexpr, d, stride_weight_d, stride_weight_w, D: tl.constexpr, block_d: tl.constexpr):
    """Weight j of each channel, fp32 ``[1, channels]``."""
    d_ok = d < D if D % block_d != 0 else None
    return tl.load(weight_ptr + d * stride_weight_d + j * stride_weight_w, mask=d_ok).to(tl.float32)[None, :]


@triton.jit
def _start(bias_ptr, d, rows: tl.constexpr, D: tl.constexpr, block_d: tl.constexpr):
    """The bias, or zero, as the accumulator ``[rows, channels]``."""
    acc = tl.zeros([rows, block_d], tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + d, mask=d < D if D % block_d != 0 else None).to(tl.float32)[None, :]
    return acc


@triton.jit
def _activated(y, activation: tl.constexpr):
    if activation is not None:
        y = silu(y)
    return y


@triton.jit
def _shift_state(
    x_ptr,
    state_ptr,
    count,
    shift,
    use_state,
    d,
    stride_x_t,
    stride_s_d,
    stride_s_c,
    D: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The state's L columns become its old ones from ``shift`` on, then the ``count`` tokens; all of it read first."""
    columns = tl.arange(0, BLOCK_L)
    token = columns - (L - count)
    is_token = (token >= 0)[:, None]
    kept = ((token < 0) & (columns + shift < L) & use_state)[:, None]
    ok = _channel_mask(columns < L, d, D, BLOCK_D)
    state = state_ptr + d[None, :] * stride_s_d
    new = tl.load(x_ptr + token[:, None] * stride_x_t + d[None, :], mask=ok & is_token, other=0.0)
    old = tl.load(state + (columns + shift)[:, None] * stride_s_c, mask=ok & kept, other=0.0)
    value = tl.where(is_token, new.to(tl.float32), old.to(tl.float32))
    # A column may move to another thread's place: every read of the program comes before its writes.
    tl.debug_barrier()
    tl.store(state + columns[:, None] * stride_s_c, value.to(state_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _edge(
    n,
    d,
    x_ptr,
    weight_ptr,
    bias_ptr,
    conv_state_ptr,
    out_ptr,
    cu_seqlens_ptr,
    state_indices_ptr,
    has_initial_state_ptr,
    T,
    num_slots,
    pad_slot_id,
    stride_x_t,
    stride_weight_d,
    stride_weight_w,
    stride_s_slot,
    stride_s_d,
    stride_s_c,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Sequence n's first W-1 outputs, which see the window, and its new state."""
    start = tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0)
    length = tl.minimum(tl.load(cu_seqlens_ptr + n + 1).to(tl.int64), T) - start
    slot = n.to(tl.int64)
    valid = slot < num_slots
    if state_indices_ptr is not None:
        slot = tl.load(state_indices_ptr + n).to(tl.int64)
        valid = is_slot(slot, num_slots, pad_slot_id)
    if valid & (length > 0):
        use_state = valid
        if has_initial_state_ptr is not None:
            use_state = tl.load(has_initial_state_ptr + n) != 0
        sequence = x_ptr + start * stride_x_t
        state = conv_state_ptr + slot * stride_s_slot

        i = tl.arange(0, BLOCK_W)
        ok = _channel_mask((i < W - 1) & (i < length), d, D, BLOCK_D)
        acc = _start(bias_ptr, d, BLOCK_W, D, BLOCK_D)
        for j in tl.static_range(W):
            c = i - (W - 1) + j
            column = _column(sequence, state, c, ok, use_state, d, stride_x_t, stride_s_d, stride_s_c, W)
            acc += _tap(weight_ptr, j, d, stride_weight_d, stride_weight_w, D, BLOCK_D) * column
        y = _activated(acc, ACTIVATION).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (start + i)[:, None] * D + d[None, :], y, mask=ok)

        _shift_state(
            sequence,
            state,
            length,
            length,
            use_state,
            d,
            stride_x_t,
            stride_s_d,
            stride_s_c,
            D,
            W - 1,
            BLOCK_W,
            BLOCK_D,
        )


@triton.jit
def _inner(
    tile,
    d,
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    cu_seqlens_ptr,
    state_indices_ptr,
    T,
    N,
    num_slots,
    pad_slot_id,
    search_steps,
    stride_x_t,
    stride_weight_d,
    stride_weight_w,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A tile of tokens: those whose columns are all in their sequence, and zeros for padding."""
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = t < T
    # The last sequence that starts at or before each token: cu_seqlens[low] <= t < cu_seqlens[high].
    low = tl.zeros([BLOCK_T], tl.int32)
    high = tl.zeros([BLOCK_T], tl.int32) + N
    for _ in range(search_steps):
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_ptr + middle, mask=in_range & (middle < N), other=0) <= t
        narrow = high - low > 1
        high = tl.where(narrow & (before == 0), middle, high)
        low = tl.where(narrow & before, middle, low)
    searched = in_range & (low < N)
    start = tl.maximum(tl.load(cu_seqlens_ptr + low, mask=searched, other=0).to(tl.int64), 0)
    end = tl.load(cu_seqlens_ptr + low + 1, mask=searched, other=0).to(tl.int64)
    valid = low < num_slots
    if state_indices_ptr is not None:
        slot = tl.load(state_indices_ptr + low, mask=searched, other=-1).to(tl.int64)
        valid = is_slot(slot, num_slots, pad_slot_id)
    token = t.to(tl.int64)
    real = searched & valid & (token >= start) & (token < end)
    inner = real & (token - start >= W - 1)

    ok = _channel_mask(inner, d, D, BLOCK_D)
    acc = _start(bias_ptr, d, BLOCK_T, D, BLOCK_D)
    for j in tl.static_range(W):
        column = tl.load(x_ptr + (token - (W - 1) + j)[:, None] * stride_x_t + d[None, :], mask=ok, other=0.0)
        acc += _tap(weight_ptr, j, d, stride_weight_d, stride_weight_w, D, BLOCK_D) * column.to(tl.float32)
    y = tl.where(inner[:, None], _activated(acc, ACTIVATION), 0.0).to(out_ptr.dtype.element_ty)
    # Real tokens that are not inner belong to an edge.
    written = _channel_mask(in_range & (inner | (real == 0)), d, D, BLOCK_D)
    tl.store(out_ptr + token[:, None] * D + d[None, :], y, mask=written)


@triton.jit(
    do_not_specialize=["T", "N", "num_slots", "pad_slot_id", "search_steps", "stride_x_t"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "state_indices_ptr", "has_initial_state_ptr"],
)
def causal_conv1d_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    conv_state_ptr,
    out_ptr,
    cu_seqlens_ptr,
    state_indices_ptr,
    has_initial_state_ptr,
    T: tl.int32,
    N: tl.int32,
    num_slots: tl.int64,
    pad_slot_id: tl.int64,
    search_steps: tl.int32,
    stride_x_t: tl.int64,
    stride_weight_d,
    stride_weight_w,
    stride_s_slot,
    stride_s_d,
    stride_s_c,
    D: tl.constexpr,
    W: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    # The first N programs of each channel block take a sequence's edge each, the others a tile of tokens: only one
    # program reads and writes a state, and no program waits for another.
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    part = program // D_BLOCKS
    d = (program % D_BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    stride_t = stride_x_t * STRIDE_UNIT
    if part < N:
        _edge(
            part,
            d,
            x_ptr,
            weight_ptr,
            bias_ptr,
            conv_state_ptr,
            out_ptr,
            cu_seqlens_ptr,
            state_indices_ptr,
            has_initial_state_ptr,
            T,
            num_slots,
            pad_slot_id,
            stride_t,
            stride_weight_d,
            stride_weight_w,
            stride_s_slot,
            stride_s_d,
            stride_s_c,
            D,
            W,
            BLOCK_D,
            BLOCK_W,
            ACTIVATION,
        )
    else:
        _inner(
            part - N,
            d,
            x_ptr,
            weight_ptr,
            bias_ptr,
            out_ptr,
            cu_seqlens_ptr,
            state_indices_ptr,
            T,
            N,
            num_slots,
            pad_slot_id,
            search_steps,
            stride_t,
            stride_weight_d,
            stride_weight_w,
            D,
            W,
            BLOCK_T,
            BLOCK_D,
            ACTIVATION,
        )


@triton.jit(
    do_not_specialize=["num_slots", "pad_slot_id", "stride_x_n", "stride_x_t"],
    do_not_specialize_on_alignment=["state_indices_ptr", "num_accepted_tokens_ptr"],
)
def causal_conv1d_update_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    conv_state_ptr,
    out_ptr,
    state_indices_ptr,
    num_accepted_tokens_ptr,
    num_slots: tl.int64,
    pad_slot_id: tl.int64,
    stride_x_n: tl.int64,
    stride_x_t: tl.int64,
    stride_weight_d,
    stride_weight_w,
    stride_s_slot,
    stride_s_d,
    stride_s_c,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    n = (program // D_BLOCKS).to(tl.int64)
    d = (program % D_BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    stride_t = stride_x_t * STRIDE_UNIT
    slot = n
    valid = slot < num_slots
    if state_indices_ptr is not None:
        slot = tl.load(state_indices_ptr + n).to(tl.int64)
        valid = is_slot(slot, num_slots, pad_slot_id)
    # Column of the state where the window starts, and how far its columns move.
    first = 0
    shift = TOKENS
    if num_accepted_tokens_ptr is not None:
        shift = tl.load(num_accepted_tokens_ptr + n).to(tl.int64)
        first = shift - 1
        valid = valid & (first >= 0) & (first + W - 1 <= L)

    sequence = x_ptr + n * (stride_x_n * STRIDE_UNIT)
    state = conv_state_ptr + slot * stride_s_slot
    i = tl.arange(0, BLOCK_TOKENS)
    in_range = i < TOKENS
    ok = _channel_mask(in_range & valid, d, D, BLOCK_D)
    acc = _start(bias_ptr, d, BLOCK_TOKENS, D, BLOCK_D)
    for j in tl.static_range(W):
        c = i - (W - 1) + j
        column = _column(sequence, state + first * stride_s_c, c, ok, valid, d, stride_t, stride_s_d, stride_s_c, W)
        acc += _tap(weight_ptr, j, d, stride_weight_d, stride_weight_w, D, BLOCK_D) * column
    y = tl.where(valid, _activated(acc, ACTIVATION), 0.0).to(out_ptr.dtype.element_ty)
    out = out_ptr + (n * TOKENS + i)[:, None] * D + d[None, :]
    tl.store(out, y, mask=_channel_mask(in_range, d, D, BLOCK_D))

    if valid:
        _shift_state(sequence, state, TOKENS, shift, valid, d, stride_t, stride_s_d, stride_s_c, D, L, BLOCK_L, BLOCK_D)


@triton.jit(
    do_not_specialize=["num_slots", "num_buffers", "pad_slot_id", "stride_x_n", "stride_x_t", "stride_p_n"],
    do_not_specialize_on_alignment=["state_indices_ptr", "intermediate_indices_ptr", "parents_ptr"],
)
def causal_conv1d_verify_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    conv_state_ptr,
    windows_ptr,
    out_ptr,
    state_indices_ptr,
    intermediate_indices_ptr,
    parents_ptr,
    num_slots: tl.int64,
    num_buffers: tl.int64,
    pad_slot_id: tl.int64,
    stride_x_n: tl.int64,
    stride_x_t: tl.int64,
    stride_weight_d,
    stride_weight_w,
    stride_s_slot,
    stride_s_d,
    stride_s_c,
    stride_w_m,
    stride_w_t,
    stride_w_d,
    stride_w_c,
    stride_p_n: tl.int64,
    stride_p_t,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    n = (program // D_BLOCKS).to(tl.int64)
    d = (program % D_BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    stride_t = stride_x_t * STRIDE_UNIT
    slot = n
    valid = slot < num_slots
    if state_indices_ptr is not None:
        slot = tl.load(state_indices_ptr + n).to(tl.int64)
        valid = is_slot(slot, num_slots, pad_slot_id)
    m = n
    if intermediate_indices_ptr is not None:
        m = tl.load(intermediate_indices_ptr + n).to(tl.int64)
    stored = valid & (m >= 0) & (m < num_buffers)

    sequence = x_ptr + n * (stride_x_n * STRIDE_UNIT)
    state = conv_state_ptr + slot * stride_s_slot
    i = tl.arange(0, BLOCK_TOKENS)
    in_range = i < TOKENS
    ok = _channel_mask(in_range & valid, d, D, BLOCK_D)
    windows = windows_ptr + m * stride_w_m + i.to(tl.int64)[:, None] * stride_w_t + d[None, :] * stride_w_d
    acc = _start(bias_ptr, d, BLOCK_TOKENS, D, BLOCK_D)
    for j in tl.static_range(W):
        # The path column that many steps before each token; below zero it counts back through the window.
        c = i
        for _ in tl.static_range(W - 1 - j):
            if parents_ptr is None:
                c = c - 1
            else:
                parents = parents_ptr + n * stride_p_n + c * stride_p_t
                parent = tl.load(parents, mask=in_range & valid & (c >= 0), other=-1).to(tl.int32)
                parent = tl.where((parent >= 0) & (parent < c), parent, -1)
                c = tl.where(c >= 0, parent, c - 1)
        column = _column(sequence, state, c, ok, valid, d, stride_t, stride_s_d, stride_s_c, W)
        if j > 0:
            kept = column.to(windows_ptr.dtype.element_ty)
            tl.store(windows + (j - 1) * stride_w_c, kept, mask=ok & stored)
        acc += _tap(weight_ptr, j, d, stride_weight_d, stride_weight_w, D, BLOCK_D) * column
    y = tl.where(valid, _activated(acc, ACTIVATION), 0.0).to(out_ptr.dtype.element_ty)
    out = out_ptr + (n * TOKENS + i)[:, None] * D + d[None, :]
    tl.store(out, y, mask=_channel_mask(in_range, d, D, BLOCK_D))


def _x_strides(x: torch.Tensor) -> tuple[int, list[int]]:
    """Stride unit, and the strides of x but the last in it; a dimension of size 1 says nothing about alignment."""
    strides = [stride if size != 1 else 0 for size, stride in zip(x.shape[:-1], x.stride(), strict=False)]
    unit = stride_unit(x.element_size(), x.shape[-1], *strides)
    return unit, [stride // unit for stride in strides]


def _block_d(config: launch.ConvConfig, D: int, block_rows: int) -> int:
    """Channels of a tile of ``block_rows`` rows: those of the configuration, fewer where registers would run out."""
    return min(config.block_d, triton.next_power_of_2(D), max(MAX_TILE // block_rows, 16))


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> torch.Tensor:
    T, D = x.shape
    N, W = cu_seqlens.shape[0] - 1, weight.shape[1]
    out = launch.empty(x, T, D)
    if T == 0:
        return out
    unit, strides = _x_strides(x)

    config = launch.config("causal_conv1d")
    block_d = min(config.block_d, triton.next_power_of_2(D))
    launch.run(
        causal_conv1d_kernel,
        ((N + triton.cdiv(T, config.block_t)) * triton.cdiv(D, block_d),),
        x,
        weight,
        bias,
        conv_state,
        out,
        cu_seqlens,
        state_indices,
        has_initial_state,
        T,
        N,
        conv_state.shape[0],
        pad_slot_id,
        N.bit_length(),
        *strides,
        *weight.stride(),
        *conv_state.stride(),
        config=config,
        D=D,
        W=W,
        STRIDE_UNIT=unit,
        BLOCK_T=config.block_t,
        BLOCK_D=block_d,
        BLOCK_W=triton.next_power_of_2(W - 1),
        ACTIVATION=None if activation is None else "silu",
    )
    return out


def causal_conv1d_update(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    *,
    state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> torch.Tensor:
    out = launch.empty(x, *x.shape)
    if x.dim() == 2:
        x = launch.view(x.unsqueeze(1), x)
    N, tokens, D = x.shape
    W, L = weight.shape[1], conv_state.shape[2]
    if tokens == 0:
        return out
    unit, strides = _x_strides(x)

    config = launch.config("causal_conv1d_update")
    block_l = triton.next_power_of_2(L)
    block_d = _block_d(config, D, max(block_l, triton.next_power_of_2(tokens)))
    launch.run(
        causal_conv1d_update_kernel,
        (N * triton.cdiv(D, block_d),),
        x,
        weight,
        bias,
        conv_state,
        out,
        state_indices,
        num_accepted_tokens,
        conv_state.shape[0],
        pad_slot_id,
        *strides,
        *weight.stride(),
        *conv_state.stride(),
        config=config,
        TOKENS=tokens,
        D=D,
        W=W,
        L=L,
        STRIDE_UNIT=unit,
        BLOCK_TOKENS=triton.next_power_of_2(tokens),
        BLOCK_D=block_d,
        BLOCK_L=block_l,
        ACTIVATION=None if activation is None else "silu",
    )
    return out


def causal_conv1d_verify(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    intermediate_windows: torch.Tensor,
    *,
    state_indices: torch.Tensor | None = None,
    intermediate_indices: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> torch.Tensor:
    N, tokens, D = x.shape
    out = launch.empty(x, N, tokens, D)
    if tokens == 0:
        return out
    unit, strides = _x_strides(x)

    config = launch.config("causal_conv1d_update")
    block_d = _block_d(config, D, triton.next_power_of_2(tokens))
    launch.run(
        causal_conv1d_verify_kernel,
        (N * triton.cdiv(D, block_d),),
        x,
        weight,
        bias,
        conv_state,
        intermediate_windows,
        out,
        state_indices,
        intermediate_indices,
        parents,
        conv_state.shape[0],
        intermediate_windows.shape[0],
        pad_slot_id,
        *strides,
        *weight.stride(),
        *conv_state.stride(),
        *intermediate_windows.stride(),
        *((0, 0) if parents is None else parents.stride()),
        config=config,
        TOKENS=tokens,
        D=D,
        W=weight.shape[1],
        STRIDE_UNIT=unit,
        BLOCK_TOKENS=triton.next_power_of_2(tokens),
        BLOCK_D=block_d,
        ACTIVATION=None if activation is None else "silu",
    )
    return out
