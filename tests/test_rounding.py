"""Stochastic rounding of stored states: unbiased, exact where it can be, the same for a slot in any batch, captured.

Everything runs through the operators or the reference on a CPU, and again on a GPU where there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from delta_cases import delta_inputs
from rounding_cases import HARD_VALUES, expected
from token_cases import assert_same_bits

import gdn_kernels
from gdn_kernels.reference import _math

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
H, HV, K, V = 1, 2, 64, 64
D = 2 * H * K + HV * V


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def seed_of(value: int, device: str = "cpu", dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype, device=device)


# ---------------------------------------------------------------------------------------------------------------
# The numbers and the rounding
# ---------------------------------------------------------------------------------------------------------------


def test_philox_gives_the_published_numbers():
    """Known answers of Philox 4x32-10 from the Random123 distribution."""
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, (low, high), words in known:
        found = _math.philox(high << 32 | low, [torch.tensor(word) for word in counter])
        assert tuple(int(word) for word in found) == words


def test_every_fact_changes_the_numbers_and_a_negative_seed_is_one_too():
    shape = torch.Size((HV, V, K))
    drawn = [_math.Draw(*facts).bits(shape) for facts in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0))]
    for i, bits in enumerate(drawn):
        assert 0 <= int(bits.min()) and int(bits.max()) <= 0xFFFF
        # of 2^13 uniform numbers of 16 bits: the mean within five standard errors
        assert abs(bits.double().mean() - 0x7FFF - 0.5) < 5 * 65536 / math.sqrt(12 * bits.numel())
        for other in drawn[:i]:
            assert (bits == other).sum() < 10  # 1 in 65,536 by chance
    assert_same_bits([_math.draw(seed_of(-1, dtype=torch.int32), 0, 0).bits(shape)], [drawn[4]], "int32 seed")


@DTYPES
def test_what_the_dtype_holds_stays_whatever_the_number(dtype):
    held = torch.cat([HARD_VALUES.to(dtype), torch.randn(512).to(dtype)])
    for bits in (0, 1, 0x8000, 0xFFFF):
        found = _math.round_stochastically(held.float(), torch.full(held.shape, bits, dtype=torch.int32), dtype)
        same = (found.view(torch.int16) == held.view(torch.int16)) | (found.isnan() & held.isnan())
        assert same.all(), held[~same]


@DTYPES
def test_a_value_goes_to_a_neighbour_and_only_one_past_the_largest_to_infinity(dtype):
    largest = torch.finfo(dtype).max
    for bits in (0, 0x1234, 0xFFFF):
        found = _math.round_stochastically(HARD_VALUES, torch.full(HARD_VALUES.shape, bits, dtype=torch.int32), dtype)
        assert torch.equal(found.isnan(), HARD_VALUES.isnan())
        inside = HARD_VALUES.abs() <= largest
        assert torch.isfinite(found[inside]).all()
        assert torch.equal(found.signbit()[inside], HARD_VALUES.signbit()[inside])
        # the neighbour nearer to zero has the same bits cut off, the other one is next to it
        x, y = HARD_VALUES[inside].double().abs(), found[inside].double().abs()
        spacing = torch.maximum(2.0 ** torch.floor(torch.log2(x.clamp(min=2.0**-149))), torch.tensor(
            torch.finfo(dtype).smallest_normal, dtype=torch.float64
        )) * torch.finfo(dtype).eps  # fmt: skip
        floor = torch.floor(x / spacing) * spacing
        assert ((y == floor) | (y == floor + spacing)).all()
        if bits == 0:
            assert torch.equal(y, floor) or dtype == torch.float16  # fp16's subnormals keep 13 bits below the spacing


@DTYPES
def test_the_chance_to_round_up_is_the_distance(dtype):
    """Over all 65,536 numbers, so exactly: 16 bits are dropped of bf16, 13 of fp16."""
    bits = torch.arange(65536, dtype=torch.int32)
    unit = torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal * unit
    for low, spacing in ((1.0, unit), (-1.5, unit), (1024.0, 1024 * unit), (3 * smallest, smallest), (0.0, smallest)):
        if dtype == torch.bfloat16 and low in (0.0, 3 * smallest):
            continue  # its subnormals are fp32's, tested below by their patterns
        for part in (0.0, 0.125, 0.5, 1 - 2.0**-12):
            x = torch.tensor(math.copysign(abs(low) + part * spacing, low if low else 1.0), dtype=torch.float32)
            found = _math.round_stochastically(x.expand(65536).contiguous(), bits, dtype).double()
            assert found.mean() == x.double()
    if dtype == torch.bfloat16:
        x = torch.tensor([0x00034000], dtype=torch.int32).view(torch.float32)
        found = _math.round_stochastically(x.expand(65536).contiguous(), bits, dtype)
        assert found.view(torch.int16).double().mean() == 3.25


# ---------------------------------------------------------------------------------------------------------------
# The operators
# ---------------------------------------------------------------------------------------------------------------


def decode_arguments(rows: int, device: str, dtype: torch.dtype = torch.float32):
    random = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, D + 2 * HV, generator=random).to(device).to(dtype)
    gates = torch.randn(2, HV, generator=random).to(device)
    return wide[:, :D], wide[:, D : D + HV], wide[:, D + HV :], *gates


def states(dtype: torch.dtype, device: str, *lead: int) -> torch.Tensor:
    return torch.randn(*lead, HV, V, K, generator=torch.Generator().manual_seed(9)).to(device, dtype)


def decaying(rows: int, device: str, tokens: int = 1):
    """Inputs with keys of zero: a state is multiplied by its decay and nothing else, so every kernel has its bits."""
    inputs = delta_inputs((rows * tokens,), HV=HV, device=device)
    return [
        (x * 0 if i == 1 else x).reshape(rows, tokens, *x.shape[2:]) for i, x in enumerate(inputs.tensors)
    ]  # fmt: skip


@DEVICES
@DTYPES
def test_stored_states_are_the_fp32_states_rounded_with_the_numbers_of_slot_and_token(dtype, device):
    inputs, seed = decaying(3, device, tokens=2), seed_of(12345678901, device)
    slots = torch.tensor([4, -1, 0], device=device)
    narrow = states(dtype, device, 5)
    exact, before = narrow.float(), narrow.clone()
    gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, narrow, slots, rounding_seed=seed)
    gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, exact, slots)
    for slot in (4, 0):
        wanted = expected(exact[slot], dtype, 12345678901, slot, token=1)
        assert_same_bits([narrow[slot].cpu()], [wanted], f"slot {slot}")
        assert (narrow[slot] != exact[slot].to(dtype)).any()
    assert_same_bits([narrow[1:4]], [before[1:4]], "other slots")


@DEVICES
@DTYPES
def test_stored_drafts_are_rounded_with_the_numbers_of_their_places(dtype, device):
    inputs, seed = decaying(2, device, tokens=3), seed_of(-3, device, torch.int32)
    table = torch.tensor([[3, 1, 0], [2, -1, 5]], device=device)
    narrow = states(dtype, device, 6)
    exact = narrow.float()
    gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, narrow, table, rounding_seed=seed)
    gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, exact, table)
    for row in table.tolist():
        for token, slot in enumerate(row):
            if slot >= 0:
                assert_same_bits([narrow[slot].cpu()], [expected(exact[slot], dtype, -3, slot, token)], f"slot {slot}")
    pool, rows = states(torch.float32, device, 2), torch.tensor([3, 1], device=device)
    kept, kept_exact = states(dtype, device, 4, 3), states(torch.float32, device, 4, 3)
    for buffer, given in ((kept, seed), (kept_exact, None)):
        gdn_kernels.recurrent_gated_delta_rule_verify(
            *inputs, pool, buffer, torch.tensor([0, 1], device=device), intermediate_indices=rows, rounding_seed=given
        )
    for row in (3, 1):
        for step in range(3):
            wanted = expected(kept_exact[row, step], dtype, -3, row, step)
            assert_same_bits([kept[row, step].cpu()], [wanted], f"row {row}, step {step}")


@DEVICES
@DTYPES
def test_a_slot_is_rounded_alike_wherever_its_row_stands(dtype, device):
    N = 9
    mixed, a, b, *gates = decode_arguments(N, device)
    pool, seed = states(dtype, device, N), seed_of(5, device)

    def run(rows, **options):
        state, slots = pool.clone(), torch.tensor(rows, dtype=torch.int32, device=device)
        o = gdn_kernels.packed_decode(mixed[rows], a[rows], b[rows], *gates, state, slots, num_k_heads=H, **options)
        return {row: (o[i], state[row]) for i, row in enumerate(rows)}

    wanted, nearest = run(list(range(N)), rounding_seed=seed), run(list(range(N)))
    for rows in ([0], [8], list(range(N - 1, -1, -1)), [5, 0, 7]):
        for row, pair in run(rows, rounding_seed=seed.to(torch.int32)).items():
            assert_same_bits(list(pair), list(wanted[row]), f"row {row} in {rows}")
    again, other = run(list(range(N)), rounding_seed=seed), run(list(range(N)), rounding_seed=seed + 1)
    for row in range(N):
        assert_same_bits(list(again[row]), list(wanted[row]), "the same seed")
        # the output is of the state before it is stored
        assert_same_bits([other[row][0], nearest[row][0]], [wanted[row][0]] * 2, "o")
        assert not torch.equal(other[row][1], wanted[row][1]) and not torch.equal(nearest[row][1], wanted[row][1])


@DEVICES
@DTYPES
def test_decode_the_paged_form_and_verify_store_the_same_bits(dtype, device):
    N = 4
    mixed, a, b, *gates = decode_arguments(N, device)
    q, k, v = (x.unflatten(-1, (-1, 64))[:, None] for x in mixed.split((H * K, H * K, HV * V), dim=-1))
    inputs, slots = (q, k, v, a[:, None], b[:, None]), torch.arange(N, dtype=torch.int32, device=device)
    pool = states(dtype, device, N)
    options = {"rounding_seed": seed_of(77, device)}
    more = {"use_qk_l2norm": True, "A_log": gates[0], "dt_bias": gates[1], **options}
    decoded, paged, table = pool.clone(), pool.clone(), pool.clone()
    kept = torch.full((N, 1, HV, V, K), torch.nan, dtype=dtype, device=device)
    o = gdn_kernels.packed_decode(mixed, a, b, *gates, decoded, slots, num_k_heads=H, **options)
    outputs = [
        gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, paged, slots, **more),
        gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, table, slots[:, None], **more),
        gdn_kernels.recurrent_gated_delta_rule_verify(*inputs, pool, kept, slots, **more),
    ]
    assert_same_bits([x[:, 0] for x in outputs], [o] * 3, "o")
    assert_same_bits([paged, table, kept[:, 0]], [decoded] * 3, "states")


@DEVICES
@DTYPES
def test_the_mean_over_many_seeds_is_the_fp32_state(dtype, device):
    """Of n independent roundings within a spacing u the mean has a standard error of at most u / (2 sqrt(n))."""
    seeds = 400
    inputs = decaying(1, device)
    start, slot = states(dtype, device, 1), torch.tensor([0], device=device)
    exact, total = start.float(), torch.zeros_like(start, dtype=torch.float64)
    gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, exact, slot)
    for seed in range(seeds):
        pool = start.clone()
        gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, pool, slot, rounding_seed=seed_of(seed, device))
        total += pool
    exact = exact.double()
    spacing = 2.0 ** torch.floor(torch.log2(exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)))
    spacing *= torch.finfo(dtype).eps
    score = (total / seeds - exact) / (spacing / (2 * math.sqrt(seeds)))
    print(f"largest score {score.abs().max():.2f}, mean {score.mean():.4f} of {score.numel()}")
    # 8,192 scores with a standard deviation of at most 1; their mean has one of 1 / sqrt(8192) = 0.011
    assert score.abs().max() < 6 and abs(score.mean()) < 5 / math.sqrt(score.numel())
    nearest = start.clone()
    gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, nearest, slot)
    biased = (nearest.double() - exact) / (spacing / (2 * math.sqrt(seeds)))
    assert biased.abs().max() > 15  # of sqrt(400) = 20: half a spacing


@DEVICES
def test_a_long_decode_drifts_with_nearest_rounding_and_not_with_a_seed(device):
    """Each step decays a bf16 state by less than half its spacing: rounded to nearest it never moves, while the fp64
    state halves. With a seed it follows, with the error of a random walk."""
    steps, decay = 1500, math.log(0.5) / 1500
    inputs = [x * 0 for x in decaying(1, device)]
    inputs[3] = inputs[3] + decay
    start = states(torch.bfloat16, device, 2)
    nearest, rounded = start.clone(), start.clone()
    slots = torch.tensor([0, 1], device=device)
    inputs = [x.expand(2, *x.shape[1:]) for x in inputs]
    for step in range(steps):
        gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, rounded, slots, rounding_seed=seed_of(step, device))
        if step % 10 == 0:
            gdn_kernels.recurrent_gated_delta_rule_paged(*inputs, nearest, slots)
    wanted = start.double() * math.exp(inputs[3][0, 0, 0].double() * steps)
    ratio = ((rounded.double() * start.double()).sum() / (start.double() ** 2).sum()).item()
    stuck = ((nearest.double() * start.double()).sum() / (start.double() ** 2).sum()).item()
    error = ((rounded.double() - wanted).norm() / wanted.norm()).item()
    print(f"state over its start: fp64 0.5, seeded {ratio:.4f}, to nearest {stuck:.4f}; error {error:.4f}")
    # A step takes d = 4.6e-4 of a value off, p = d / u of its spacing u <= 2^-7: it rounds with a variance of at most
    # p u^2 = d u, so 1,500 of them with a standard deviation of at most sqrt(1500 * d * 2^-7) = 7.4 % of the value that
    # was; 16,384 elements average that to 6e-4.
    assert abs(ratio - 0.5) < 5e-3 and error < 0.15
    assert stuck == 1.0


@DEVICES
def test_a_decode_of_thousands_of_steps_stays_near_fp64_with_a_seed(device):
    """Small updates to a state that forgets slowly: in the oracle, in bf16 to nearest, and in bf16 with seeds."""
    steps, rows = 2000, 1
    random = torch.Generator().manual_seed(1)
    mixed = torch.randn(steps, rows, D, generator=random)
    mixed[..., : H * K * 2] = torch.nn.functional.normalize(mixed[..., : H * K * 2].abs(), dim=-1)
    mixed[..., 2 * H * K :] = 1 + 0.1 * mixed[..., 2 * H * K :]  # a direction that many updates share
    a, b = torch.full((rows, HV), -7.0), torch.full((rows, HV), -5.0)  # decay 1e-3, write strength 7e-3
    gates, slot = torch.zeros(2, HV), torch.tensor([0])
    wanted = torch.zeros(1, HV, V, K, dtype=torch.float64)
    for step in range(steps):
        double = mixed[step].double(), a.double(), b.double(), *gates.double()
        torch.ops.gdn.packed_decode(*double, wanted, slot, num_k_heads=H)
    nearest, rounded = (torch.zeros(1, HV, V, K, dtype=torch.bfloat16, device=device) for _ in range(2))
    mixed, a, b, gates, slot = (x.to(device) for x in (mixed, a, b, gates, slot))
    for step in range(steps):
        token = mixed[step], a, b, *gates
        gdn_kernels.packed_decode(*token, nearest, slot, num_k_heads=H)
        gdn_kernels.packed_decode(*token, rounded, slot, num_k_heads=H, rounding_seed=seed_of(step, device))
    scale = wanted.mean()
    drift = {name: ((x.cpu().double() - wanted).mean() / scale).item() for name, x in
             (("nearest", nearest), ("seeded", rounded))}  # fmt: skip
    print(f"mean error over the mean state: {drift}")
    assert abs(drift["seeded"]) < 0.01 and abs(drift["nearest"]) > 5 * abs(drift["seeded"])


@pytest.mark.gpu
@DTYPES
def test_a_replayed_graph_rounds_with_the_seed_it_then_finds(dtype):
    N, device = 5, "cuda"
    arguments = decode_arguments(N, device)
    pool, slots = states(dtype, device, N + 1), torch.arange(N, dtype=torch.int32, device=device)
    held, seed = pool.clone(), seed_of(1, device)

    def run(state, seed):
        return gdn_kernels.packed_decode(*arguments, state, slots, num_k_heads=H, rounding_seed=seed)

    run(pool.clone(), seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(held, seed)
    seen = []
    for value in (1, 2, -9, 2**40):
        seed.fill_(value)
        held.copy_(pool)
        graph.replay()
        eager = pool.clone()
        wanted = run(eager, seed_of(value, device))
        assert_same_bits([found, held], [wanted, eager], f"seed {value}")
        seen.append(held.clone())
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.gpu
def test_a_seed_may_start_anywhere_without_another_binary():
    """A layer's seed is an element of all layers' seeds: 8 bytes from its neighbour."""
    from gdn_kernels import launch

    arguments, slots = decode_arguments(2, "cuda"), torch.tensor([0, 1], device="cuda")
    seeds = torch.arange(4, device="cuda")
    before = None
    for layer in range(4):
        pool = states(torch.bfloat16, "cuda", 2)
        gdn_kernels.packed_decode(*arguments, pool, slots, num_k_heads=H, rounding_seed=seeds[layer])
        before = before or launch.binaries()
    assert launch.binaries() == before
