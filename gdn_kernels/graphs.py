"""The split point between what is captured and what stays outside: forward context, batch metadata, the operator.

An engine compiles and captures a model's projections, splits, norms and out-projections for every token count, and
leaves the core of the mixer (conv and delta rule, which need the batch's metadata) to one opaque operator,
``gdn::linear_attention_with_output``. The operator writes a caller's buffer and returns nothing; it finds its layer and
the batch in the forward context of its thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping

import torch

from gdn_kernels import contracts
from gdn_kernels.ops.registry import define


@dataclasses.dataclass(frozen=True)
class BatchMetadata:
    """What one forward pass knows of its batch. The tensors may be persistent buffers of a captured graph.

    Args:
        state_indices: ``[N]`` int32 or int64, the state slot of each sequence; ``pad_slot_id``, negative or past the
            pool: padding.
        cu_seqlens: ``[N + 1]`` for a prefill, the tokens of each sequence. None for a decode: row n of the batch is the
            one new token of sequence n; rows past N are padding.
        has_initial_state: ``[N]`` bool, prefill only; False: start from zeros whatever the slot holds. Default: every
            sequence continues from its slot.
    """

    state_indices: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    has_initial_state: torch.Tensor | None = None
    pad_slot_id: int = -1


@dataclasses.dataclass(frozen=True)
class LayerState:
    """What the core of one mixer layer reads and writes: its parameters and its state pools.

    Args:
        num_k_heads: H.
        conv_weight: ``[D, W]``; conv_bias: ``[D]`` or None. A_log, dt_bias: ``[HV]``.
        conv_state: pool ``[S, D, W - 1]`` by strides. Written.
        recurrent_state: pool ``[S, HV, V, K]`` fp32, bf16 or fp16. Written.
        activation: of the conv.
    """

    num_k_heads: int
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    conv_state: torch.Tensor
    recurrent_state: torch.Tensor
    activation: str | None = "silu"


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """The layers by their ``layer_id`` and the metadata of the batch in flight."""

    layers: Mapping[int, LayerState]
    metadata: BatchMetadata


_thread = threading.local()


@contextlib.contextmanager
def forward_context(layers: Mapping[int, LayerState], metadata: BatchMetadata) -> Iterator[ForwardContext]:
    """Make ``layers`` and ``metadata`` what the split point of this thread sees. RuntimeError if one is set already."""
    if current_context() is not None:
        raise RuntimeError("forward_context must not be nested, got one that is already set in this thread")
    _thread.context = ForwardContext(layers, metadata)
    try:
        yield _thread.context
    finally:
        _thread.context = None


def current_context() -> ForwardContext | None:
    """The forward context of this thread, or None."""
    return getattr(_thread, "context", None)


def _core(mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, output: torch.Tensor, layer_id: int) -> None:
    context = current_context()
    contracts.forward_context(context, layer_id)
    contracts.batch_metadata(context.metadata, mixed_qkv.shape[0])
    run = _decode if context.metadata.cu_seqlens is None else _prefill
    run(mixed_qkv, a, b, output, context.layers[layer_id], context.metadata)


def _decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    output: torch.Tensor,
    layer: LayerState,
    metadata: BatchMetadata,
) -> None:
    rows = metadata.state_indices.shape[0]
    arguments = a[:rows], b[:rows], layer.A_log, layer.dt_bias, layer.recurrent_state, metadata.state_indices
    options = {"num_k_heads": layer.num_k_heads, "pad_slot_id": metadata.pad_slot_id}
    # the whole call is checked before the conv writes its state
    contracts.packed_decode(mixed_qkv[:rows], *arguments, **options)
    convolved = torch.ops.gdn.causal_conv1d_update(
        mixed_qkv[:rows],
        layer.conv_weight,
        layer.conv_bias,
        layer.conv_state,
        state_indices=metadata.state_indices,
        activation=layer.activation,
        pad_slot_id=metadata.pad_slot_id,
    )
    output[:rows].copy_(torch.ops.gdn.packed_decode(convolved, *arguments, **options))
    output[rows:].zero_()


def _prefill(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    output: torch.Tensor,
    layer: LayerState,
    metadata: BatchMetadata,
) -> None:
    num_v_heads, head_v_dim, head_k_dim = layer.recurrent_state.shape[1:]
    keys = layer.num_k_heads * head_k_dim

    def heads(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = packed.unsqueeze(0).split((keys, keys, num_v_heads * head_v_dim), dim=-1)
        return (
            q.unflatten(-1, (layer.num_k_heads, head_k_dim)),
            k.unflatten(-1, (layer.num_k_heads, head_k_dim)),
            v.unflatten(-1, (num_v_heads, head_v_dim)),
            a.unsqueeze(0),
            b.unsqueeze(0),
        )

    contracts.packed_width(mixed_qkv, 2 * keys + num_v_heads * head_v_dim)
    arguments = layer.recurrent_state, output.unsqueeze(0), metadata.state_indices, metadata.cu_seqlens
    options = {
        "has_initial_state": metadata.has_initial_state,
        "use_qk_l2norm": True,
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "pad_slot_id": metadata.pad_slot_id,
    }
    # the whole call is checked before the conv writes its state
    contracts.chunk_gated_delta_rule_paged(*heads(mixed_qkv), *arguments, **options)
    convolved = torch.ops.gdn.causal_conv1d(
        mixed_qkv,
        layer.conv_weight,
        layer.conv_bias,
        layer.conv_state,
        metadata.cu_seqlens,
        state_indices=metadata.state_indices,
        has_initial_state=metadata.has_initial_state,
        activation=layer.activation,
        pad_slot_id=metadata.pad_slot_id,
    )
    torch.ops.gdn.chunk_gated_delta_rule_paged(*heads(convolved), *arguments, **options)


define(
    "linear_attention_with_output(Tensor mixed_qkv, Tensor a, Tensor b, Tensor(a!) output, int layer_id) -> ()",
    fake=lambda *args: None,
    call=_core,
)


def linear_attention_with_output(
    mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, output: torch.Tensor, layer_id: int
) -> None:
    """The core of a mixer layer, conv and delta rule, on the batch of the forward context: the split point.

    Engines cut their graphs here by the operator's name, ``gdn::linear_attention_with_output``.

    Args:
        mixed_qkv: ``[T, D]``, the projected q, k, v, token stride free; T may be padded past the batch's tokens.
        a, b: ``[T, HV]``, the raw gates, token stride free.
        output: ``[T, HV, V]``, the dtype of ``mixed_qkv``. Written: the mixer's output for the batch's tokens, zeros in
            the padded tail and for padding slots. The layer's state pools are written too.
        layer_id: the layer's key in the forward context.

    Raises:
        RuntimeError: no forward context in this thread, or no such layer in it. TypeError, ValueError,
        NotImplementedError: as the operators it runs.
    """
    torch.ops.gdn.linear_attention_with_output(mixed_qkv, a, b, output, layer_id)
