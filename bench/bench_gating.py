"""gating: a, b to g, beta."""

from __future__ import annotations

import pytest
from cases import MODELS, Case, Inputs, Tensors, pick


def gating(model: str, tokens: int) -> Case:
    shape = MODELS[model]

    def inputs(make: Inputs) -> Tensors:
        gates = {name: make.normal(tokens, shape.num_v_heads) for name in ("a", "b")}
        return {**gates, **make.gate_parameters(shape)}

    return Case("gating", f"{model}-gating-t{tokens}", inputs)


CASES = pick(
    on_gpu=[
        gating("qwen3-next-tp1", 64),
        gating("qwen3-next-tp1", 8192),
        gating("qwen3-next-tp1", 32768),
        gating("qwen3-next-tp4", 8192),
    ],
    on_cpu=[gating("qwen3-next-tp8", 256)],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gating(case, measure):
    measure(case)
