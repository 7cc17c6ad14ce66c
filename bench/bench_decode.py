"""packed_decode and its out variant: gate, sigmoid, l2norm and one token of the delta rule from the conv's output."""

from __future__ import annotations

import peers
import pytest
import torch
from cases import DEVICE, MODELS, Case, Inputs, Tensors, pick, some_heads


def decode(
    model: str, rows: int, state_dtype: torch.dtype = torch.float32, *, rounded: bool = False, out: bool = False
) -> Case:
    """One token a row, its slot one of twice as many, in random order; ``rounded``: stored with a rounding seed."""
    shape, state = MODELS[model], str(state_dtype).removeprefix("torch.")

    def inputs(make: Inputs) -> Tensors:
        return {
            "mixed_qkv": make.normal(rows, shape.conv_channels),
            **{name: make.normal(rows, shape.num_v_heads) for name in ("a", "b")},
            **make.gate_parameters(shape),
            "state": make.pool(shape, 2 * rows, dtype=state_dtype),
            **({"out": make.unwritten(rows, shape.num_v_heads, shape.head_v_dim)} if out else {}),
            "state_indices": make.slots(rows),
            "num_k_heads": shape.num_k_heads,
            **({"rounding_seed": torch.zeros(1, dtype=torch.int64, device=DEVICE)} if rounded else {}),
        }

    return Case(
        "packed_decode_out" if out else "packed_decode",
        f"{model}-decode{'-out' if out else ''}-n{rows}"
        + ("" if state_dtype is torch.float32 else f"-{state}-state")
        + ("-rounded" if rounded else ""),
        inputs,
        traffic={"state": 1.0},  # half the slots, read and written
        **some_heads(shape),
        peers={} if rounded or out else peers.DECODE.get((shape.num_k_heads, shape.num_v_heads, rows, state), {}),
    )


CASES = pick(
    on_gpu=[
        *(
            decode(model, rows, state_dtype)
            for model in ("qwen3-next-tp1", "qwen3.5-tp4", "qwen3.5-tp1")
            for rows in (1, 8, 32, 128, 256)
            for state_dtype in (torch.float32, torch.bfloat16)
        ),
        *(decode("qwen3-next-tp1", rows, torch.bfloat16, rounded=True) for rows in (1, 32, 128)),
        *(decode("qwen3-next-tp1", rows, torch.bfloat16, out=True) for rows in (1, 8, 128)),
        decode("qwen3-next-tp4", 64),
        decode("qwen3.5-tp8", 128),
    ],
    on_cpu=[
        decode("qwen3-next-tp8", 4),
        decode("qwen3-next-tp8", 4, torch.bfloat16),
        decode("qwen3-next-tp8", 4, torch.bfloat16, rounded=True),
        decode("qwen3-next-tp8", 4, out=True),
    ],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(case, measure):
    measure(case)
