"""layer_norm_gated, its out and fp8 variants, and l2norm over the rows of a batch of tokens."""

from __future__ import annotations

import peers
import pytest
import torch
from cases import MODELS, Case, Inputs, Tensors, pick, some_rows


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
