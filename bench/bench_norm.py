"""layer_norm_gated, layer_norm_gated_out and l2norm over the rows of a batch of tokens."""

from __future__ import annotations

import peers
import pytest
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
        l2norm("qwen3-next-tp1", 64),
        l2norm("qwen3-next-tp1", 8192),
    ],
    on_cpu=[norm("qwen3-next-tp8", 256), norm("qwen3-next-tp8", 256, out=True), l2norm("qwen3-next-tp8", 256)],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm(case, measure):
    measure(case)
