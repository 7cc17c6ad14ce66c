"""Device functions that every kernel shares: the one definition of gate, sigmoid, softplus and l2norm on a GPU.

All of them take and return fp32, and run in the interpreter too; the one instruction sequence written for NVIDIA has
its formula beside it.

    softplus(x) = x for x > 20, else log1p(exp(x))
    gate        = -exp(A_log) * softplus(a + dt_bias)         natural log of the decay, <= 0
    l2norm      = x / sqrt(sum x^2 + eps)
"""

import triton
import triton.language as tl
from triton.language import target_info

# Above it exp(-x) < 2.1e-9, less than half an fp32 ulp of x: softplus is the identity.
SOFTPLUS_THRESHOLD = tl.constexpr(20.0)
# Up to it log1p is a series; above, log(1 + y) is at least 0.4, where the hardware log has full relative accuracy.
LOG1P_SERIES_LIMIT = tl.constexpr(0.5)


@triton.jit
def log1p(y):
    """log(1 + y) for y >= 0, with fp32's relative accuracy down to the smallest y."""
    # log1p(y) = 2 atanh(s), s = y / (2 + y) <= 0.2: the first term left out is s^12 / 13 < 4e-10.
    s = y / (2.0 + y)
    s2 = s * s
    series = 1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 * (1.0 / 9 + s2 * (1.0 / 11)))))
    return tl.where(y <= LOG1P_SERIES_LIMIT, 2.0 * s * series, tl.log(1.0 + y))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); +inf stays +inf, -inf gives 0, NaN stays NaN."""
    return tl.where(x > SOFTPLUS_THRESHOLD, x, log1p(tl.exp(x)))


@triton.constexpr_function
def _is_ptx():
    return not triton.knobs.runtime.interpret and target_info.is_cuda()


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); 0 and 1 at the infinities."""
    if _is_ptx():
        # Four instructions an element, where Triton's exp and division take 14 to keep subnormal results, which the
        # sum with 1 makes irrelevant: the gated norm was bound by them (H100, 2026-11-23).
        y = tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        y = 1.0 / (1.0 + tl.exp(-x))
    return y


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def gate(a, A_log, dt_bias):
    """Natural-log decay of one token; -inf for a = +inf, 0 for a = -inf."""
    return -tl.exp(A_log) * softplus(a + dt_bias)


@triton.jit
def is_slot(index, num_slots, pad_slot_id):
    """True where ``index`` is a slot of the pool: in range and not the padding slot."""
    return (index >= 0) & (index < num_slots) & (index != pad_slot_id)


@triton.jit
def inv_l2norm(sum_of_squares, eps):
    """1 / sqrt(sum of squares + eps), within 2^-22, in one instruction; rounded correctly it takes 50."""
    return tl.rsqrt(sum_of_squares + eps)


@triton.jit
def row_sum(x):
    """Sum over the last dimension, a power of two up to 256: neighbours in pairs, then neighbouring sums, and so on.

    tl.sum adds in the order that the tile's layout gives; this order is the same in every kernel, for as many shuffles.
    """
    axis: tl.constexpr = len(x.shape) - 1
    size: tl.constexpr = x.shape[axis]
    pairs = x
    for level in tl.static_range(8):
        if size >> level > 1:
            pairs = tl.sum(tl.reshape(pairs, [pairs.numel // 2, 2]), axis=1)
    if axis == 0:
        total = tl.sum(pairs, axis=0)  # of one
    elif axis == 1:
        total = pairs
    else:
        total = tl.reshape(pairs, [x.shape[0], x.shape[1]])
    return total


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """In a kernel that may be launched before its predecessor has ended (programmatic dependent launch), before the
    first access to memory: wait for that end, and let the successor be launched in turn."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


# ---------------------------------------------------------------------------------------------------------------
# Stochastic rounding of states
# ---------------------------------------------------------------------------------------------------------------

FP16_SMALLEST_NORMAL = tl.constexpr(2.0**-14)


@triton.jit
def philox(seed, c0, c1, c2):
    """Philox 4x32-10 of the counter (c0, c1, c2, 0) under a 64-bit key: four words, uint32.

    As ``tl.philox``, but for one 64-bit product where that takes a high and a low one: 20 instructions less of 60.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32)
    c3 = c2 * 0
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def rounding_bits(seed, slot, token, rows, K: tl.constexpr):
    """16 random bits for each element of [rows, K] of a slot's [HV * V, K] state, in an int32.

    The counter is (octet of the element in the state, slot, token, 0), the key ``seed``; the four words are the octet's
    eight numbers, low half first. So they depend on no tile, and a thread that stores eight elements at once draws for
    them alone.
    """
    octets = rows[:, None] * (K // 8) + tl.arange(0, K // 8)[None, :]
    a, b, c, d = philox(seed, octets, slot, token)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [rows.shape[0], K]).to(tl.int32)


@triton.jit
def round_stochastically(x, bits, dtype: tl.constexpr):
    """fp32 ``x`` to bf16 or fp16: away from zero where random ``bits``, added below the last place kept, carry into it.

    What the dtype holds, infinities too, stays; past its largest number, that or infinity, by the same rule.
    """
    if dtype == tl.bfloat16:
        pattern = tl.where(x == x, x.to(tl.int32, bitcast=True) + bits, 0x7FC00000)
        return (pattern >> 16).to(tl.int16).to(dtype, bitcast=True)
    # below 2^-14 the spacing stays that of 2^-14
    size = tl.abs(x)
    offset = tl.where(size < FP16_SMALLEST_NORMAL, FP16_SMALLEST_NORMAL, 0.0)
    pattern = ((size + offset).to(tl.int32, bitcast=True) + (bits >> 3)) & -0x2000
    size = pattern.to(tl.float32, bitcast=True) - offset
    pattern = size.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return tl.where(x == x, pattern.to(tl.float32, bitcast=True), x).to(dtype)


@triton.jit
def to_state(S, dtype: tl.constexpr, seed_ptr, slot, token, rows, K: tl.constexpr):
    """Rows ``rows`` of a head-major state in the dtype they are stored in; rounded stochastically where a seed is."""
    if seed_ptr is not None:
        bits = rounding_bits(tl.load(seed_ptr).to(tl.int64), slot, token, rows, K)
        return round_stochastically(S, bits, dtype)
    return S.to(dtype)


# ---------------------------------------------------------------------------------------------------------------
# On the host
# ---------------------------------------------------------------------------------------------------------------


def stride_unit(itemsize: int, *strides: int) -> int:
    """Elements in 16 bytes if every stride is a multiple of that, else 1.

    Kernels take runtime strides in this unit, as a constexpr, and multiply it back: so the compiler sees that rows
    start on 16 bytes and loads whole vectors, while no stride is specialised.
    """
    unit = 16 // itemsize
    return unit if all(stride % unit == 0 for stride in strides) else 1
