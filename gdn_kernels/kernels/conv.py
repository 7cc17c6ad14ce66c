"""Depthwise causal convolution over a packed batch, its update by a few tokens, and its form for drafts.

    y[t, d] = act(bias[d] + sum_j weight[d, j] * path[t - (W - 1) + j, d])

``path`` is the slot's window of the last W-1 columns followed by the sequence's tokens: column c >= 0 is token c,
column c < 0 is column W-1+c of the window. x ``[T, D]`` or ``[N, t, D]``, last dim contiguous; conv_state
``[S, D, L]`` with any strides, newest column last; weight ``[D, W]`` with any strides, W of 2 to 4. Sums are fp32, from
the oldest column to the newest, in all three operators alike, so that they agree bit for bit. Leaves out fp64, which
the reference covers.

A program holds a block of channels and walks along time: each column is a vector that is loaded once and serves W
outputs from registers.
"""

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels._math import is_slot, silu, stride_unit, wait_for_inputs

# Elements of the columns that a program of the update and the verify kernel holds: 64 a thread of four warps.
MAX_TILE = 8192


@triton.jit
def _taps(weight_ptr, d, d_ok, stride_weight_d, stride_weight_w, W: tl.constexpr, WORDS: tl.constexpr):
    """The W weights of each channel, oldest column first, fp32."""
    taps = ()
    if WORDS:
        # A row of W 16-bit weights is one integer, so a thread loads its channels' weights 16 bytes at a time.
        rows = tl.load(weight_ptr.to(tl.pointer_type(tl.int64 if W == 4 else tl.int32)) + d, mask=d_ok)
        for j in tl.static_range(W):
            tap = (rows >> (16 * j)).to(tl.int16).to(weight_ptr.dtype.element_ty, bitcast=True)
            taps += (tap.to(tl.float32),)
    else:
        for j in tl.static_range(W):
            tap = tl.load(weight_ptr + d * stride_weight_d + j * stride_weight_w, mask=d_ok)
            taps += (tap.to(tl.float32),)
    return taps


@triton.jit
def _bias(bias_ptr, d, d_ok, BLOCK_D: tl.constexpr):
    """The bias of each channel, or zero: what the sums start from."""
    start = tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        start += tl.load(bias_ptr + d, mask=d_ok).to(tl.float32)
    return start


@triton.jit
def _fp32(columns):
    """The columns converted."""
    converted = ()
    for k in tl.static_range(len(columns)):
        converted += (columns[k].to(tl.float32),)
    return converted


@triton.jit
def _output(columns, first: tl.constexpr, taps, bias, W: tl.constexpr, ACTIVATION: tl.constexpr):
    """The output of the token whose W columns are those from ``first`` on, fp32."""
    y = bias
    for j in tl.static_range(W):
        y = tl.fma(taps[j], columns[first + j].to(tl.float32), y)
    if ACTIVATION is not None:
        y = silu(y)
    return y


