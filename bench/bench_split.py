"""split_qkvz_ba: the interleaved in-projections of Qwen3-Next to q|k|v, z, b, a."""

from __future__ import annotations

import pytest
from cases import MODELS, Case, Inputs, Tensors, pick, some_rows


def split(model: str, tokens: int) -> Case:
    shape = MODELS[model]
    heads = {name: getattr(shape, name) for name in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")}
    width = shape.conv_channels + shape.num_v_heads * shape.head_v_dim

    def inputs(make: Inputs) -> Tensors:
        return {"qkvz": make.normal(tokens, width), "ba": make.normal(tokens, 2 * shape.num_v_heads), **heads}

    parts = some_rows(tokens, "qkvz", "ba", "mixed_qkv", "z", "b", "a")
    return Case("split_qkvz_ba", f"{model}-split-t{tokens}", inputs, **parts)


CASES = pick(
    on_gpu=[
        split("qwen3-next-tp1", 64),
        split("qwen3-next-tp1", 2048),
        split("qwen3-next-tp1", 8192),
        split("qwen3-next-tp4", 8192),
    ],
    on_cpu=[split("qwen3-next-tp8", 256)],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split(case, measure):
    measure(case)
