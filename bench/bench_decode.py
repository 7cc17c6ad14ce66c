"""packed_decode: gate, sigmoid, l2norm and one token of the delta rule from the conv's output."""

from __future__ import annotations

import peers
import pytest
import torch
from cases import MODELS, Case, Inputs, Tensors, pick, some_heads


def decode(model: str, rows: int, state_dtype: torch.dtype = torch.float32) -> Case:
    """One token a row, its slot one of twice as many, in random order."""
    shape, state = MODELS[model], str(state_dtype).removeprefix("torch.")

    def inputs(make: Inputs) -> Tensors:
        return {
            "mixed_qkv": make.normal(rows, shape.conv_channels),
            **{name: make.normal(rows, shape.num_v_heads) for name in ("a", "b")},
            **make.gate_parameters(shape),
            "state": make.pool(shape, 2 * rows, dtype=state_dtype),
            "state_indices": make.slots(rows),
            "num_k_heads": shape.num_k_heads,
        }

    return Case(
        "packed_decode",
        f"{model}-decode-n{rows}" + ("" if state_dtype is torch.float32 else f"-{state}-state"),
        inputs,
        traffic={"state": 1.0},  # half the slots, read and written
        **some_heads(shape),
        peers=peers.DECODE.get((shape.num_k_heads, shape.num_v_heads, rows, state), {}),
    )


CASES = pick(
    on_gpu=[
        *(decode("qwen3-next-tp1", rows) for rows in (1, 8, 32, 64, 128, 256)),
        *(decode("qwen3-next-tp1", rows, torch.bfloat16) for rows in (1, 32, 128)),
        decode("qwen3-next-tp4", 1),
        decode("qwen3-next-tp4", 64),
        decode("qwen3.5-tp1", 32),
        decode("qwen3.5-tp1", 128),
        decode("qwen3.5-tp8", 128),
    ],
    on_cpu=[decode("qwen3-next-tp8", 4), decode("qwen3-next-tp8", 4, torch.bfloat16)],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(case, measure):
    measure(case)