@triton.jit
def _column(
    x_ptr,
    window_ptr,
    c,
    ok,
    d,
    stride_x_t,
    stride_w_d,
    stride_w_c,
    W: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Column c of a path, fp32; zero where not ok."""
    ok = ((d < D) | (D % BLOCK_D == 0)) & ok
    token = tl.load(x_ptr + c * stride_x_t + d, mask=ok & (c >= 0), other=0.0).to(tl.float32)
    old = tl.load(window_ptr + (W - 1 + c) * stride_w_c + d * stride_w_d, mask=ok & (c < 0), other=0.0).to(tl.float32)
    return tl.where(c >= 0, token, old)


@triton.jit
def _flat(block, W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of the windows ``[channels, W-1]`` of a block of channels that lie in one piece, and which to take."""
    PADDED: tl.constexpr = 4 if W == 4 else W - 1
    e = tl.arange(0, BLOCK_D * PADDED)
    offsets = block * (BLOCK_D * (W - 1)) + e
    return offsets, (e < BLOCK_D * (W - 1)) & ((offsets < D * (W - 1)) | (D % BLOCK_D == 0))


@triton.jit
def _load_window(
    ptr, block, d, ok, stride_d, stride_c, W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FLAT: tl.constexpr
):
    """The W-1 columns at ``ptr``, fp32, zero where not ok (of the whole window, or of each channel)."""
    columns = ()
    if FLAT:
        # Loaded 16 bytes at a time and turned in shared memory: a column by itself is 2 bytes here and there.
        offsets, inside = _flat(block, W, D, BLOCK_D)
        window = tl.load(ptr + offsets, mask=inside & ok, other=0.0)
        for c in tl.static_range(W - 1):
            columns += (tl.gather(window, tl.arange(0, BLOCK_D) * (W - 1) + c, 0).to(tl.float32),)
    else:
        d_ok = (d < D) | (D % BLOCK_D == 0)
        for c in tl.static_range(W - 1):
            columns += (tl.load(ptr + c * stride_c + d * stride_d, mask=d_ok & ok, other=0.0).to(tl.float32),)
    return columns


@triton.jit
def _store_window(
    ptr,
    columns,
    first: tl.constexpr,
    block,
    d,
    ok,
    stride_d,
    stride_c,
    W: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Store the W-1 columns from ``first`` on as a window."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if FLAT:
        offsets, inside = _flat(block, W, D, BLOCK_D)
        old, new = columns[first].to(dtype), columns[first + W - 2].to(dtype)
        if W == 3:
            window = tl.reshape(tl.join(old, new), [2 * BLOCK_D])
        else:
            middle = columns[first + 1].to(dtype)
            padded = tl.reshape(tl.join(tl.join(old, new), tl.join(middle, new)), [4 * BLOCK_D])
            e = tl.minimum(tl.arange(0, 4 * BLOCK_D), 3 * BLOCK_D - 1)  # a gather has no mask
            window = tl.gather(padded, e // 3 * 4 + e % 3, 0)
        tl.store(ptr + offsets, window, mask=inside & ok)
    else:
        d_ok = (d < D) | (D % BLOCK_D == 0)
        for c in tl.static_range(W - 1):
            tl.store(ptr + c * stride_c + d * stride_d, columns[first + c].to(dtype), mask=d_ok & ok)


@triton.jit
def _edge(
    n,
    block,
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
    WORDS: tl.constexpr,
    FLAT: tl.constexpr,
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
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        d_ok = (d < D) | (D % BLOCK_D == 0)
        sequence = x_ptr + start * stride_x_t + d
        state = conv_state_ptr + slot * stride_s_slot
        taps = _taps(weight_ptr, d, d_ok, stride_weight_d, stride_weight_w, W, WORDS)
        bias = _bias(bias_ptr, d, d_ok, BLOCK_D)
        window = _load_window(state, block, d, use_state, stride_s_d, stride_s_c, W, D, BLOCK_D, FLAT)

        columns = window
        for k in tl.static_range(W - 1):
            columns += (tl.load(sequence + tl.minimum(length - 1, k) * stride_x_t, mask=d_ok),)
        for k in tl.static_range(W - 1):
            y = _output(columns, k, taps, bias, W, ACTIVATION).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (start + k) * D + d, y, mask=d_ok & (k < length))

        last = ()
        for k in tl.static_range(W - 1):
            c = length - (W - 1) + k
            column = tl.load(sequence + tl.maximum(c, 0) * stride_x_t, mask=d_ok).to(tl.float32)
            for old in tl.static_range(k + 1, W - 1):
                column = tl.where(c == old - (W - 1), window[old], column)
            last += (column,)
        # Another thread's channels may lie in what this one stores: every read of the program comes before its writes.
        tl.debug_barrier()
        _store_window(state, last, 0, block, d, valid, stride_s_d, stride_s_c, W, D, BLOCK_D, FLAT)


@triton.jit
def _inner(
    run,
    block,
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
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORDS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A run of tokens: those whose columns are all in their sequence, and zeros for padding."""
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = (d < D) | (D % BLOCK_D == 0)
    first = run * BLOCK_T
    # The first loads are under way before the search for the run's sequences. Rows outside x serve no output.
    window = ()
    for k in tl.static_range(1 - W, 0):
        row = tl.maximum(first + k, 0).to(tl.int64)
        window += (tl.load(x_ptr + row * stride_x_t + d, mask=d_ok),)
    ahead = ()
    for k in tl.static_range(GROUP):
        row = tl.minimum(first + k, T - 1).to(tl.int64)
        ahead += (tl.load(x_ptr + row * stride_x_t + d, mask=d_ok),)
    taps = _taps(weight_ptr, d, d_ok, stride_weight_d, stride_weight_w, W, WORDS)
    bias = _bias(bias_ptr, d, d_ok, BLOCK_D)

    i = tl.arange(0, BLOCK_T)
    t = first + i
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
    real = searched & valid & (t >= start) & (t < end)
    inner = real & (t - start >= W - 1)
    # One bit a token, which every thread of the run can read. Real tokens that are not inner belong to an edge.
    inner_bits = tl.sum(inner.to(tl.int32) << i, 0)
    padding_bits = tl.sum((in_range & (real == 0)).to(tl.int32) << i, 0)

    out = out_ptr + first.to(tl.int64) * D + d
    window = _fp32(window)
    for done in range(0, BLOCK_T, GROUP):
        columns = window + _fp32(ahead)
        ahead = ()
        for k in tl.static_range(GROUP):
            row = tl.minimum(first + done + GROUP + k, T - 1).to(tl.int64)
            ahead += (tl.load(x_ptr + row * stride_x_t + d, mask=d_ok & (done + GROUP < BLOCK_T)),)
        for k in tl.static_range(GROUP):
            y = _output(columns, k, taps, bias, W, ACTIVATION).to(out_ptr.dtype.element_ty)
            tl.store(out + (done + k) * D, y, mask=d_ok & ((inner_bits >> (done + k)) & 1 != 0))
        window = columns[GROUP:]
    if padding_bits != 0:
        zeros = tl.zeros([BLOCK_D], out_ptr.dtype.element_ty)
        for token in range(BLOCK_T):
            tl.store(out + token * D, zeros, mask=d_ok & ((padding_bits >> token) & 1 != 0))


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
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORDS: tl.constexpr,
    FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    # The first N programs of each channel block take a sequence's edge each, the others a run of tokens: only one
    # program reads and writes a state, and no program waits for another.
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    part, block = program // D_BLOCKS, program % D_BLOCKS
    stride_t = stride_x_t * STRIDE_UNIT
    wait_for_inputs(PDL)
    if part < N:
        _edge(
            part,
            block,
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
            WORDS,
            FLAT,
            ACTIVATION,
        )
    else:
        _inner(
            part - N,
            block,
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
            GROUP,
            BLOCK_D,
            WORDS,
            ACTIVATION,
        )


@triton.jit(
    do_not_specialize=["num_slots", "pad_slot_id", "stride_index", "stride_x_n", "stride_x_t"],
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
    stride_index: tl.int64,
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
    BLOCK_D: tl.constexpr,
    WORDS: tl.constexpr,
    FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    n, block = (program // D_BLOCKS).to(tl.int64), program % D_BLOCKS
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = (d < D) | (D % BLOCK_D == 0)
    sequence = x_ptr + n * (stride_x_n * STRIDE_UNIT) + d
    wait_for_inputs(PDL)

    slot = n
    valid = slot < num_slots
    if state_indices_ptr is not None:
        slot = tl.load(state_indices_ptr + n * stride_index).to(tl.int64)
        valid = is_slot(slot, num_slots, pad_slot_id)
    # Column of the state where the window starts.
    first = 0
    if num_accepted_tokens_ptr is not None:
        first = tl.load(num_accepted_tokens_ptr + n).to(tl.int64) - 1
        valid = valid & (first >= 0) & (first + W - 1 <= L)
    # These loads do not wait for the slot: a padding row's tokens are read, and not used.
    tokens = ()
    for k in tl.static_range(TOKENS):
        tokens += (tl.load(sequence + k * (stride_x_t * STRIDE_UNIT), mask=d_ok).to(tl.float32),)
    taps = _taps(weight_ptr, d, d_ok, stride_weight_d, stride_weight_w, W, WORDS)
    bias = _bias(bias_ptr, d, d_ok, BLOCK_D)

    state = conv_state_ptr + slot * stride_s_slot
    window = _load_window(state + first * stride_s_c, block, d, valid, stride_s_d, stride_s_c, W, D, BLOCK_D, FLAT)
    columns = window + tokens
    # Where drafts are given and the state is longer than they need, it keeps columns past the window too.
    kept = window
    if num_accepted_tokens_ptr is not None:
        for k in tl.static_range(W - 1, L + 1 - TOKENS):
            column = state + (first + k) * stride_s_c + d * stride_s_d
            kept += (tl.load(column, mask=d_ok & valid & (first + k < L), other=0.0).to(tl.float32),)
    after = kept + tokens
    after = after[len(after) - L :]
    # A column may move to another thread's place: every read of the program comes before its writes.
    tl.debug_barrier()
    if FLAT:
        _store_window(state, after, 0, block, d, valid, stride_s_d, stride_s_c, W, D, BLOCK_D, FLAT)
    else:
        for k in tl.static_range(L):
            column = after[k].to(state.dtype.element_ty)
            tl.store(state + k * stride_s_c + d * stride_s_d, column, mask=d_ok & valid)
    for k in tl.static_range(TOKENS):
        y = _output(columns, k, taps, bias, W, ACTIVATION)
        y = tl.where(valid, y, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (n * TOKENS + k) * D + d, y, mask=d_ok)


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
    BLOCK_D: tl.constexpr,
    WORDS: tl.constexpr,
    FLAT_STATE: tl.constexpr,
    FLAT_WINDOWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    n, block = (program // D_BLOCKS).to(tl.int64), program % D_BLOCKS
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = (d < D) | (D % BLOCK_D == 0)
    sequence = x_ptr + n * (stride_x_n * STRIDE_UNIT)
    stride_t = stride_x_t * STRIDE_UNIT
    wait_for_inputs(PDL)

    slot = n
    valid = slot < num_slots
    if state_indices_ptr is not None:
        slot = tl.load(state_indices_ptr + n).to(tl.int64)
        valid = is_slot(slot, num_slots, pad_slot_id)
    m = n
    if intermediate_indices_ptr is not None:
        m = tl.load(intermediate_indices_ptr + n).to(tl.int64)
    stored = valid & (m >= 0) & (m < num_buffers)
    state = conv_state_ptr + slot * stride_s_slot
    taps = _taps(weight_ptr, d, d_ok, stride_weight_d, stride_weight_w, W, WORDS)
    bias = _bias(bias_ptr, d, d_ok, BLOCK_D)

    path = ()
    if parents_ptr is None:
        # These loads do not wait for the slot: a padding row's tokens are read, and not used.
        tokens = ()
        for i in tl.static_range(TOKENS):
            tokens += (tl.load(sequence + i * stride_t + d, mask=d_ok).to(tl.float32),)
        path = _load_window(state, block, d, valid, stride_s_d, stride_s_c, W, D, BLOCK_D, FLAT_STATE) + tokens
    windows = windows_ptr + m * stride_w_m
    for i in tl.static_range(TOKENS):
        columns = path[i : i + W]
        if parents_ptr is not None:
            # Back from the token through its ancestors, then through the window: column c < 0 follows c - 1.
            c = tl.full([], i, tl.int64)
            columns = (_column(sequence, state, c, valid, d, stride_t, stride_s_d, stride_s_c, W, D, BLOCK_D),)
            for _ in tl.static_range(W - 1):
                parents = parents_ptr + n * stride_p_n + c * stride_p_t
                parent = tl.load(parents, mask=valid & (c >= 0), other=-1).to(tl.int64)
                parent = tl.where((parent >= 0) & (parent < c), parent, -1)
                c = tl.where(c >= 0, parent, c - 1)
                column = _column(sequence, state, c, valid, d, stride_t, stride_s_d, stride_s_c, W, D, BLOCK_D)
                columns = (column,) + columns
        y = _output(columns, 0, taps, bias, W, ACTIVATION)
        y = tl.where(valid, y, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (n * TOKENS + i) * D + d, y, mask=d_ok)
        _store_window(windows, columns, 1, block, d, stored, stride_w_d, stride_w_c, W, D, BLOCK_D, FLAT_WINDOWS)
        windows += stride_w_t


def _x_strides(x: torch.Tensor) -> tuple[int, list[int]]:
    """Stride unit, and the strides of x but the last in it; a dimension of size 1 says nothing about alignment."""
    strides = [stride if size != 1 else 0 for size, stride in zip(x.shape[:-1], x.stride(), strict=False)]
    unit = stride_unit(x.element_size(), x.shape[-1], *strides)
    return unit, [stride // unit for stride in strides]


def _words(weight: torch.Tensor) -> bool:
    """Whether a channel's weights can be loaded as one integer of 32 or 64 bits."""
    even = weight.element_size() == 2 and weight.shape[1] != 3
    return even and weight.is_contiguous() and weight.data_ptr() % 16 == 0


def _flat_windows(windows: torch.Tensor, W: int) -> bool:
    """Whether windows ``[..., D, W-1]`` of more than one column have their channels one after another."""
    return W > 2 and windows.shape[-1] == W - 1 and windows.stride()[-2:] == (W - 1, 1)


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
        GROUP=min(config.group, config.block_t),
        BLOCK_D=block_d,
        WORDS=_words(weight),
        FLAT=_flat_windows(conv_state, W),
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
    block_d = _block_d(config, D, triton.next_power_of_2(max(tokens, L)))
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
        1 if state_indices is None else state_indices.stride(0),
        *strides,
        *weight.stride(),
        *conv_state.stride(),
        config=config,
        TOKENS=tokens,
        D=D,
        W=W,
        L=L,
        STRIDE_UNIT=unit,
        BLOCK_D=block_d,
        WORDS=_words(weight),
        FLAT=num_accepted_tokens is None and _flat_windows(conv_state, W),
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
    W = weight.shape[1]
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
        W=W,
        STRIDE_UNIT=unit,
        BLOCK_D=block_d,
        WORDS=_words(weight),
        FLAT_STATE=_flat_windows(conv_state, W),
        FLAT_WINDOWS=_flat_windows(intermediate_windows, W),
        ACTIVATION=None if activation is None else "silu",
    )
    return out
