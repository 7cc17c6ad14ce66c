"""chunk_gated_delta_rule, functional and on a state pool: prefill."""

from __future__ import annotations

import peers
import pytest
import torch
from cases import CHUNK_BUDGETS, DEVICE, MODELS, Case, Inputs, Tensors, lengths, pick, some_heads


def prefill(model: str, sequences: str) -> Case:
    """Functional, fp32 states given and returned, q and k normalised beforehand, gates in fp32."""
    shape, tokens = MODELS[model], lengths(sequences)

    def inputs(make: Inputs) -> Tensors:
        return {
            **make.delta(shape, 1, sum(tokens), raw=False),
            "initial_state": make.pool(shape, len(tokens)),
            "cu_seqlens": make.offsets(tokens),
        }

    return Case(
        "chunk_gated_delta_rule",
        f"{model}-prefill-{sequences}",
        inputs,
        **some_heads(shape),
        budgets=CHUNK_BUDGETS,
        peers=peers.PREFILL.get((shape.num_k_heads, shape.num_v_heads, sequences), {}),
    )


def paged(model: str, sequences: str, interval: int | None = None) -> Case:
    """As a layer calls it: raw gates, l2norm inside, states in a pool; with ``interval`` also checkpoints."""
    shape, tokens = MODELS[model], lengths(sequences)

    def inputs(make: Inputs) -> Tensors:
        count = sum(tokens)
        tensors = {
            **make.delta(shape, 1, count),
            "state": make.pool(shape, 2 * len(tokens)),
            "out": make.unwritten(1, count, shape.num_v_heads, shape.head_v_dim),
            "state_indices": make.slots(len(tokens)),
            "cu_seqlens": make.offsets(tokens),
            "has_initial_state": torch.ones(len(tokens), dtype=torch.bool, device=DEVICE),
        }
        if interval is None:
            return tensors
        offsets = make.offsets([length // interval for length in tokens])
        rows = sum(length // interval for length in tokens)
        kept = make.unwritten(rows, *tensors["state"].shape[1:], dtype=torch.float32)
        return {**tensors, "checkpoints": kept, "checkpoint_offsets": offsets, "checkpoint_interval": interval}

    return Case(
        "chunk_gated_delta_rule_paged" + ("_checkpoints" if interval else ""),
        f"{model}-prefill-{f'checkpoints-{interval}' if interval else 'paged'}-{sequences}",
        inputs,
        traffic={"state": 1.0},  # half the slots, read and written
        **some_heads(shape),
        budgets=CHUNK_BUDGETS,
    )


CASES = pick(
    on_gpu=[
        *(prefill("qwen3-next-tp1", each) for each in ("512", "2048", "8192", "32768", "8x1024", "32x256", "mixed64")),
        prefill("qwen3-next-tp4", "8192"),
        prefill("qwen3.5-tp1", "8192"),
        prefill("qwen3.5-tp8", "8192"),
        prefill("qwen3.5-tp8", "32768"),
        paged("qwen3-next-tp1", "8192"),
        paged("qwen3-next-tp1", "mixed64"),
        paged("qwen3-next-tp1", "8192", interval=1024),
    ],
    on_cpu=[
        prefill("qwen3-next-tp8", "2x128"),
        paged("qwen3-next-tp8", "2x100"),
        paged("qwen3-next-tp8", "2x128", interval=64),
    ],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunk(case, measure):
    measure(case)
