"""causal_conv1d (prefill), causal_conv1d_update (decode) and causal_conv1d_verify (drafts), on a channel-last pool."""

from __future__ import annotations

import peers
import pytest
import torch
from cases import DEVICE, MODELS, Case, Inputs, Tensors, lengths, pick, some_channels


def conv(model: str, sequences: str) -> Case:
    """Every sequence reads and writes its slot, one of twice as many in the pool."""
    shape, tokens = MODELS[model], lengths(sequences)

    def inputs(make: Inputs) -> Tensors:
        return {
            "x": make.normal(sum(tokens), shape.conv_channels),
            "weight": make.normal(shape.conv_channels, shape.conv_width),
            "bias": None,
            "conv_state": make.conv_pool(shape, 2 * len(tokens)),
            "cu_seqlens": make.offsets(tokens),
            "state_indices": make.slots(len(tokens)),
        }

    return Case(
        "causal_conv1d",
        f"{model}-conv-{sequences}",
        inputs,
        traffic={"conv_state": 1.0},  # half the slots, read and written
        **some_channels(shape),
        peers=peers.CONV.get((shape.conv_channels, sequences), {}),
    )


def update(model: str, rows: int, drafts: int = 0) -> Case:
    """One new token a row; with ``drafts`` so many, after as many accepted ones of a wider state."""
    shape = MODELS[model]
    columns = shape.conv_width - 2 + drafts if drafts else None

    def inputs(make: Inputs) -> Tensors:
        tensors = {
            "x": make.normal(rows, *([drafts] if drafts else []), shape.conv_channels),
            "weight": make.normal(shape.conv_channels, shape.conv_width),
            "bias": None,
            "conv_state": make.conv_pool(shape, 2 * rows, columns),
            "state_indices": make.slots(rows),
        }
        if drafts:
            tensors["num_accepted_tokens"] = 1 + torch.arange(rows, dtype=torch.int32, device=DEVICE) % drafts
        return tensors

    return Case(
        "causal_conv1d_update",
        f"{model}-conv-update-n{rows}{f'-t{drafts}' if drafts else ''}",
        inputs,
        traffic={"conv_state": 1.0},
        **some_channels(shape),
        peers={} if drafts else peers.CONV_UPDATE.get((shape.conv_channels, rows), {}),
    )


def verify(model: str, rows: int, drafts: int) -> Case:
    """A chain of drafts a row; the pool is read only, each token's window is kept."""
    shape = MODELS[model]

    def inputs(make: Inputs) -> Tensors:
        return {
            "x": make.normal(rows, drafts, shape.conv_channels),
            "weight": make.normal(shape.conv_channels, shape.conv_width),
            "bias": None,
            "conv_state": make.conv_pool(shape, 2 * rows),
            "intermediate_windows": make.unwritten(rows, drafts, shape.conv_channels, shape.conv_width - 1),
            "state_indices": make.slots(rows),
        }

    return Case(
        "causal_conv1d_verify",
        f"{model}-conv-verify-n{rows}-t{drafts}",
        inputs,
        traffic={"conv_state": 0.5},
        **some_channels(shape),
    )


CASES = pick(
    on_gpu=[
        *(conv("qwen3-next-tp1", sequences) for sequences in ("2048", "8192", "32768", "8x1024", "mixed64")),
        conv("qwen3-next-tp4", "8192"),
        *(update("qwen3-next-tp1", rows) for rows in (1, 8, 32, 128, 256)),
        update("qwen3-next-tp4", 64),
        update("qwen3-next-tp1", 64, drafts=4),
        verify("qwen3-next-tp1", 64, drafts=4),
    ],
    on_cpu=[
        conv("qwen3-next-tp8", "4x64"),
        update("qwen3-next-tp8", 4),
        update("qwen3-next-tp8", 4, drafts=3),
        verify("qwen3-next-tp8", 4, drafts=3),
    ],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv(case, measure):
    measure(case)
