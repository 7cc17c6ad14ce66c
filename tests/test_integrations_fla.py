"""FLA's names on this package's operators: its signatures, its formulas in fp64, its own examples, and bad input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gdn_kernels.integrations import fla

H, HV, K, V, W = 2, 4, 64, 128, 4
LENGTHS = (70, 1, 0, 33)
LONG = torch.float64


def rand(*shape: int, dtype: torch.dtype = LONG, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def near(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-10) -> None:
    """fp64 against fp64: rounding of at most some hundred operations on values of order one."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.to(LONG), expected.to(LONG), rtol=0, atol=atol)


def offsets(lengths: tuple[int, ...], dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype)


# The delta rule ------------------------------------------------------------------------------------------------

RULES = [fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


def inputs(T: int = 70, B: int = 2, dtype: torch.dtype = LONG) -> dict[str, torch.Tensor]:
    """q, k, v and raw gates."""
    q, k = rand(B, T, H, K, dtype=dtype), F.normalize(rand(B, T, H, K, dtype=dtype, seed=1), dim=-1)
    gate = {"g": rand(B, T, HV, dtype=dtype, seed=2), "beta": rand(B, T, HV, dtype=dtype, seed=3)}
    return {"q": q, "k": k, "v": rand(B, T, HV, V, dtype=dtype), **gate}


def cooked(raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**raw, "g": F.logsigmoid(raw["g"]), "beta": raw["beta"].sigmoid()}


def oracle(q, k, v, g, beta, scale=None, initial_state=None) -> tuple[torch.Tensor, torch.Tensor]:
    """FLA's recurrence as its papers state it, states ``[B, HV, K, V]``."""
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    S = v.new_zeros(v.shape[0], HV, K, V) if initial_state is None else initial_state
    o = torch.empty_like(v)
    for t in range(v.shape[1]):
        S = S * g[:, t].exp()[..., None, None]
        error = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, :, :, None] * error[..., None, :]
        o[:, t] = (K**-0.5 if scale is None else scale) * torch.einsum("bhkv,bhk->bhv", S, q[:, t])
    return o, S


@rules
def test_defaults_are_plain_gates_and_no_state(rule: Callable) -> None:
    x = cooked(inputs())
    o, state = rule(**x)
    assert state is None
    near(o, oracle(**x)[0])


@rules
def test_states_are_k_first_and_need_no_copy_between_calls(rule: Callable) -> None:
    x, h0 = cooked(inputs()), rand(2, HV, K, V)
    expected_o, expected_state = oracle(**x, initial_state=h0, scale=0.3)
    o, state = rule(**x, scale=0.3, initial_state=h0, output_final_state=True)
    near(o, expected_o)
    near(state, expected_state)
    assert state.transpose(-1, -2).is_contiguous()
    o, again = rule(**x, initial_state=state, output_final_state=True)
    near(o, oracle(**x, initial_state=expected_state)[0])


@rules
@pytest.mark.parametrize("name", ["state_v_first", "transpose_state_layout"])
def test_v_first_states(rule: Callable, name: str) -> None:
    x, h0 = cooked(inputs()), rand(2, HV, K, V)
    expected_o, expected_state = oracle(**x, initial_state=h0)
    call = lambda: rule(**x, initial_state=h0.mT.contiguous(), output_final_state=True, **{name: True})  # noqa: E731
    if name == "transpose_state_layout":
        with pytest.warns(DeprecationWarning, match="state_v_first"):
            o, state = call()
        with pytest.raises(ValueError, match="transpose_state_layout"):
            rule(**x, state_v_first=True, transpose_state_layout=True)
    else:
        o, state = call()
    near(o, expected_o)
    near(state, expected_state.mT)


@rules
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_those_alone(rule: Callable, dtype: torch.dtype) -> None:
    cu = offsets(LENGTHS, dtype)
    x, h0 = cooked(inputs(sum(LENGTHS), 1)), rand(len(LENGTHS), HV, K, V)
    o, state = rule(**x, initial_state=h0, output_final_state=True, cu_seqlens=cu)
    for n, (start, end) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        part = {name: tensor[:, start:end] for name, tensor in x.items()}
        expected_o, expected_state = oracle(**part, initial_state=h0[n : n + 1])
        near(o[:, start:end], expected_o)
        near(state[n : n + 1], expected_state)


