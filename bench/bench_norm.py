"""layer_norm_gated, its out and fp8 variants, and l2norm over the rows of a batch of tokens."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import peers
import pytest
import timing
import torch
from cases import DEVICE, DTYPE, MODELS, ON_GPU, Case, Inputs, Tensors, pick, some_rows

import gdn_kernels


def norm(model: str, tokens: int, *, out: bool = False) -> Case:
    """RMS norm times silu(z) of ``[T, HV, 128]``, as after the delta rule."""
    shape = MODELS[model]
    rows = (tokens, shape.num_v_heads, shape.head_v_dim)

    def inputs(make: Inputs) -> Tensors:
        tensors = {"x": make.normal(*rows), "weight": make.normal(rows[-1]), "bias": None, "z": make.normal(*rows)}
        return {**tensors, **({"out": make.unwritten(*rows)} if out else {}), "norm_before_gate": True}

    return Case(
        "layer_norm_gated_out" if out else "layer_norm_gated",
        f"{model}-norm{'-out' if out else ''}-t{tokens}",
        inputs,
        **some_rows(tokens, "x", "z", "out", "return"),
        peers=peers.NORM.get(tokens * shape.num_v_heads, {}),
    )


def norm_fp8(model: str, tokens: int) -> Case:
    """The same, quantised. Beside the unfused norm's cases: this one moves 5 bytes an element in bf16, not 6."""
    plain = norm(model, tokens)
    return Case(
        "layer_norm_gated_fp8",
        f"{model}-norm-fp8-t{tokens}",
        plain.inputs,
        **some_rows(tokens, "x", "z", "values", "scales"),
        # one rounding to e4m3, after which the scales carry one of the largest value to the activations' dtype
        budgets={torch.float8_e4m3fn: 2.0**-4, torch.float32: 2.0**-8},
    )


def l2norm(model: str, tokens: int) -> Case:
    """The rows of q, a column view of the conv's output."""
    shape = MODELS[model]
    keys = shape.num_k_heads * shape.head_k_dim

    def inputs(make: Inputs) -> Tensors:
        q = make.normal(tokens, shape.conv_channels)[:, :keys]
        return {"x": q.unflatten(1, (shape.num_k_heads, shape.head_k_dim))}

    return Case("l2norm", f"{model}-l2norm-t{tokens}", inputs, **some_rows(tokens, "x", "return"))


CASES = pick(
    on_gpu=[
        *(norm("qwen3-next-tp1", tokens) for tokens in (1, 16, 128, 512, 2048, 8192, 32768)),
        norm("qwen3-next-tp4", 8192),
        norm("qwen3-next-tp1", 2048, out=True),
        *(norm_fp8("qwen3-next-tp1", tokens) for tokens in (1, 16, 128, 512, 2048, 8192, 32768)),
        l2norm("qwen3-next-tp1", 64),
        l2norm("qwen3-next-tp1", 8192),
    ],
    on_cpu=[
        norm("qwen3-next-tp8", 256),
        norm("qwen3-next-tp8", 256, out=True),
        norm_fp8("qwen3-next-tp8", 256),
        l2norm("qwen3-next-tp8", 256),
    ],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm(case, measure):
    measure(case)


# ---------------------------------------------------------------------------------------------------------------
# Side by side: RMS norm of 128 columns times silu(z) by every provider that imports here
# ---------------------------------------------------------------------------------------------------------------

Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return gdn_kernels.layer_norm_gated(x, weight, None, z, norm_before_gate=True)


def eager(x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    u, w, gate = (y if y.dtype is torch.float64 else y.float() for y in (x, weight, z))
    u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-6)
    return (u * w * torch.nn.functional.silu(gate)).to(x.dtype)


def fla() -> Norm:
    function = importlib.import_module("fla.modules.fused_norm_gate").rms_norm_gated
    return lambda x, weight, z: function(x, z, weight, None, activation="swish", eps=1e-6)


PROVIDERS: dict[str, Callable[[], Norm]] = {"gdn_kernels": lambda: ours, "torch": lambda: eager, "fla": fla}


@pytest.mark.parametrize("rows", (32, 512, 4096, 16384, 65536, 262144, 1048576) if ON_GPU else (32, 4096))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_norm_of_each_provider(provider: str, rows: int, benchmark) -> None:
    """GPU time over rotated buffers, and host time behind a queue that never runs dry, both in ``extra_info``."""
    try:
        norm = PROVIDERS[provider]()
    except ImportError as error:
        pytest.skip(f"{provider} does not import: {error}")
    sets = timing.copies(3 * rows * 128 * DTYPE.itemsize) if ON_GPU else 1
    tensors = []
    for seed in range(sets):
        make = Inputs(seed)
        tensors.append((make.normal(rows, 128), make.normal(128), make.normal(rows, 128)))
    with torch.no_grad():
        error = (norm(*tensors[0]).double() - eager(*(x.double() for x in tensors[0]))).norm()
        assert error <= 2.0**-7 * eager(*(x.double() for x in tensors[0])).norm()
        facts = {"provider": provider, "rows": rows, "device": str(DEVICE), **timing.versions()}
        facts["host_us"] = timing.queued_host_us(lambda: norm(*tensors[0]))
        if ON_GPU:
            facts["gpu_us"] = timing.graph_us([lambda each=each: norm(*each) for each in tensors], max(5, sets))
        benchmark.group = f"norm of {rows} rows"
        benchmark.extra_info.update(facts)
        benchmark.pedantic(lambda: norm(*tensors[0]), setup=timing.synchronize, rounds=timing.HOST_ROUNDS)
