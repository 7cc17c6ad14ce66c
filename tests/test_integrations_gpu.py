"""The drop-in functions on each device, on tensors as their callers have them: against fp64, and FLA's own on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from delta_cases import assert_close

from gdn_kernels.integrations import causal_conv1d, fla

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize("device", DEVICES)
# Relative RMS: results rounded once to bf16; the chunked rule also rounds the operands of its products.
BF16, CHUNKED = 2**-8, 5e-3
B, T, H, HV, K, V, D, W = 2, 70, 2, 4, 64, 128, 512, 4


def rand(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def exact(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().double()


def conv(columns: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, length: int) -> torch.Tensor:
    """fp64: silu of the last ``length`` outputs over ``columns`` ``[B, D, W - 1 + length]``."""
    return F.silu(F.conv1d(exact(columns), exact(weight)[:, None], exact(bias), groups=len(weight)))[..., -length:]


#: Conv states ``[B, D, columns]`` as callers keep them: whole, channel-last, a slice of a wider and longer pool.
STATES = {
    "contiguous": lambda x: x.clone(),
    "channel-last": lambda x: x.mT.contiguous().mT,
    "slice-of-a-pool": lambda x: F.pad(x, (1, 2, 8, 16), value=7.0)[:, 8 : 8 + x.shape[1], 1 : 1 + x.shape[2]],
}


@devices
@pytest.mark.parametrize("layout", STATES)
@pytest.mark.parametrize("older", [0, 1])
@torch.no_grad()
def test_conv_updates_write_strided_states(device, layout, older):
    weight, bias = rand(D, W, seed=0, device=device), rand(D, seed=1, device=device)
    first = rand(B, D, W - 1 + older, seed=2, device=device)
    state = STATES[layout](first)
    around = state._base.clone() if layout == "slice-of-a-pool" else None
    columns = first
    for step in range(3):
        x = rand(B, D, seed=3 + step, device=device)
        y = causal_conv1d.causal_conv1d_update(x, state, weight, bias, "silu")
        columns = torch.cat([columns, x[..., None]], -1)
        assert_close(exact(y), conv(columns[..., -W:], weight, bias, 1)[..., 0], BF16, f"step {step}")
        assert torch.equal(state, columns[..., -state.shape[2] :])
    if around is not None:  # nothing beside the view is written
        state.fill_(0)
        whole = around.clone()
        whole[:, 8 : 8 + D, 1 : 1 + state.shape[2]] = 0
        assert torch.equal(state._base, whole)


@devices
@pytest.mark.parametrize("layout", ["contiguous", "channel-last"])
@torch.no_grad()
def test_conv_of_prompts_and_its_states(device, layout):
    weight, bias = rand(D, W, seed=0, device=device), rand(D, seed=1, device=device)
    x, before = rand(B, D, T, seed=2, device=device), rand(B, D, W - 1, seed=3, device=device)
    y, state = causal_conv1d.causal_conv1d_fn(
        STATES[layout](x), weight, bias, initial_states=before, return_final_states=True, activation="silu"
    )
    columns = torch.cat([before, x], -1)
    assert_close(exact(y), conv(columns, weight, bias, T), BF16, "causal_conv1d_fn")
    assert torch.equal(state, columns[..., T:])


@devices
@torch.no_grad()
def test_flas_conv_and_its_update_of_a_strided_cache(device):
    weight, bias = rand(D, W, seed=0, device=device), rand(D, seed=1, device=device)
    x, new = rand(B, T, D, seed=2, device=device), rand(B, D, seed=3, device=device)
    y, state = fla.causal_conv1d(x, weight, bias, output_final_state=True, activation="silu")
    columns = torch.cat([x.new_zeros(B, D, W - 1), x.mT], -1)
    assert_close(exact(y), conv(columns, weight, bias, T).mT, BF16, "causal_conv1d")
    assert torch.equal(state, x[:, -W:].mT)
    cache = STATES["slice-of-a-pool"](state)
    y, same = fla.causal_conv1d_update(new, cache, weight=weight, bias=bias, activation="silu")
    columns = torch.cat([state[..., 1:], new[..., None]], -1)
    assert_close(exact(y), conv(columns, weight, bias, 1)[..., 0], BF16, "causal_conv1d_update")
    assert same is cache and torch.equal(cache, columns)


def delta_inputs(device: str) -> dict[str, torch.Tensor]:
    """Column views of one projection, as a layer has them; raw gates."""
    mixed = rand(B, T, 2 * H * K + HV * V, seed=0, device=device)
    q, k, v = mixed.split([H * K, H * K, HV * V], -1)
    heads = {"q": q.unflatten(-1, (H, K)), "k": k.unflatten(-1, (H, K)), "v": v.unflatten(-1, (HV, V))}
    gates = rand(B, T, 2 * HV, seed=1, device=device)
    return {**heads, "g": gates[..., :HV], "beta": gates[..., HV:]}


def options(device: str) -> dict[str, object]:
    parameters = {"A_log": rand(HV, seed=2, device=device).float(), "dt_bias": rand(HV, seed=3, device=device).float()}
    kernel = ("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "use_qk_l2norm_in_kernel", "output_final_state")
    return {**parameters, **dict.fromkeys(kernel, True)}


RULES = {"chunk": fla.chunk_gated_delta_rule, "recurrent": fla.fused_recurrent_gated_delta_rule}


@devices
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_the_delta_rule_and_its_continuation(device, rule):
    call, x, given = RULES[rule], delta_inputs(device), options(device)
    exactly = {name: exact(t) if isinstance(t, torch.Tensor) else t for name, t in {**x, **given}.items()}
    expected, expected_state = fla.fused_recurrent_gated_delta_rule(**exactly)
    o, state = call(**x, **given)
    assert_close(exact(o), expected, CHUNKED, f"{rule} o")
    assert_close(exact(state), expected_state, CHUNKED, f"{rule} state")
    cut = T - 3
    before, after = ({name: t[:, part] for name, t in x.items()} for part in (slice(0, cut), slice(cut, T)))
    _, state = call(**before, **given)
    o, state = fla.fused_recurrent_gated_delta_rule(**after, **given, initial_state=state)
    assert_close(exact(o), expected[:, cut:], 2 * CHUNKED, f"{rule}, continued, o")
    assert_close(exact(state), expected_state, 2 * CHUNKED, f"{rule}, continued, state")


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_the_delta_rule_is_flas_own(rule):
    library = pytest.importorskip("fla.ops.gated_delta_rule", reason="needs FLA: pip install fla-core==0.6.0")
    x, given = delta_inputs("cuda"), options("cuda")
    wanted, wanted_state = getattr(library, RULES[rule].__name__)(**x, **given)
    o, state = RULES[rule](**x, **given)
    # both round the operands of their products
    assert_close(exact(o), exact(wanted), 2 * CHUNKED, f"{rule} o")
    assert_close(exact(state), exact(wanted_state), 2 * CHUNKED, f"{rule} state")


@pytest.mark.gpu
@torch.no_grad()
def test_norms_and_convs_are_flas_own():
    library = pytest.importorskip("fla.modules", reason="needs FLA: pip install fla-core==0.6.0")
    convs = pytest.importorskip("fla.modules.causal_conv1d")
    x, z = rand(B, T, HV, V, seed=0, device="cuda"), rand(B, T, HV, V, seed=1, device="cuda")
    norms = [module.FusedRMSNormGated(V, device="cuda", dtype=torch.bfloat16) for module in (fla, library)]
    assert_close(exact(norms[0](x, z)), exact(norms[1](x, z)), 2 * BF16, "FusedRMSNormGated")
    tokens, weight = rand(B, T, D, seed=2, device="cuda"), rand(D, W, seed=3, device="cuda")
    given = {"weight": weight, "output_final_state": True, "activation": "silu"}
    found, state = fla.causal_conv1d(tokens, **given)
    wanted, wanted_state = convs.causal_conv1d(tokens, **given)
    assert_close(exact(found), exact(wanted), 2 * BF16, "causal_conv1d")
    assert torch.equal(state, wanted_state)


@devices
@torch.no_grad()
def test_norms_of_strided_rows(device):
    wide = rand(B, T, 3 * HV * V, seed=0, device=device)
    x, z = wide[..., : HV * V].unflatten(-1, (HV, V)), wide[..., -HV * V :].unflatten(-1, (HV, V))
    norm = fla.FusedRMSNormGated(V, device=device, dtype=torch.bfloat16)
    u = exact(x) * torch.rsqrt(exact(x).square().mean(-1, keepdim=True) + norm.eps)
    assert_close(exact(norm(x, z)), u * F.silu(exact(z)), BF16, "FusedRMSNormGated")