@rules
def test_qk_l2norm_in_kernel(rule: Callable) -> None:
    x = cooked(inputs())
    unit = lambda y: y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt()  # noqa: E731
    near(rule(**x, use_qk_l2norm_in_kernel=True)[0], oracle(**{**x, "q": unit(x["q"]), "k": unit(x["k"])})[0])


@rules
@pytest.mark.parametrize("gate", [False, True], ids=["g", "raw-g"])
@pytest.mark.parametrize("beta", ["beta", "raw-beta", "negative-eigenvalues"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-dt-bias", "dt-bias"])
def test_gate_and_sigmoid_in_kernel(rule: Callable, gate: bool, beta: str, bias: bool) -> None:
    raw, A_log = inputs(20), rand(HV, seed=5)
    dt_bias = rand(HV, seed=6) if bias else None
    x, options = dict(cooked(raw)), {"A_log": A_log, "dt_bias": dt_bias}
    expected = dict(x)
    if gate:
        x["g"], options["use_gate_in_kernel"] = raw["g"], True
        expected["g"] = -A_log.exp() * F.softplus(raw["g"] + (dt_bias if bias else 0))
    if beta != "beta":
        x["beta"], options["use_beta_sigmoid_in_kernel"] = raw["beta"], True
        options["allow_neg_eigval"] = beta == "negative-eigenvalues"
        expected["beta"] = raw["beta"].sigmoid() * (2 if options["allow_neg_eigval"] else 1)
    near(rule(**x, **options)[0], oracle(**expected)[0])


def test_recurrent_defaults_of_g_and_beta() -> None:
    x = cooked(inputs(20))
    del x["g"], x["beta"]
    ones = torch.ones(2, 20, HV, dtype=LONG)
    near(fla.fused_recurrent_gated_delta_rule(**x)[0], oracle(**x, g=0 * ones, beta=ones)[0])


@rules
def test_any_strides_and_16_bit_gates(rule: Callable) -> None:
    x = {name: tensor.bfloat16() for name, tensor in cooked(inputs()).items()}
    strided = {name: tensor.mT.contiguous().mT for name, tensor in x.items()}
    expected = rule(**{**x, "g": x["g"].float(), "beta": x["beta"].float()})[0]
    assert expected.dtype is torch.bfloat16
    torch.testing.assert_close(rule(**strided)[0], expected, rtol=0, atol=0)


def test_hints_of_fla_change_nothing() -> None:
    rule = fla.chunk_gated_delta_rule
    x, cu = cooked(inputs(20, 1)), offsets((20,))
    hinted = rule(**x, cu_seqlens=cu, cu_seqlens_cpu=cu, chunk_indices=torch.zeros(1, 2, dtype=torch.long))
    assert torch.equal(hinted[0], rule(**x, cu_seqlens=cu, chunk_size=64)[0])


CHUNK, RECURRENT = RULES


@pytest.mark.parametrize(
    "rule, options, error, text",
    [
        (CHUNK, {"cp_context": object()}, NotImplementedError, "cp_context"),
        (CHUNK, {"chunk_size": 32}, NotImplementedError, "chunk_size"),
        (CHUNK, {"chunk_size": 48}, ValueError, "chunk_size"),
        (CHUNK, {"use_gate_in_kernel": True}, ValueError, "A_log"),
        (CHUNK, {"allow_neg_eigval": True}, ValueError, "allow_neg_eigval"),
        (CHUNK, {"output_final_sate": True}, TypeError, "output_final_sate"),
        (CHUNK, {"head_first": False}, TypeError, "head_first"),
        (CHUNK, {"initial_state": torch.zeros(3, HV, K, V)}, ValueError, "initial_state"),
        (CHUNK, {"cu_seqlens": torch.tensor([0, 8])}, ValueError, "batch dimension of 1"),
        (RECURRENT, {"gk": torch.zeros(2, 8, HV, K)}, NotImplementedError, "gk"),
        (RECURRENT, {"gv": torch.zeros(2, 8, HV, V)}, NotImplementedError, "gv"),
        (RECURRENT, {"beta": torch.zeros(2, 8, HV, V)}, NotImplementedError, "beta"),
        (RECURRENT, {"g": None, "use_gate_in_kernel": True, "A_log": torch.zeros(HV)}, ValueError, "^g must"),
        (RECURRENT, {"chunk_size": 64}, TypeError, "chunk_size"),
        (RECURRENT, {"use_qk_l2norm": True}, TypeError, "use_qk_l2norm"),
    ],
)
def test_rule_refuses(rule: Callable, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        rule(**{**cooked(inputs(8, dtype=torch.float32)), **options})


@rules
@pytest.mark.parametrize("name", ["q", "beta"])
def test_input_that_requires_grad_is_refused(rule: Callable, name: str) -> None:
    x = cooked(inputs(8, dtype=torch.float32))
    x[name].requires_grad_()
    with pytest.raises(NotImplementedError, match="grad"):
        rule(**x)
    with torch.no_grad():
        rule(**x)


# FLA's examples: the text of its docstrings, with sizes that are built and run on this machine -----------------


def test_example_of_chunk_gated_delta_rule() -> None:
    from gdn_kernels.integrations.fla import chunk_gated_delta_rule  # the import is what changes

    B, T, H, HV, K, V = 4, 80, 4, 8, 128, 128  # 2048 tokens and heads of 512 there, which FLA refuses as well
    q = torch.randn(B, T, H, K, dtype=torch.bfloat16)
    k = F.normalize(torch.randn(B, T, H, K, dtype=torch.bfloat16), p=2, dim=-1)
    v = torch.randn(B, T, HV, V, dtype=torch.bfloat16)
    beta = torch.rand(B, T, HV, dtype=torch.bfloat16).sigmoid()
    g = F.logsigmoid(torch.rand(B, T, HV, dtype=torch.bfloat16))
    h0 = torch.randn(B, HV, K, V, dtype=torch.bfloat16)
    o, ht = chunk_gated_delta_rule(q, k, v, g, beta, initial_state=h0, output_final_state=True)
    q, k, v, beta, g = map(lambda x: x.flatten(0, 1)[None], (q, k, v, beta, g))
    cu_seqlens = q.new_tensor([0, 80, 160, 240, 320], dtype=torch.long)
    packed_o, packed_ht = chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=h0, output_final_state=True, cu_seqlens=cu_seqlens
    )
    assert o.dtype is torch.bfloat16 and ht.dtype is torch.float32 and ht.shape == (B, HV, K, V)
    assert torch.equal(packed_o.view(B, T, HV, V), o) and torch.equal(packed_ht, ht)


def test_example_of_fused_recurrent_gated_delta_rule() -> None:
    from gdn_kernels.integrations.fla import fused_recurrent_gated_delta_rule  # the import is what changes

    B, T, H, HV, K, V = 4, 20, 4, 8, 128, 128  # 2048 tokens and heads of 512 there
    q = torch.randn(B, T, H, K)
    k = F.normalize(torch.randn(B, T, H, K), p=2, dim=-1)
    v = torch.randn(B, T, HV, V)
    g = F.logsigmoid(torch.rand(B, T, HV))
    beta = torch.rand(B, T, HV).sigmoid()
    h0 = torch.randn(B, HV, K, V)
    # The docstring gives beta as the fifth positional argument, which is gk; it is passed by name here.
    o, ht = fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, initial_state=h0, output_final_state=True)
    q, k, v, g, beta = map(lambda x: x.flatten(0, 1)[None], (q, k, v, g, beta))
    cu_seqlens = q.new_tensor([0, 20, 40, 60, 80], dtype=torch.long)
    packed_o, packed_ht = fused_recurrent_gated_delta_rule(
        q, k, v, g, beta=beta, initial_state=h0, output_final_state=True, cu_seqlens=cu_seqlens
    )
    assert torch.equal(packed_o.view(B, T, HV, V), o) and torch.equal(packed_ht, ht)


@rules
def test_the_head_size_of_the_examples_is_refused_with_the_limit(rule: Callable) -> None:
    q, v = torch.zeros(1, 1, 1, 512), torch.zeros(1, 1, 1, 512)
    with pytest.raises(NotImplementedError, match="head size K must be one of 64, 128, 256, got 512"):
        rule(q, q, v, torch.zeros(1, 1, 1), beta=torch.zeros(1, 1, 1))


# Gates and norms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, HV), (2, 3, HV), (2, 3, 2, HV)], ids=str)
def test_gate_functions(shape: tuple[int, ...]) -> None:
    g, A_log, dt_bias = rand(*shape), rand(HV, seed=1), rand(HV, seed=2)
    near(fla.fused_gdn_gate(g, A_log, dt_bias, LONG), -A_log.exp() * F.softplus(g + dt_bias))
    near(fla.fused_gdn_gate(g, A_log.view(1, 1, HV), output_dtype=LONG), -A_log.exp() * F.softplus(g))
    near(fla.fused_beta_sigmoid(g, 2.0), 2 * g.sigmoid())
    half = g.bfloat16()
    assert fla.fused_gdn_gate(half, A_log.float()).dtype is torch.float32
    assert fla.fused_gdn_gate(half, A_log.float(), output_dtype=torch.bfloat16).dtype is torch.bfloat16
    assert fla.fused_beta_sigmoid(half).dtype is torch.float32


def test_l2norm() -> None:
    x = rand(2, 3, 2, 2, 5)
    expected = x / (x.square().sum(-1, keepdim=True) + 1e-3).sqrt()
    near(fla.l2norm(x, 1e-3), expected)
    near(fla.L2Norm(1e-3)(x.mT.contiguous().mT), expected)
    wide = fla.l2_norm(x.bfloat16(), output_dtype=torch.float32)
    assert wide.dtype is torch.float32
    near(wide, fla.l2norm(x.bfloat16().double()), 1e-6)  # not rounded to bf16 on the way
    assert fla.l2norm(x.float(), output_dtype=torch.float16).dtype is torch.float16


def norm(x: torch.Tensor, rms: bool, eps: float, group: int | None = None) -> torch.Tensor:
    y = x.unflatten(-1, (-1, group or x.shape[-1]))
    y = y if rms else y - y.mean(-1, keepdim=True)
    return (y / (y.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("affine", [True, False], ids=["weight", "ones"])
def test_fused_gated_norms(rms: bool, activation: str, affine: bool) -> None:
    D, act = 24, torch.sigmoid if activation == "sigmoid" else F.silu
    x, g, weight, bias = rand(2, 3, 2, 2, D), rand(2, 3, 2, 2, D, seed=1), rand(D), rand(D, seed=1)
    function = fla.rms_norm_gated if rms else fla.layer_norm_gated
    expected = norm(x, rms, 1e-2)
    near(function(x, g, None, None, activation, eps=1e-2), expected * act(g))
    near(function(x, g, weight, bias, activation, eps=1e-2), (expected * weight + bias) * act(g))
    layer = fla.FusedRMSNormGated if rms else fla.FusedLayerNormGated
    options = {} if rms else {"bias": True}
    module = layer(D, affine, eps=1e-2, activation=activation, dtype=LONG, **options).requires_grad_(False)
    names = {"weight", *options} if affine else set()
    assert set(module.state_dict()) == names and f"activation={activation}" in repr(module)
    near(module(x, g), expected * act(g))
    if affine:
        module.weight.copy_(weight)
        module.reset_parameters()
        assert bool((module.weight == 1).all())


@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("before", [True, False], ids=["norm-first", "gate-first"])
@pytest.mark.parametrize("group", [None, 8])
def test_norms_in_the_style_of_mamba(rms: bool, before: bool, group: int | None) -> None:
    D = 24
    x, z, weight, bias = rand(2, 3, D), rand(2, 3, D, seed=1), rand(D), rand(D, seed=1)
    function = fla.rmsnorm_fn if rms else fla.layernorm_fn
    near(function(x, weight, bias), norm(x, rms, 1e-6) * weight + bias)
    gated = norm(x if before else x * F.silu(z), rms, 1e-2, group) * weight + bias
    expected = gated * F.silu(z) if before else gated
    near(function(x, weight, bias, z, 1e-2, group, before), expected)
    module = (fla.RMSNormGated if rms else fla.LayerNormGated)(D, 1e-2, group, before, dtype=LONG)
    assert set(module.state_dict()) == ({"weight"} if rms else {"weight", "bias"})
    module.requires_grad_(False).weight.copy_(weight)
    near(module(x, z), function(x, weight, None, z, 1e-2, group, before))
    module.reset_parameters()
    assert bool((module.weight == 1).all())
    assert torch.equal(fla.layernorm_fn(x, weight, bias, is_rms_norm=True), fla.rmsnorm_fn(x, weight, bias))


@pytest.mark.parametrize("option", ["residual", "prenorm", "residual_in_fp32"])
@pytest.mark.parametrize("name", ["rms_norm_gated", "layer_norm_gated", "FusedRMSNormGated", "FusedLayerNormGated"])
def test_residuals_are_not_built(name: str, option: str) -> None:
    x = torch.zeros(3, 8)
    value = {option: x if option == "residual" else True}
    with pytest.raises(NotImplementedError, match=f"^{option} must"):
        if name.startswith("Fused"):
            getattr(fla, name)(8).requires_grad_(False)(x, x, **value)
        else:
            getattr(fla, name)(x, x, x[0], None, **value)


def test_norms_refuse() -> None:
    with pytest.raises(ValueError, match="activation"):
        fla.FusedRMSNormGated(8, activation="gelu")
    with pytest.raises(TypeError, match="norm_eps"):
        fla.FusedRMSNormGated(8, norm_eps=1e-6)
    with pytest.raises(TypeError, match="z must have the dtype"):
        fla.rms_norm_gated(torch.zeros(3, 8), torch.zeros(3, 8).half(), None, None)


# Convolution ---------------------------------------------------------------------------------------------------


def conv(x: torch.Tensor, weight, bias, state, activation) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence ``[T, D]`` after its state ``[D, W]``; returns the output and the new state."""
    width = weight.shape[1]
    columns = torch.cat([state, x.T], 1)
    y = F.conv1d(columns[None, :, 1:], weight[:, None], bias, groups=len(weight))[0].T
    return F.silu(y) if activation else y, columns[:, columns.shape[1] - width :]


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("initial", [False, True], ids=["new", "continued"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_causal_conv1d(width: int, activation: str | None, initial: bool, packed: bool) -> None:
    D, lengths = 6, (9, 1, 0, 3, 4) if packed else (5, 5, 5)
    weight, bias, state = rand(D, width), rand(D), rand(len(lengths), D, width)
    parts = [rand(n, D, seed=i) for i, n in enumerate(lengths)]
    before = state if initial else torch.zeros_like(state)
    expected = [
        conv(part, weight, bias, old, activation) if len(part) else (part, old)
        for part, old in zip(parts, before, strict=True)
    ]
    x = torch.cat(parts)[None] if packed else torch.stack(parts)
    options = {"cu_seqlens": offsets(lengths), "cu_seqlens_cpu": offsets(lengths)} if packed else {}
    options |= {"initial_state": state.clone()} if initial else {}
    y, none = fla.causal_conv1d(x, weight, bias, activation=activation, **options)
    assert none is None
    y, final = fla.causal_conv1d(x, weight, bias, activation=activation, output_final_state=True, **options)
    assert y.is_contiguous() and y.shape == x.shape
    near(y.flatten(0, 1), torch.cat([part for part, _ in expected]))
    near(final, torch.stack([after for _, after in expected]))
    if initial:
        assert torch.equal(options["initial_state"], state)


def test_causal_conv1d_takes_views_and_heads() -> None:
    weight, wide = rand(6, W), rand(2, 5, 10)
    expected = fla.causal_conv1d(wide[..., :6].contiguous(), weight)[0]
    near(fla.causal_conv1d(wide[..., :6], weight, backend="cuda")[0], expected)
    near(fla.causal_conv1d(wide[..., :6].mT.contiguous().mT, weight, backend="mix")[0], expected)
    near(fla.causal_conv1d(wide[..., :6].unflatten(2, (3, 2)), weight)[0].flatten(2), expected)
    empty, state = fla.causal_conv1d(wide[:, :0, :6], weight, output_final_state=True)
    assert empty.shape == (2, 0, 6) and state.shape == (2, 6, W) and not state.any()


@pytest.mark.parametrize("layout", ["[N, D]", "[1, N, D]", "[N, 1, D]"])
def test_causal_conv1d_update_follows_causal_conv1d(layout: str) -> None:
    x, weight, bias = rand(3, 7, 6), rand(6, W), rand(6)
    expected, final = fla.causal_conv1d(x, weight, bias, output_final_state=True, activation="silu")
    _, cache = fla.causal_conv1d(x[:, :5], weight, bias, output_final_state=True)
    for t in (5, 6):
        token = {"[N, D]": x[:, t], "[1, N, D]": x[None, :, t], "[N, 1, D]": x[:, t : t + 1]}[layout]
        y, same = fla.causal_conv1d_update(token, cache, None, weight, bias, "silu")
        assert same is cache and y.shape == token.shape
        near(y.view(3, 6), expected[:, t])
    near(cache, final)


ROW = torch.zeros(1, 5, 6)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"residual": ROW}, NotImplementedError, "residual"),
        ({"cp_context": object()}, NotImplementedError, "cp_context"),
        ({"seq_idx": torch.zeros(1, 5)}, NotImplementedError, "seq_idx"),
        ({"weight": None}, NotImplementedError, "weight"),
        ({"weight": torch.zeros(6, 5)}, NotImplementedError, "2 to 4"),
        ({"backend": "tilelang"}, ValueError, "backend"),
        ({"activation": "gelu"}, ValueError, "activation"),
        ({"initial_state": torch.zeros(1, 6, 3)}, ValueError, "initial_state"),
        ({"output_final_states": True}, TypeError, "output_final_states"),
    ],
)
def test_causal_conv1d_refuses(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fla.causal_conv1d(ROW, **{"weight": torch.zeros(6, W), **options})


def test_causal_conv1d_update_refuses() -> None:
    cache, weight = torch.ones(5, 6, W), torch.zeros(6, W)
    with pytest.raises(NotImplementedError, match="residual"):
        fla.causal_conv1d_update(ROW, cache, ROW, weight)
    with pytest.raises(ValueError, match="cache"):
        fla.causal_conv1d_update(ROW, cache[..., 1:], None, weight)
    with pytest.raises(ValueError, match="x must be"):
        fla.causal_conv1d_update(torch.zeros(2, 5, 6), cache, None, weight)
    with pytest.raises(ValueError, match="activation"):
        fla.causal_conv1d_update(ROW, cache, None, weight, activation="gelu")
    assert bool((cache == 1).all())


# The library itself --------------------------------------------------------------------------------------------

PLACES = {
    "fla.ops.gated_delta_rule": ["chunk_gated_delta_rule", "chunk_gdn"],
    "fla.ops.gated_delta_rule.fused_recurrent": ["fused_recurrent_gated_delta_rule", "fused_recurrent_gdn"],
    "fla.ops.gated_delta_rule.gate": ["fused_gdn_gate"],
    "fla.ops.common.gate": ["fused_beta_sigmoid"],
    "fla.modules.norm.l2norm": ["l2norm", "l2_norm", "L2Norm"],
    "fla.modules.norm.fused_norm_gate": [
        "rms_norm_gated",
        "layer_norm_gated",
        "FusedRMSNormGated",
        "FusedLayerNormGated",
    ],
    "fla.modules.norm.layernorm_gated": ["layernorm_fn", "rmsnorm_fn", "RMSNormGated", "LayerNormGated"],
    "fla.modules.causal_conv1d": ["causal_conv1d", "causal_conv1d_update"],
}
# What FLA reads out of **kwargs, by name.
IN_KWARGS = {
    "chunk_gated_delta_rule": {"use_gate_in_kernel", "A_log", "dt_bias", "chunk_size", "transpose_state_layout"},
    "fused_recurrent_gated_delta_rule": {"transpose_state_layout"},
    "causal_conv1d": {"seq_idx"},
}


def parameters(function: Callable) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]


def test_every_name_is_compared_with_the_library() -> None:
    assert sorted(name for names in PLACES.values() for name in names) == sorted(fla.__all__)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore")
def test_signatures_are_those_of_fla(place: str) -> None:
    pytest.importorskip("fla", reason="fla-core is not installed: pip install -e '.[clients]'")
    module = pytest.importorskip(place)
    for name in PLACES[place]:
        ours, theirs = getattr(fla, name), getattr(module, name)
        pairs = [(ours, theirs)]
        if inspect.isclass(theirs):
            pairs.append((ours.forward, theirs.forward))
            options = {"elementwise_affine": True} if name.startswith("Fused") else {}
            size = () if name == "L2Norm" else (8,)
            assert ours(*size, **options).state_dict().keys() == theirs(*size, **options).state_dict().keys()
        for mine, other in pairs:
            mine, other = parameters(mine), parameters(other)
            assert mine[: len(other)] == other, name
            assert {added for added, _ in mine[len(other) :]} == IN_KWARGS.get(ours.__name__, set()), name
        assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(ours).parameters.values())


@pytest.mark.filterwarnings("ignore")
def test_numbers_are_those_of_flas_own_reference() -> None:
    pytest.importorskip("fla", reason="fla-core is not installed: pip install -e '.[clients]'")
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    x = {name: tensor.float() for name, tensor in cooked(inputs()).items()}
    h0 = rand(2, HV, K, V).float()
    wide = {**x, **{name: x[name].repeat_interleave(HV // H, 2) for name in ("q", "k")}}
    o, state = naive.naive_recurrent_gated_delta_rule(**wide, initial_state=h0, output_final_state=True)
    for rule in RULES:
        actual_o, actual_state = rule(**x, initial_state=h0, output_final_state=True)
        near(actual_o, o, 1e-4)  # fp32 on both sides, states of order ten
        near(actual_state, state, 1e-4)
