"""Inputs of the delta rule for tests: random, ragged, strided, poisoned; and the fp64 oracle over them."""

from __future__ import annotations

import dataclasses

import torch

from gdn_kernels.reference import recurrent


@dataclasses.dataclass
class Inputs:
    """Packed inputs of sequences with the given lengths, as column views of one wide tensor."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    initial_state: torch.Tensor
    cu_seqlens: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    @property
    def real_tokens(self) -> int:
        return int(self.cu_seqlens[-1])


def delta_inputs(
    lengths=(64,),
    H=1,
    HV=2,
    K=64,
    V=64,
    dtype=torch.float32,
    *,
    device="cpu",
    padding=0,
    seed=0,
    keys="random",
    gates="random",
    beta_value=None,
    normalise=True,
    index_dtype=torch.int32,
) -> Inputs:
    """``padding`` rows of NaN follow the last sequence. ``keys``: random, positive, identical, zero. ``gates``: random,
    none (g = 0), strong (some -inf). The same numbers come for every dtype and device, rounded to the dtype."""
    random = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    total = tokens + padding

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    q, k, v = normal(total, H, K), normal(total, H, K), normal(total, HV, V)
    if keys == "positive":
        k = k.abs() + 0.5
    elif keys == "identical":
        k = k[:1].expand_as(k).clone() if total else k
    elif keys == "zero":
        k = torch.zeros_like(k)
    if normalise:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    g = torch.nn.functional.logsigmoid(normal(total, HV) + 2)
    if gates == "none":
        g = torch.zeros_like(g)
    elif gates == "strong":
        g = g * 30
        g[torch.rand(total, HV, generator=random, dtype=torch.float64) < 0.1] = -torch.inf
    beta = torch.sigmoid(normal(total, HV))
    if beta_value is not None:
        beta = torch.full_like(beta, beta_value)
    state = normal(len(lengths), HV, V, K)
    for tensor in (q, k, v, g, beta):
        tensor[tokens:] = torch.nan
    wide = torch.cat([x.flatten(1) for x in (q, k, v)], dim=-1).to(dtype).to(device)
    keys_width = H * K
    return Inputs(
        q=wide[:, :keys_width].view(1, total, H, K),
        k=wide[:, keys_width : 2 * keys_width].view(1, total, H, K),
        v=wide[:, 2 * keys_width :].view(1, total, HV, V),
        g=g.to(torch.float32).to(device)[None],
        beta=beta.to(torch.float32).to(device)[None],
        initial_state=state.to(torch.float32).to(device),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=index_dtype, device=device),
    )


def oracle(inputs: Inputs, initial_state: torch.Tensor | None = None, **options):
    """fp64 ``o`` and final state, on the CPU, of what the inputs hold after rounding to their dtype."""
    to = lambda x: x.detach().cpu().double()  # noqa: E731
    options = {name: to(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    tensors = [torch.nan_to_num(to(x), neginf=-torch.inf) for x in inputs.tensors]
    return recurrent.recurrent_gated_delta_rule(
        *tensors,
        cu_seqlens=inputs.cu_seqlens.cpu(),
        initial_state=None if initial_state is None else to(initial_state),
        **options,
    )


def relative_error(result: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the difference over RMS of ``wanted``; infinite where ``result`` is not finite."""
    result = result.detach().cpu().double()
    if not torch.isfinite(result).all():
        return float("inf")
    return float((result - wanted).norm() / wanted.norm().clamp_min(1e-30))


def assert_close(result: torch.Tensor, wanted: torch.Tensor, budget: float, what: str) -> None:
    """Relative RMS error within ``budget``; prints the worst coordinate."""
    error = relative_error(result, wanted)
    difference = (result.detach().cpu().double() - wanted).abs()
    where = (
        [int(i) for i in torch.unravel_index(difference.nan_to_num(nan=torch.inf).argmax(), difference.shape)]
        if difference.numel()
        else []
    )
    print(f"{what}: relative error {error:.2e}, budget {budget:.2e}, worst at {where}")
    assert error <= budget, f"{what}: relative error {error:.2e} above {budget:.2e}, worst at {where}"


# The numerics that must not break, by name: inputs, and options of the call. For 16-bit operands, on every device.
HARD = {
    "tails": ({"lengths": (1, 63, 64, 65, 0, 127), "padding": 5}, {}),
    "one-value-head-a-key-head": ({"lengths": (70,), "H": 2, "HV": 2}, {}),
    "three-value-heads-a-key-head": ({"lengths": (70,), "H": 1, "HV": 3}, {}),
    "four-value-heads-a-key-head": ({"lengths": (70,), "H": 1, "HV": 4}, {}),
    "heads-of-128": ({"lengths": (70,), "K": 128, "V": 128}, {}),
    "heads-of-256": ({"lengths": (66,), "HV": 1, "K": 256, "V": 256}, {}),
    "heads-of-256-and-64": ({"lengths": (66,), "HV": 1, "K": 256, "V": 64}, {}),
    "no-decay": ({"lengths": (130,), "gates": "none"}, {}),
    "gates-of-minus-infinity": ({"lengths": (130, 3), "gates": "strong"}, {}),
    "beta-0": ({"lengths": (130,), "beta_value": 0.0}, {}),
    "beta-1": ({"lengths": (130,), "beta_value": 1.0}, {}),
    "positive-keys": ({"lengths": (130,), "keys": "positive"}, {}),
    "identical-keys-beta-1": ({"lengths": (130,), "keys": "identical", "beta_value": 1.0}, {}),
    "all-zero-keys": ({"lengths": (70,), "keys": "zero"}, {"use_qk_l2norm": True}),
    "keys-and-queries-of-any-length": ({"lengths": (70, 3), "normalise": False}, {"use_qk_l2norm": True}),
}

# Relative RMS for the above: operands rounded to 11 (8) bits, and results of the chunk form within prefill.md's 5e-3.
HARD_BUDGETS = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
# Reflections, undamped: sums of 64 alternating entries of the inverse, each up to 2 and rounded to the operands' bits,
# so sqrt(64) * 2 units in the last place of 1. No form that rounds the inverse to 16 bits does better.
REFLECTION = {"lengths": (64,), "keys": "identical", "beta_value": 1.98, "gates": "none"}
REFLECTION_BUDGETS = {torch.float16: 16 * 2.0**-11, torch.bfloat16: 16 * 2.0**-8}
