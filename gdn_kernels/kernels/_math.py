"""Device functions that every kernel shares: the one definition of gate, sigmoid, softplus and l2norm on a GPU.

All of them take and return fp32. They use no inline assembly and no libdevice, so they run in the interpreter too.

    softplus(x) = x for x > 20, else log1p(exp(x))
    gate        = -exp(A_log) * softplus(a + dt_bias)         natural log of the decay, <= 0
    l2norm      = x / sqrt(sum x^2 + eps)
"""

import triton
import triton.language as tl

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


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); 0 and 1 at the infinities."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    """x * sigmoid(x), as one division."""
    return x / (1.0 + tl.exp(-x))


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
    """1 / sqrt(sum of squares + eps), with a correctly rounded root and quotient."""
    return tl.div_rn(1.0, tl.sqrt_rn(sum_of_squares + eps))


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """The first line of a kernel that may be launched before its predecessor has ended (programmatic dependent launch):
    wait for that end, and let the successor be launched in turn. Nothing is read or written before."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


# ---------------------------------------------------------------------------------------------------------------
# Stochastic rounding of states
# ---------------------------------------------------------------------------------------------------------------

FP16_SMALLEST_NORMAL = tl.constexpr(0x38800000)  # 2^-14 as a pattern of fp32; below it the spacing is 2^-24
BF16_LARGEST = tl.constexpr(0x7F7F0000)
FP16_LARGEST = tl.constexpr(0x477FE000)


@triton.jit
def rounding_bits(seed, slot, token, rows, K: tl.constexpr):
    """16 random bits for each element of [rows, K] of a slot's [HV * V, K] state, in an int32.

    Philox 4x32-10 with the key ``seed`` and the counter (octet of the element in the state, slot, token, 0); its four
    words are the octet's eight numbers, low half first. So they depend on no tile, and a thread that stores eight
    elements at once draws for them alone.
    """
    octets = rows[:, None] * (K // 8) + tl.arange(0, K // 8)[None, :]
    a, b, c, d = tl.philox(seed, octets, slot.to(tl.int32), token.to(tl.int32), 0)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [rows.shape[0], K]).to(tl.int32)


@triton.jit
def round_stochastically(x, bits, dtype: tl.constexpr):
    """fp32 ``x`` to bf16 or fp16: away from zero where ``bits / 65536`` is below its distance, in units of the spacing,
    from the neighbour nearer to zero. What the dtype holds stays; past its largest number, and for NaN, to nearest."""
    pattern = x.to(tl.int32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        rounded = ((pattern + bits) & -0x10000).to(tl.float32, bitcast=True)
        return tl.where(magnitude >= BF16_LARGEST, x, rounded).to(dtype)
    normal = (pattern + (bits >> 3)) & -0x2000
    # in fixed point with sixteen bits below the spacing
    small = magnitude < FP16_SMALLEST_NORMAL
    steps = ((tl.where(small, tl.abs(x), 0.0) * 1099511627776.0).to(tl.int32) + bits) >> 16
    subnormal = (steps.to(tl.float32) * 5.9604644775390625e-08).to(tl.int32, bitcast=True) | (pattern & -0x80000000)
    rounded = tl.where(small, subnormal, normal).to(tl.float32, bitcast=True)
    return tl.where(magnitude >= FP16_LARGEST, x, rounded).to(dtype)


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
