"""linear_attention_with_output: conv and delta rule of a layer, through the forward context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CHUNK_BUDGETS, DEVICE, MODELS, Case, Inputs, Tensors, lengths, pick, some_heads

from gdn_kernels import graphs
from gdn_kernels.reference import chunk, conv, decode

LAYER = ("num_k_heads", "conv_weight", "conv_bias", "A_log", "dt_bias", "conv_state", "recurrent_state")
BATCH = ("state_indices", "cu_seqlens", "has_initial_state")


class SplitPoint(Case):
    """Its layer and batch are inputs too. Entering the forward context, 1 to 2 us, is part of the call."""

    def bind(self, tensors: Tensors) -> Callable[[], Any]:
        layers = {0: graphs.LayerState(**{name: tensors[name] for name in LAYER})}
        batch = graphs.BatchMetadata(**{name: tensors[name] for name in BATCH})
        arguments = [tensors[name] for name in ("mixed_qkv", "a", "b", "output")]

        def call() -> None:
            with graphs.forward_context(layers, batch):
                torch.ops.gdn.linear_attention_with_output(*arguments, 0)

        return call

    def reference(self, tensors: Tensors) -> None:
        """conv, then decode or chunks, of the reference."""
        t = tensors
        mixed, weight, slots, heads = t["mixed_qkv"], t["conv_weight"], t["state_indices"], t["num_k_heads"]
        state, gates = t["recurrent_state"], {"A_log": t["A_log"], "dt_bias": t["dt_bias"]}
        if t["cu_seqlens"] is None:
            mixed = conv.causal_conv1d_update(mixed, weight, None, t["conv_state"], state_indices=slots)
            o = decode.packed_decode(
                mixed, t["a"], t["b"], *gates.values(), state, slots, num_k_heads=heads, use_qk_l2norm=True
            )
            t["output"].copy_(o)
            return
        initial = {"has_initial_state": t["has_initial_state"]}
        mixed = conv.causal_conv1d(
            mixed, weight, None, t["conv_state"], t["cu_seqlens"], state_indices=slots, **initial
        )
        keys, values = heads * state.shape[3], state.shape[1] * state.shape[2]
        q, k, v = mixed[None].split((keys, keys, values), dim=-1)
        chunk.chunk_gated_delta_rule_paged(
            q.unflatten(-1, (heads, -1)),
            k.unflatten(-1, (heads, -1)),
            v.unflatten(-1, (state.shape[1], -1)),
            t["a"][None],
            t["b"][None],
            state,
            t["output"][None],
            slots,
            t["cu_seqlens"],
            use_qk_l2norm=True,
            **gates,
            **initial,
        )

    @property
    def written(self) -> list[str]:
        return ["output", "conv_state", "recurrent_state"]


def split_point(model: str, *, rows: int | None = None, sequences: str | None = None) -> Case:
    """A decode of ``rows`` sequences, or a prefill of ``sequences``."""
    shape = MODELS[model]
    tokens = [1] * (rows or 0) if sequences is None else lengths(sequences)

    def inputs(make: Inputs) -> Tensors:
        count, is_prefill = len(tokens), sequences is not None
        return {
            "mixed_qkv": make.normal(sum(tokens), shape.conv_channels),
            **{name: make.normal(sum(tokens), shape.num_v_heads) for name in ("a", "b")},
            "output": make.unwritten(sum(tokens), shape.num_v_heads, shape.head_v_dim),
            "num_k_heads": shape.num_k_heads,
            "conv_weight": make.normal(shape.conv_channels, shape.conv_width),
            "conv_bias": None,
            **make.gate_parameters(shape),
            "conv_state": make.conv_pool(shape, 2 * count),
            "recurrent_state": make.pool(shape, 2 * count),
            "state_indices": make.slots(count),
            "cu_seqlens": make.offsets(tokens) if is_prefill else None,
            "has_initial_state": torch.ones(count, dtype=torch.bool, device=DEVICE) if is_prefill else None,
        }

    return SplitPoint(
        "linear_attention_with_output",
        f"{model}-split-point-" + (f"decode-n{rows}" if sequences is None else f"prefill-{sequences}"),
        inputs,
        traffic={"conv_state": 1.0, "recurrent_state": 1.0},  # half the slots, read and written
        **some_heads(shape),
        budgets=CHUNK_BUDGETS,
    )


CASES = pick(
    on_gpu=[
        split_point("qwen3-next-tp1", rows=1),
        split_point("qwen3-next-tp1", rows=64),
        split_point("qwen3-next-tp1", sequences="8x1024"),
    ],
    on_cpu=[split_point("qwen3-next-tp8", rows=4), split_point("qwen3-next-tp8", sequences="2x100")],
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_point(case, measure):
    measure(case)
