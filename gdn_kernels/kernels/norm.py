"""Gated normalisation and l2norm.

    RMS:      n(u) = u / sqrt(mean u^2 + eps)
    layer:    n(u) = (u - mean u) / sqrt(mean (u - mean u)^2 + eps)
    l2:       n(u) = u / sqrt(sum u^2 + eps)
    norm_before_gate:  y = (n(x) * w + b) * act(z)         else:  y = n(x * act(z)) * w + b
    fp8:      s = max(max |y|, 1e-10) / 448, value = e4m3(y / s)   over each 128 columns, of y rounded to the dtype of x

x, z, out ``[..., D]``, last dim contiguous, other strides their own; weight, bias ``[D]``. The statistics are those
of one group of ``group_size`` columns. Sums and everything else are fp32. One program takes one group of a few rows;
a group wider than a tile is walked tile by tile, and read again for each statistic. Rows may have two dimensions that
do not collapse into one (a ``[T, HV, V]`` column view of a wider matrix is read in place). Quantisation is another way
to store the tile: e4m3 values into out, fp32 scales ``[rows, D / 128]`` beside it. Leaves out fp64, which the reference
covers, and quantisation groups that span groups of the norm.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from gdn_kernels import launch
from gdn_kernels.kernels._math import inv_l2norm, row_sum, sigmoid, silu, stride_unit, wait_for_inputs

# Columns that share a scale.
QUANT_GROUP = tl.constexpr(128)
# The largest finite e4m3 number.
E4M3_MAX = tl.constexpr(448.0)
# Least maximum of a group: a group of zeros gets a scale that is a normal fp32 number, and zeros.
QUANT_EPS = tl.constexpr(1e-10)


@triton.jit
def _row_offsets(outer, inner, stride_outer, stride_inner, unit: tl.constexpr):
    """Element offset of each row, int64, known to be a multiple of ``unit``."""
    return (outer.to(tl.int64) * (stride_outer * unit) + inner.to(tl.int64) * (stride_inner * unit))[:, None]


@triton.jit
def _mask(row_ok, cols, group_size: tl.constexpr, tile: tl.constexpr):
    """Rows in range, and columns in range where the group does not fill its tiles."""
    if group_size % tile == 0:
        mask = row_ok[:, None]
    else:
        mask = row_ok[:, None] & (cols < group_size)[None, :]
    return mask


@triton.jit
def _load(x_rows, z_rows, cols, mask, activation: tl.constexpr, norm_before_gate: tl.constexpr):
    """One tile: what the norm is taken of, 0 where masked, and the gate still to apply (1 where there is none)."""
    u = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = 1.0
    if z_rows is not None:
        z = tl.load(z_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        u, gate = gated(u, z, activation, norm_before_gate)
    return u, gate


@triton.jit
def gated(u, z, activation: tl.constexpr, norm_before_gate: tl.constexpr):
    """What the norm is taken of, and the gate still to apply."""
    act = sigmoid(z) if activation == "sigmoid" else silu(z)
    if norm_before_gate:
        gate = act
    else:
        u = u * act
        gate = 1.0
    return u, gate


@triton.jit
def parameter(ptr, cols, mask):
    """Weight or bias of the columns, fp32. Loaded as a tile, by each thread in the layout of its columns: one row of
    them would reach the threads through shared memory and a barrier."""
    return tl.load(ptr + cols[None, :] + tl.zeros(mask.shape, tl.int32), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scaled(y, w, b, gate, dtype: tl.constexpr):
    """(y * w + b) * gate, rounded to ``dtype``."""
    if w is not None:
        y = y * w
    if b is not None:
        y = y + b
    return (y * gate).to(dtype)


@triton.jit
def store_tile(out_rows, scale_rows, y, start, row_ok, mask, group_size: tl.constexpr, tile: tl.constexpr):
    """The tile ``y`` at column ``start``, as it is or quantised."""
    if scale_rows is None:
        tl.store(out_rows + (start + tl.arange(0, tile))[None, :], y, mask=mask)
    else:
        _store_fp8(out_rows, scale_rows, y, start, row_ok, mask, group_size, tile)


@triton.jit
def _quotient(y, divisor, dtype: tl.constexpr):
    """y / divisor as IEEE rounds it, for quotients of at most 448 and a positive divisor."""
    if dtype == tl.float32:
        q = tl.div_rn(y, divisor)
    else:
        # One reciprocal a group and a correction of the product by its own remainder, Markstein's division, in place of
        # 10 instructions an element: exact for every pair of 8 or 11-bit numbers (tests/test_norm_fp8.py tries all).
        # A finite number divided by infinity is a zero, infinity by infinity NaN, and a zero keeps its sign.
        divisor = tl.where(divisor == float("inf"), 0.0, divisor)
        inverse = tl.where(divisor == 0.0, 0.0, tl.div_rn(1.0, divisor))
        q = y * inverse
        q = tl.fma(tl.fma(q, divisor, -y), -inverse, q)
    return q


@triton.jit
def _store_fp8(out_rows, scale_rows, y, start, row_ok, mask, group_size: tl.constexpr, tile: tl.constexpr):
    """The tile at column ``start`` as e4m3 values, and a scale for each of its quantisation groups: all of a group is
    in range or nothing."""
    per_tile: tl.constexpr = tile // QUANT_GROUP
    groups = tl.reshape(y.to(tl.float32), [y.shape[0], per_tile, QUANT_GROUP])
    # As integers the bits of |y| are ordered as its values, with NaN above infinity: a NaN is not lost, as in torch.
    largest = tl.max(tl.abs(groups).to(tl.int32, bitcast=True), axis=2).to(tl.float32, bitcast=True)
    scales = tl.div_rn(tl.where(largest < QUANT_EPS, QUANT_EPS, largest), E4M3_MAX)
    # Nothing to clamp: a quotient exceeds 448 by its own rounding and the scale's at most, and 464 still rounds to it.
    values = _quotient(groups, scales[:, :, None], y.dtype).to(tl.float8e4nv)
    values = tl.reshape(values, [y.shape[0], tile])
    cols = start + tl.arange(0, tile)
    # Rows start on multiples of STRIDE_UNIT, 16 bytes of x: so a thread stores as many columns as it loads, the tile is
    # laid out as for the plain store, and the sums before it are taken in the same order.
    tl.store(out_rows + cols[None, :], values, mask=mask)
    numbers = start // QUANT_GROUP + tl.arange(0, per_tile)
    numbers_ok = _mask(row_ok, numbers, group_size // QUANT_GROUP, per_tile)
    tl.store(scale_rows + numbers[None, :], scales, mask=numbers_ok)


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "n_inner",
        "magic",
        "shift",
        "stride_x_outer",
        "stride_x_inner",
        "stride_z_outer",
        "stride_z_inner",
        "stride_out_outer",
        "stride_out_inner",
    ]
)
def norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    out_ptr,
    scales_ptr,
    n_rows: tl.int32,
    n_inner: tl.int32,
    magic: tl.uint32,
    shift: tl.int32,
    stride_x_outer: tl.int64,
    stride_x_inner: tl.int64,
    stride_z_outer: tl.int64,
    stride_z_inner: tl.int64,
    stride_out_outer: tl.int64,
    stride_out_inner: tl.int64,
    eps,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    rows = (program // NUM_GROUPS) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = (program % NUM_GROUPS) * GROUP_SIZE
    row_ok = rows < n_rows
    # rows // n_inner and the rest; unsigned, so that their products with 64-bit strides are two instructions, not four
    outer = ((rows.to(tl.uint64) * magic) >> shift).to(tl.uint32)
    inner = rows.to(tl.uint32) - outer * n_inner.to(tl.uint32)
    tile = tl.arange(0, BLOCK_COLS)

    x_rows = x_ptr + first + _row_offsets(outer, inner, stride_x_outer, stride_x_inner, STRIDE_UNIT)
    out_rows = out_ptr + first + _row_offsets(outer, inner, stride_out_outer, stride_out_inner, STRIDE_UNIT)
    z_rows = None
    if z_ptr is not None:
        z_rows = z_ptr + first + _row_offsets(outer, inner, stride_z_outer, stride_z_inner, STRIDE_UNIT)
    weight = weight_ptr + first if weight_ptr is not None else None
    bias = bias_ptr + first if bias_ptr is not None else None
    scale_rows = None
    if scales_ptr is not None:
        # scales are contiguous, one row of them a row of x
        per_row: tl.constexpr = NUM_GROUPS * GROUP_SIZE // QUANT_GROUP
        scale_rows = scales_ptr + first // QUANT_GROUP + (rows.to(tl.int64) * per_row)[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # RMS and layer norm take the mean square, l2norm the sum.
    SHARE: tl.constexpr = 1.0 if NORM == "l2" else 1.0 / GROUP_SIZE
    wait_for_inputs(PDL)

    if GROUP_SIZE <= BLOCK_COLS:
        # The tile stays in registers from the statistics to the store.
        mask = _mask(row_ok, tile, GROUP_SIZE, BLOCK_COLS)
        u, gate = _load(x_rows, z_rows, tile, mask, ACTIVATION, NORM_BEFORE_GATE)
        w = parameter(weight, tile, mask) if weight is not None else None
        b = parameter(bias, tile, mask) if bias is not None else None
        if NORM == "layer":
            u = tl.where(mask, u - (tl.sum(u, axis=1) * SHARE)[:, None], 0.0)
        # a head's row is added up as in the decode step
        squares = row_sum(u * u) if BLOCK_COLS <= 256 else tl.sum(u * u, axis=1)
        scale = inv_l2norm(squares * SHARE, eps)[:, None]
        y = scaled(u * scale, w, b, gate, dtype)
        store_tile(out_rows, scale_rows, y, 0, row_ok, mask, GROUP_SIZE, BLOCK_COLS)
    else:
        mean = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        if NORM == "layer":
            sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
            for start in range(0, GROUP_SIZE, BLOCK_COLS):
                cols = start + tile
                mask = _mask(row_ok, cols, GROUP_SIZE, BLOCK_COLS)
                u, _ = _load(x_rows, z_rows, cols, mask, ACTIVATION, NORM_BEFORE_GATE)
                sums += u
            mean = (tl.sum(sums, axis=1) * SHARE)[:, None]
        squares = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for start in range(0, GROUP_SIZE, BLOCK_COLS):
            cols = start + tile
            mask = _mask(row_ok, cols, GROUP_SIZE, BLOCK_COLS)
            u, _ = _load(x_rows, z_rows, cols, mask, ACTIVATION, NORM_BEFORE_GATE)
            u = tl.where(mask, u - mean, 0.0)
            squares += u * u
        scale = inv_l2norm(tl.sum(squares, axis=1) * SHARE, eps)[:, None]
        for start in range(0, GROUP_SIZE, BLOCK_COLS):
            cols = start + tile
            mask = _mask(row_ok, cols, GROUP_SIZE, BLOCK_COLS)
            u, gate = _load(x_rows, z_rows, cols, mask, ACTIVATION, NORM_BEFORE_GATE)
            w = parameter(weight, cols, mask) if weight is not None else None
            b = parameter(bias, cols, mask) if bias is not None else None
            y = scaled((u - mean) * scale, w, b, gate, dtype)
            store_tile(out_rows, scale_rows, y, start, row_ok, mask, GROUP_SIZE, BLOCK_COLS)


def _row_dims(tensors: list[torch.Tensor]) -> list[tuple[int, ...]]:
    """Row dimensions as (size, stride of each tensor), outermost first: those of size 1 dropped, neighbours merged
    where all tensors allow."""
    dims: list[tuple[int, ...]] = []
    for size, *strides in zip(tensors[0].shape[:-1], *(tensor.stride() for tensor in tensors), strict=False):
        if size == 1:
            continue
        if dims and all(before == size * stride for before, stride in zip(dims[-1][1:], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, *strides)
        else:
            dims.append((size, *strides))
    return dims


def _reciprocal(n: int) -> tuple[int, int]:
    """(magic, shift) with ``i // n == (i * magic) >> shift`` for all i of 31 bits: a division in a kernel takes 70
    instructions. Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994."""
    shift = 31 + (n - 1).bit_length()
    return -(-(1 << shift) // n), shift


def _launch(
    kernel_name: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    out: torch.Tensor,
    norm: str,
    norm_before_gate: bool,
    eps: float,
    group_size: int,
    activation: str,
    scales: torch.Tensor | None = None,
) -> None:
    if x.numel() == 0:
        return
    tensors = [x, out] if z is None else [x, out, z]
    dims = _row_dims(tensors)
    if len(dims) > 2:
        raise NotImplementedError(
            f"x, z and out must have at most two row dimensions that do not collapse, got {len(dims)}: "
            f"shape {tuple(x.shape)}, strides {', '.join(str(tensor.stride()) for tensor in tensors)}"
        )
    none = (1,) + (0,) * len(tensors)
    (n_outer, *outer), (n_inner, *inner) = ([none, none] + dims)[-2:]
    unit = stride_unit(x.element_size(), x.shape[-1], *outer, *inner)
    strides = [(a // unit, b // unit) for a, b in zip(outer, inner, strict=True)]
    x_strides, out_strides, z_strides = strides if z is not None else (*strides, (0, 0))
    n_rows = n_outer * n_inner
    num_groups = x.shape[-1] // group_size

    config = launch.config(kernel_name, group_size)
    launch.run(
        norm_kernel,
        (triton.cdiv(n_rows, config.block_rows) * num_groups,),
        x,
        weight,
        bias,
        z,
        out,
        scales,
        n_rows,
        n_inner,
        *_reciprocal(n_inner),
        *x_strides,
        *z_strides,
        *out_strides,
        float(eps),
        config=config,
        # The quantised norm must have the plain one's bits: Triton 3.9 fused other products of x * act(z) into the sum.
        fp_fusion=False,
        NUM_GROUPS=num_groups,
        GROUP_SIZE=group_size,
        STRIDE_UNIT=unit,
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLS=config.block_cols,
        NORM=norm,
        NORM_BEFORE_GATE=norm_before_gate,
        ACTIVATION="sigmoid" if activation == "sigmoid" else "silu",
    )


def _gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    norm_before_gate: bool,
    is_rms_norm: bool = True,
    eps: float = 1e-6,
    group_size: int | None = None,
    activation: str = "silu",
) -> None:
    """The gated norm's launch, with the operators' arguments and defaults; quantised where there are ``scales``, in the
    configuration of the plain norm: its bits are the same."""
    norm = "rms" if is_rms_norm else "layer"
    group_size = x.shape[-1] if group_size is None else group_size
    # Without z there is nothing to order: one binary for both values.
    before = norm_before_gate or z is None
    _launch("layer_norm_gated", x, weight, bias, z, out, norm, before, eps, group_size, activation, scales)


def layer_norm_gated_out(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    out: torch.Tensor,
    **options: Any,
) -> None:
    _gated(x, weight, bias, z, out, **options)


def layer_norm_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    out = launch.empty(x, *x.shape)
    _gated(x, weight, bias, z, out, **options)
    return out


def layer_norm_gated_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    *,
    quant_group_size: int = 128,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = launch.empty(x, *x.shape, dtype=torch.float8_e4m3fn)
    scales = launch.empty(x, x.shape[0], x.shape[1:].numel() // quant_group_size, dtype=torch.float32)
    _gated(x, weight, bias, z, values, scales, **options)
    return values, scales


def l2norm(x: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    out = launch.empty(x, *x.shape)
    _launch("l2norm", x, None, None, None, out, "l2", True, eps, x.shape[-1], "silu")
    return out
