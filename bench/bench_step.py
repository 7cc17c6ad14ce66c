"""decode_step and its fp8 variant: conv update, recurrence and gated norm of one token a sequence in one kernel."""

from __future__ import annotations

import peers
import pytest
import torch
from cases import BUDGETS, MODELS, ON_GPU, Case, Inputs, Tensors, pick, some_heads

# The outputs of conv, recurrence and norm are each rounded to bf16; one more rounding to e4m3.
STEP_BUDGETS = {**(dict.fromkeys(BUDGETS, 3 * 2.0**-8) if ON_GPU else BUDGETS), torch.float8_e4m3fn: 2.0**-4}


def step(model: str, rows: int, state_dtype: torch.dtype = torch.float32, *, fp8: bool = False) -> Case:
    """One token a row, its slot one of twice as many, in random order, in both pools."""
    shape, state = MODELS[model], str(state_dtype).removeprefix("torch.")
    heads = shape.num_v_heads, shape.head_v_dim

    def inputs(make: Inputs) -> Tensors:
        return {
            "mixed_qkv": make.normal(rows, shape.conv_channels),
            **{name: make.normal(rows, shape.num_v_heads) for name in ("a", "b")},
            "z": make.normal(rows, *heads),
            "conv_weight": make.normal(shape.conv_channels, shape.conv_width),
            "conv_bias": None,
            "conv_state": make.conv_pool(shape, 2 * rows),
            **make.gate_parameters(shape),
            "state": make.pool(shape, 2 * rows, dtype=state_dtype),
            "norm_weight": make.normal(shape.head_v_dim),
            "state_indices": make.slots(rows),
            "num_k_heads": shape.num_k_heads,
            "norm_before_gate": True,
        }

    some = some_heads(shape)
    parts = {**some["parts"], **dict.fromkeys(("z", "values"), some["parts"]["return"]), "scales": some["parts"]["a"]}
    kind = "" if state_dtype is torch.float32 else f"-{state}-state"
    return Case(
        "decode_step_fp8" if fp8 else "decode_step",
        f"{model}-step{'-fp8' if fp8 else ''}-n{rows}{kind}",
        inputs,
        traffic={"state": 1.0, "conv_state": 1.0},  # half the slots, read and written
        parts=parts,
        checked=some["checked"],
        budgets=STEP_BUDGETS,
        peers={} if fp8 else peers.STEP.get((shape.num_k_heads, shape.num_v_heads, rows, state), {}),
    )


CASES = pick(
    on_gpu=[
        *(step("qwen3-next-tp1", rows) for rows in (1, 8, 32, 128, 256)),
        *(step("qwen3-next-tp1", rows, torch.bfloat16) for rows in (1, 8, 32, 128, 256)),
        *(step("qwen3-next-tp1", rows, fp8=True) for rows in (1, 32, 128)),
        step("qwen3-next-tp4", 64),
        step("qwen3.5-tp1", 32),
    ],
    on_cpu=[
        step("qwen3-next-tp8", 4),
        step("qwen3-next-tp8", 4, torch.bfloat16),
        step("qwen3-next-tp8", 4, fp8=True),
    ],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case, measure):
    measure(case)
