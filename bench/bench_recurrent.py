"""recurrent_gated_delta_rule, functional, on a pool (decode, and drafts with a slot a token), and for verify."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, MODELS, Case, Inputs, Tensors, lengths, pick, some_heads


def functional(model: str, sequences: str) -> Case:
    """Short sequences, token by token."""
    shape, tokens = MODELS[model], lengths(sequences)

    def inputs(make: Inputs) -> Tensors:
        return {
            **make.delta(shape, 1, sum(tokens)),
            "initial_state": make.pool(shape, len(tokens)),
            "cu_seqlens": make.offsets(tokens),
        }

    return Case("recurrent_gated_delta_rule", f"{model}-recurrent-{sequences}", inputs, **some_heads(shape))


def paged(model: str, rows: int, tokens: int = 1) -> Case:
    """A few tokens a row, its slot read before the first and written after the last."""
    shape = MODELS[model]

    def inputs(make: Inputs) -> Tensors:
        slots = make.slots(rows)
        return {**make.delta(shape, rows, tokens), "state": make.pool(shape, 2 * rows), "state_indices": slots}

    return Case(
        "recurrent_gated_delta_rule_paged",
        f"{model}-recurrent-paged-n{rows}" + (f"-t{tokens}-last" if tokens > 1 else ""),
        inputs,
        traffic={"state": 1.0},  # half the slots, read and written
        **some_heads(shape),
    )


def paged_drafts(model: str, rows: int, drafts: int) -> Case:
    """Each token's state goes to a slot of its own; a row starts from the slot of its last accepted token."""
    shape = MODELS[model]

    def inputs(make: Inputs) -> Tensors:
        return {
            **make.delta(shape, rows, drafts),
            "state": make.pool(shape, 2 * rows * drafts),
            "state_indices": make.slots(rows * drafts).view(rows, drafts),
            "num_accepted_tokens": 1 + torch.arange(rows, dtype=torch.int32, device=DEVICE) % drafts,
        }

    return Case(
        "recurrent_gated_delta_rule_paged",
        f"{model}-recurrent-paged-n{rows}-t{drafts}",
        inputs,
        traffic={"state": (1 + 1 / drafts) / 2},  # a row reads one slot and writes one a token, of twice as many
        **some_heads(shape),
    )


def verify(model: str, rows: int, drafts: int) -> Case:
    """A chain of drafts a row; the pool is read only, each token's state is kept."""
    shape = MODELS[model]

    def inputs(make: Inputs) -> Tensors:
        state = make.pool(shape, 2 * rows)
        return {
            **make.delta(shape, rows, drafts),
            "state": state,
            "intermediate_states": make.unwritten(rows, drafts, *state.shape[1:], dtype=torch.float32),
            "state_indices": make.slots(rows),
        }

    return Case(
        "recurrent_gated_delta_rule_verify",
        f"{model}-verify-n{rows}-t{drafts}",
        inputs,
        traffic={"state": 0.5},
        **some_heads(shape),
    )


CASES = pick(
    on_gpu=[
        functional("qwen3-next-tp1", "16x16"),
        *(paged("qwen3-next-tp1", 64, tokens) for tokens in (1, 4)),
        paged_drafts("qwen3-next-tp1", 16, 4),
        *(paged_drafts("qwen3-next-tp1", 64, drafts) for drafts in (1, 4)),
        verify("qwen3-next-tp1", 16, 4),
        *(verify("qwen3-next-tp1", 64, drafts) for drafts in (1, 4)),
        verify("qwen3-next-tp4", 64, 4),
    ],
    on_cpu=[
        functional("qwen3-next-tp8", "2x8"),
        paged("qwen3-next-tp8", 4),
        paged_drafts("qwen3-next-tp8", 2, 3),
        verify("qwen3-next-tp8", 2, 3),
    ],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recurrent(case, measure):
    measure(case)
