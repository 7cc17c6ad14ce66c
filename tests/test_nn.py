"""The modules: against plain PyTorch in fp64, in pieces, in ragged and padded batches, and with checkpoint names."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers_support
from token_cases import assert_same_bits

from gdn_kernels import graphs, nn

HIDDEN, K, V, W = 40, 64, 64, 4
SLOTS = 8


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def layer(H: int = 1, ratio: int = 2, fused: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0):
    torch.manual_seed(seed)
    made = nn.GatedDeltaNet(HIDDEN, H, ratio * H, K, V, W, layer_id=0, fused_in_proj=fused, eps=1e-5)
    made.norm.weight.copy_(1 + 0.1 * torch.randn(V))
    made.dt_bias.copy_(torch.randn(ratio * H))
    return made.to(dtype).requires_grad_(False)


def inputs(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def filled(states: graphs.LayerState, value: float | None = None) -> graphs.LayerState:
    """The pools with something in every slot: ``value``, or random numbers."""
    generator = torch.Generator().manual_seed(7)
    for pool in (states.conv_state, states.recurrent_state):
        pool.copy_(torch.randn(pool.shape, generator=generator) if value is None else torch.full(pool.shape, value))
    return states


def run(mixer: nn.GatedDeltaNet, states: graphs.LayerState, x: torch.Tensor, **metadata) -> torch.Tensor:
    with graphs.forward_context({0: states}, graphs.BatchMetadata(**metadata)):
        return mixer(x)


def prefill(mixer, states, x, lengths, slots, fresh=True, padding: int = 0) -> torch.Tensor:
    offsets = integers(0, *torch.tensor(lengths).cumsum(0).tolist())
    known = torch.full((len(lengths),), not fresh)
    x = torch.cat([x, x.new_full((padding, HIDDEN), torch.nan)])
    return run(mixer, states, x, state_indices=integers(*slots), cu_seqlens=offsets, has_initial_state=known)


# ---------------------------------------------------------------------------------------------------------------
# The layer in plain PyTorch, one sequence, token by token
# ---------------------------------------------------------------------------------------------------------------


def plain_projections(mixer: nn.GatedDeltaNet, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    H, HV = mixer.num_k_heads, mixer.num_v_heads
    r, T = HV // H, len(x)
    if not mixer.fused_in_proj:
        z = (x @ mixer.in_proj_z.weight.T).view(T, HV, V)
        return x @ mixer.in_proj_qkv.weight.T, z, x @ mixer.in_proj_b.weight.T, x @ mixer.in_proj_a.weight.T
    heads = (x @ mixer.in_proj_qkvz.weight.T).view(T, H, 2 * K + 2 * r * V)
    q, k, v, z = heads.split((K, K, r * V, r * V), dim=-1)
    b, a = (x @ mixer.in_proj_ba.weight.T).view(T, H, 2 * r).split(r, dim=-1)
    mixed = torch.cat([part.reshape(T, -1) for part in (q, k, v)], dim=-1)
    return mixed, z.reshape(T, HV, V), b.reshape(T, HV), a.reshape(T, HV)


def plain(mixer: nn.GatedDeltaNet, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the layer returns for one new sequence, its state ``[HV, V, K]`` and its conv window, all in fp64."""
    mixer, x = layer_in_fp64(mixer), x.double()
    H, HV = mixer.num_k_heads, mixer.num_v_heads
    mixed, z, b, a = plain_projections(mixer, x)
    padded = F.pad(mixed.T, (W - 1, 0))
    window = padded[:, -(W - 1) :]
    mixed = F.silu(F.conv1d(padded[None], mixer.conv1d.weight, groups=len(padded))[0]).T
    q, k, v = mixed.split((H * K, H * K, HV * V), dim=-1)
    q, k = (y.reshape(-1, H, K).repeat_interleave(HV // H, dim=1) for y in (q, k))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    g = -mixer.A_log.exp() * F.softplus(a + mixer.dt_bias)
    beta, v = b.sigmoid(), v.reshape(-1, HV, V)
    S, o = x.new_zeros(HV, V, K), x.new_zeros(len(x), HV, V)
    for t in range(len(x)):
        S = S * g[t].exp()[:, None, None]
        error = v[t] - torch.einsum("hvk,hk->hv", S, k[t])
        S = S + torch.einsum("h,hv,hk->hvk", beta[t], error, k[t])
        o[t] = K**-0.5 * torch.einsum("hvk,hk->hv", S, q[t])
    y = o / (o.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * mixer.norm.weight * F.silu(z)
    return y.flatten(1) @ mixer.out_proj.weight.T, S, window


def layer_in_fp64(mixer: nn.GatedDeltaNet) -> nn.GatedDeltaNet:
    H = mixer.num_k_heads
    copy = layer(H, mixer.num_v_heads // H, mixer.fused_in_proj, torch.float64)
    copy.load_state_dict(mixer.state_dict())
    return copy


def close(found: torch.Tensor, wanted: torch.Tensor, budget: float) -> None:
    """RMS of the difference, relative."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    print(f"relative error {error:.1e}, budget {budget:.1e}")
    assert error <= budget


# Of a layer: a few roundings of the dtype, but the gated norm takes out the scale of o, which for a single token is the
# cosine of q and k. Here that is as small as 1 / 200, and so much larger is the relative error.
BUDGET = {torch.float64: 1e-13, torch.float32: 5e-5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
def test_a_layer_is_the_plain_formulation(ratio: int, fused: bool, dtype: torch.dtype) -> None:
    mixer = layer(2, ratio, fused, dtype)
    states = filled(mixer.allocate_states(SLOTS, dtype))
    x = inputs(70, dtype=dtype)
    y = prefill(mixer, states, x, [70], [3])
    wanted, S, window = plain(mixer, x)
    for found, expected in ((y, wanted), (states.recurrent_state[3], S), (states.conv_state[3], window)):
        close(found, expected, BUDGET[dtype])
    assert y.shape == x.shape and y.dtype == dtype


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("pieces", [(37, 33), (1, 64, 5), (64, 6)], ids=str)
def test_prefill_in_pieces_and_decode_continue_the_sequence(pieces: tuple[int, ...], fused: bool) -> None:
    mixer, x, steps = layer(fused=fused), inputs(74), 4
    wanted, S, window = plain(mixer, x)
    states = filled(mixer.allocate_states(SLOTS), 1e3)
    found, start = [], 0
    for n, length in enumerate(pieces):
        found.append(prefill(mixer, states, x[start : start + length], [length], [5], fresh=n == 0))
        start += length
    for t in range(start, start + steps):
        # two padding rows, one marked by its slot and one past the slots
        rows = torch.cat([x.new_full((1, HIDDEN), torch.nan), x[t : t + 1], x.new_full((1, HIDDEN), torch.nan)])
        found.append(run(mixer, states, rows, state_indices=integers(-1, 5))[1:2])
    close(torch.cat(found), wanted, BUDGET[torch.float32])
    close(states.recurrent_state[5], S, BUDGET[torch.float32])
    close(states.conv_state[5], window, BUDGET[torch.float32])


def test_has_initial_state_defaults_to_continuing() -> None:
    mixer, x = layer(), inputs(40)
    wanted, *_ = plain(mixer, x)
    states = filled(mixer.allocate_states(SLOTS))
    prefill(mixer, states, x[:25], [25], [2])
    y = run(mixer, states, x[25:], state_indices=integers(2), cu_seqlens=integers(0, 15))
    close(y, wanted[25:], BUDGET[torch.float32])


LENGTHS = [5, 0, 64, 1, 70]


def test_a_ragged_batch_is_each_sequence_alone() -> None:
    mixer, slots = layer(), [6, 2, 0, 4, 1]
    parts = [inputs(length, seed) for seed, length in enumerate(LENGTHS)]
    states = filled(mixer.allocate_states(SLOTS))
    before = states.recurrent_state.clone()
    y = prefill(mixer, states, torch.cat(parts), LENGTHS, slots, padding=3)
    for x, slot, found in zip(parts, slots, y[:-3].split(LENGTHS), strict=True):
        if len(x):
            wanted, S, window = plain(mixer, x)
            close(found, wanted, BUDGET[torch.float32])
            close(states.recurrent_state[slot], S, BUDGET[torch.float32])
            close(states.conv_state[slot], window, BUDGET[torch.float32])
    for slot in (2, 3, 5, 7):
        # of the empty sequence, and of no sequence
        assert_same_bits([states.recurrent_state[slot]], [before[slot]], f"slot {slot}")


def core(mixer: nn.GatedDeltaNet, states: graphs.LayerState, tensors, **metadata) -> torch.Tensor:
    """The split point on given projections, into a buffer full of NaN."""
    mixed, a, b = tensors
    output = mixed.new_full((len(mixed), mixer.num_v_heads, V), torch.nan)
    with graphs.forward_context({0: states}, graphs.BatchMetadata(**metadata)):
        graphs.linear_attention_with_output(mixed, a, b, output, 0)
    return output


def projections(mixer: nn.GatedDeltaNet, tokens: int) -> tuple[torch.Tensor, ...]:
    mixed, _, b, a = plain_projections(mixer, inputs(tokens))
    return mixed, a, b


def test_the_core_of_a_sequence_has_the_same_bits_alone_and_in_a_batch() -> None:
    mixer, slots = layer(), [6, 2, 0, 4, 1]
    tensors = projections(mixer, sum(LENGTHS))
    together = filled(mixer.allocate_states(SLOTS))
    offsets = integers(0, *torch.tensor(LENGTHS).cumsum(0).tolist())
    o = core(mixer, together, tensors, state_indices=integers(*slots), cu_seqlens=offsets)
    for n, slot in enumerate(slots):
        start, end = offsets[n : n + 2].tolist()
        alone = filled(mixer.allocate_states(SLOTS))
        part = [x[start:end] for x in tensors]
        found = core(mixer, alone, part, state_indices=integers(slot), cu_seqlens=integers(0, end - start))
        assert_same_bits(
            [found, alone.recurrent_state[slot], alone.conv_state[slot]],
            [o[start:end], together.recurrent_state[slot], together.conv_state[slot]],
            f"sequence {n}",
        )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_nan_in_padding_rows_changes_no_bit_and_the_tail_is_zero(phase: str) -> None:
    mixer = layer()
    metadata = {"state_indices": integers(3, -1, 1)}
    if phase == "prefill":
        metadata |= {"cu_seqlens": integers(0, 5, 8, 10), "has_initial_state": torch.tensor([True, True, False])}
        real, padding, tail = [*range(5), 8, 9], [5, 6, 7], slice(10, 12)
    else:
        real, padding, tail = [0, 2], [1], slice(3, 12)
    outcomes = []
    for value in (0.0, torch.nan):
        tensors = projections(mixer, 12)
        for x in tensors:
            x[padding], x[tail] = value, value
        states = filled(mixer.allocate_states(SLOTS))
        o = core(mixer, states, tensors, **metadata)
        assert not o[padding].any() and not o[tail].any()
        assert torch.isfinite(o).all() and o[real].flatten(1).any(dim=1).all()
        outcomes.append([o, states.conv_state, states.recurrent_state])
    assert_same_bits(outcomes[1], outcomes[0], "NaN against zero in padding")


def test_nan_in_padding_rows_of_a_layer_changes_no_bit() -> None:
    mixer, outcomes = layer(), []
    for value in (0.0, torch.nan):
        x, states = inputs(12), filled(mixer.allocate_states(SLOTS))
        x[9:] = value
        y = run(mixer, states, x, state_indices=integers(3, 1), cu_seqlens=integers(0, 5, 9))
        outcomes.append([y[:9], states.conv_state, states.recurrent_state])
    assert torch.isfinite(outcomes[1][0]).all()
    assert_same_bits(outcomes[1], outcomes[0], "NaN against zero in the padded tail")


@pytest.mark.parametrize("pad_slot_id, padding", [(-1, -1), (-1, -5), (-1, SLOTS), (0, 0)], ids=str)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_padding_slots_write_no_state(phase: str, pad_slot_id: int, padding: int) -> None:
    mixer = layer()
    states = filled(mixer.allocate_states(SLOTS))
    before = states.conv_state.clone(), states.recurrent_state.clone()
    offsets = {"cu_seqlens": integers(0, 1, 2)} if phase == "prefill" else {}
    slots = integers(padding, 4)
    o = core(mixer, states, projections(mixer, 2), state_indices=slots, pad_slot_id=pad_slot_id, **offsets)
    others = [slot for slot in range(SLOTS) if slot != 4]
    assert not o[0].any() and o[1].any()
    for pool, old in zip((states.conv_state, states.recurrent_state), before, strict=True):
        assert_same_bits([pool[others]], [old[others]], "slots of no row")
        assert not torch.equal(pool[4], old[4])


@pytest.mark.parametrize("left_behind", [1e30, torch.nan, torch.inf], ids=str)
def test_a_recycled_slot_does_not_leak(left_behind: float) -> None:
    mixer, x = layer(), inputs(20)
    clean, used = mixer.allocate_states(SLOTS), filled(mixer.allocate_states(SLOTS), left_behind)
    wanted, found = (prefill(mixer, states, x, [2, 18], [4, 1]) for states in (clean, used))
    assert torch.isfinite(found).all()
    assert_same_bits(
        [found, used.recurrent_state[[4, 1]], used.conv_state[[4, 1]]],
        [wanted, clean.recurrent_state[[4, 1]], clean.conv_state[[4, 1]]],
        "a slot that held something",
    )


def test_a_bf16_pool_holds_the_rounded_state() -> None:
    mixer, x = layer(), inputs(33)
    exact, rounded = mixer.allocate_states(SLOTS), mixer.allocate_states(SLOTS, torch.bfloat16)
    assert rounded.recurrent_state.dtype is torch.bfloat16 and rounded.conv_state.dtype is torch.float32
    wanted, found = (prefill(mixer, states, x[:32], [32], [1]) for states in (exact, rounded))
    assert_same_bits([found], [wanted], "a prefill reads no pool")
    assert_same_bits([rounded.recurrent_state[1]], [exact.recurrent_state[1].bfloat16()], "the state")
    wanted, found = (run(mixer, states, x[32:], state_indices=integers(1)) for states in (exact, rounded))
    assert not torch.equal(found, wanted)
    close(found, wanted, 2**-7)


def test_states_are_allocated_as_the_operators_want_them() -> None:
    mixer = layer(2, 3)
    states = mixer.allocate_states(5)
    assert states.conv_state.shape == (5, 2 * 2 * K + 6 * V, W - 1) and states.conv_state.stride(1) == 1
    assert states.recurrent_state.shape == (5, 6, V, K) and states.recurrent_state.is_contiguous()
    assert not states.conv_state.any() and not states.recurrent_state.any()
    assert not any(x.requires_grad for x in vars(states).values() if isinstance(x, torch.Tensor))
    with pytest.raises(dataclasses.FrozenInstanceError):
        states.conv_state = None
    # the parameters are the layer's own, so that weights may be loaded after the pools are made
    assert states.A_log.data_ptr() == mixer.A_log.data_ptr()
    assert states.conv_weight.data_ptr() == mixer.conv1d.weight.data_ptr()


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------


def checkpoint(fused: bool, H: int = 2, HV: int = 4) -> dict[str, torch.Tensor]:
    """A layer's tensors by the names and shapes of Qwen3-Next (fused) or Qwen3.5 (separate)."""
    generator = torch.Generator().manual_seed(3)
    keys, values = H * K, HV * V
    shapes = {
        "conv1d.weight": (2 * keys + values, 1, W),
        "dt_bias": (HV,),
        "A_log": (HV,),
        "norm.weight": (V,),
        "out_proj.weight": (HIDDEN, values),
    }
    if fused:
        shapes |= {"in_proj_qkvz.weight": (2 * keys + 2 * values, HIDDEN), "in_proj_ba.weight": (2 * HV, HIDDEN)}
    else:
        shapes |= {
            "in_proj_qkv.weight": (2 * keys + values, HIDDEN),
            "in_proj_z.weight": (values, HIDDEN),
            "in_proj_b.weight": (HV, HIDDEN),
            "in_proj_a.weight": (HV, HIDDEN),
        }
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("fused", [True, False], ids=["qwen3-next", "qwen3.5"])
def test_a_layer_loads_a_checkpoints_tensors_as_they_are(fused: bool) -> None:
    mixer, tensors = layer(2, 2, fused, seed=9), checkpoint(fused)
    states = mixer.allocate_states(SLOTS)
    mixer.load_state_dict(tensors, strict=True)
    x = inputs(10)
    close(prefill(mixer, states, x, [10], [0]), plain(mixer, x)[0], BUDGET[torch.float32])
    assert {name: tuple(x.shape) for name, x in mixer.state_dict().items()} == {
        name: tuple(x.shape) for name, x in tensors.items()
    }


def test_the_fused_layer_is_the_separate_one_with_its_rows_reordered() -> None:
    H, r = 2, 3
    fused, separate = layer(H, r, True), layer(H, r, False)
    q, k, v, z = fused.in_proj_qkvz.weight.view(H, -1, HIDDEN).split((K, K, r * V, r * V), dim=1)
    b, a = fused.in_proj_ba.weight.view(H, 2 * r, HIDDEN).split(r, dim=1)
    shared = {name: x for name, x in fused.state_dict().items() if not name.startswith("in_proj")}
    rows = {
        "in_proj_qkv.weight": torch.cat([part.flatten(0, 1) for part in (q, k, v)]),
        "in_proj_z.weight": z.flatten(0, 1),
        "in_proj_b.weight": b.flatten(0, 1),
        "in_proj_a.weight": a.flatten(0, 1),
    }
    separate.load_state_dict({**shared, **rows})
    x, ours, theirs = inputs(20), fused.allocate_states(SLOTS), separate.allocate_states(SLOTS)
    found, wanted = prefill(fused, ours, x, [7, 13], [1, 2]), prefill(separate, theirs, x, [7, 13], [1, 2])
    close(found, wanted, BUDGET[torch.float32])
    close(ours.recurrent_state, theirs.recurrent_state, BUDGET[torch.float32])
    close(ours.conv_state, theirs.conv_state, BUDGET[torch.float32])


def test_a_layer_is_that_of_transformers() -> None:
    reason = "transformers is not installed; it is no dependency"
    pytest.importorskip("transformers", reason=reason)
    transformers_support.import_models()
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next", reason=reason)
    configuration = pytest.importorskip("transformers.models.qwen3_next.configuration_qwen3_next", reason=reason)
    config = configuration.Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=W,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    theirs = modeling.Qwen3NextGatedDeltaNet(config, layer_idx=0).float().eval()
    ours, x = layer(2, 2), inputs(70)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    close(prefill(ours, ours.allocate_states(SLOTS), x, [70], [0]), theirs(x[None])[0], 1e-4)


def test_gradients_are_refused() -> None:
    mixer = layer().requires_grad_(True)
    states = mixer.allocate_states(SLOTS)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="must not require grad"):
        run(mixer, states, inputs(1), state_indices=integers(0))


# ---------------------------------------------------------------------------------------------------------------
# RMSNormGated
# ---------------------------------------------------------------------------------------------------------------


def plain_norm(norm: nn.RMSNormGated, x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
    x, act = x.double(), F.silu if norm.activation == "silu" else torch.sigmoid
    gate = 1.0 if z is None else act(z.double())
    if not norm.norm_before_gate:
        x, gate = x * gate, 1.0
    groups = x.unflatten(-1, (-1, norm.group_size or x.shape[-1]))
    y = (groups / (groups.square().mean(-1, keepdim=True) + norm.eps).sqrt()).flatten(-2) * norm.weight.double()
    return (y if norm.bias is None else y + norm.bias.double()) * gate


@pytest.mark.parametrize("before", [True, False], ids=["norm-first", "gate-first"])
@pytest.mark.parametrize(
    "options",
    [{}, {"group_size": 16}, {"activation": "sigmoid"}, {"bias": True, "eps": 1e-2}],
    ids=["plain", "groups", "sigmoid", "bias-eps"],
)
def test_the_gated_norm_is_the_plain_formulation(options: dict, before: bool) -> None:
    torch.manual_seed(0)
    norm = nn.RMSNormGated(48, norm_before_gate=before, **options)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(48))
    x, z = torch.randn(5, 3, 48), torch.randn(5, 3, 48)
    close(norm(x, z), plain_norm(norm, x, z), 1e-6)
    close(norm(x), plain_norm(norm, x, None), 1e-6)


def test_the_two_orders_of_norm_and_gate_differ() -> None:
    x, z = torch.randn(2, 5, 48).unbind()
    first, second = (nn.RMSNormGated(48, norm_before_gate=before)(x, z) for before in (True, False))
    assert not torch.allclose(first, second)


def test_the_gated_norm_has_the_parameters_of_the_checkpoints() -> None:
    assert set(nn.RMSNormGated(8).state_dict()) == {"weight"}
    assert set(nn.RMSNormGated(8, bias=True).state_dict()) == {"weight", "bias"}
    assert nn.RMSNormGated(8, dtype=torch.bfloat16).weight.dtype is torch.bfloat16
