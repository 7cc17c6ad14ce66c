"""The split point between what is captured and what stays outside: forward context, batch metadata, the operator.

An engine compiles and captures a model's projections, splits, norms and out-projections for every token count, and
leaves the core of the mixer (conv and delta rule, which need the batch's metadata) to one opaque operator,
``gdn::linear_attention_with_output``. The operator writes a caller's buffer and returns nothing; it finds its layer and
the batch in the forward context of its thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence

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


class BatchPlan:
    """A batch's metadata at a static capacity, in persistent tensors that captured graphs read.

    ``fill`` writes a batch in one copy from a staged host buffer and never synchronises, so a graph that was captured
    over ``batch`` is replayed on the next batch after another ``fill`` on the same stream. Unused entries are inert:
    sequences of no tokens in the padding slot. The tensors, each at 16 bytes:

    - ``cu_seqlens`` ``[N + 1]``, ``state_indices``, ``lengths``, ``num_accepted_tokens`` ``[N]`` int32;
      ``has_initial_state`` ``[N]`` bool. Unused: the last offset, ``pad_slot_id``, 0, 1, False.

    One token of a sequence that has a state may stand beside prefills: a mixed batch is a prefill, and such a sequence
    has the chunked form's bits, not those of ``packed_decode``. The split point takes no accepted counts; they are for
    callers of ``causal_conv1d_update`` and ``recurrent_gated_delta_rule_verify``.

    Args:
        num_sequences: N. num_tokens: the tokens that fit, over all sequences.
        pad_slot_id: as in :class:`BatchMetadata`.
        device: of the tensors.
    """

    def __init__(
        self, num_sequences: int, num_tokens: int, *, pad_slot_id: int = -1, device: torch.device | str = "cpu"
    ) -> None:
        for name, value in (("num_sequences", num_sequences), ("num_tokens", num_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_sequences, self.num_tokens, self.pad_slot_id = num_sequences, num_tokens, pad_slot_id
        counts = (num_sequences + 1, num_sequences, num_sequences, num_sequences)
        self._starts = [0]
        for count in counts:
            self._starts.append(self._starts[-1] + -(-count // 4) * 4)
        self._words = self._starts[-1] + -(-num_sequences // 4)
        self._buffer = torch.zeros(self._words, dtype=torch.int32, device=device)
        *integers, self.has_initial_state = self._fields(self._buffer)
        self.cu_seqlens, self.state_indices, self.lengths, self.num_accepted_tokens = integers
        self.fill([], [])

    def _fields(self, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Offsets, slots, lengths, accepted counts, known states: views of ``buffer``."""
        n, (a, b, c, d, e) = self.num_sequences, self._starts
        known = buffer[e:].view(torch.uint8)[:n].view(torch.bool)
        return buffer[a : a + n + 1], buffer[b : b + n], buffer[c : c + n], buffer[d : d + n], known

    def fill(
        self,
        lengths: Sequence[int],
        slots: Sequence[int],
        *,
        has_initial_state: Sequence[bool] | None = None,
        num_accepted_tokens: Sequence[int] | None = None,
    ) -> None:
        """Make the plan hold this batch, on the current stream; ``fill([], [])`` empties it.

        Args:
            lengths: tokens of each sequence; all 1 for a decode. slots: their state slots.
            has_initial_state: default: every sequence continues from its slot.
            num_accepted_tokens: of the last verification, at least 1. Default: 1.

        Raises:
            RuntimeError: the batch is larger than the plan, or the stream is capturing. ValueError: the lists differ in
            length, a length is negative, a count below 1, or two sequences share a slot. Nothing is written then.
        """
        count, tokens = len(lengths), sum(lengths)
        if count > self.num_sequences or tokens > self.num_tokens:
            raise RuntimeError(
                f"the batch must fit the plan of {self.num_sequences} sequences and {self.num_tokens} tokens, "
                f"got {count} and {tokens}"
            )
        known = [True] * count if has_initial_state is None else has_initial_state
        accepted = [1] * count if num_accepted_tokens is None else num_accepted_tokens
        for name, values in (("slots", slots), ("has_initial_state", known), ("num_accepted_tokens", accepted)):
            if len(values) != count:
                raise ValueError(f"{name} must have an entry for each of the {count} sequences, got {len(values)}")
        if min(lengths, default=0) < 0:
            raise ValueError(f"lengths must not be negative, got {min(lengths)}")
        if min(accepted, default=1) < 1:
            raise ValueError(f"num_accepted_tokens must be at least 1, got {min(accepted)}")
        live = [slot for slot in slots if slot >= 0 and slot != self.pad_slot_id]
        if len(set(live)) != len(live):
            raise ValueError(f"slots must name each slot once, got {list(slots)}")
        on_gpu = self._buffer.is_cuda
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("BatchPlan.fill must run outside capture: a graph would keep this batch")
        offsets = [0, *itertools.accumulate(lengths)]
        rest = self.num_sequences - count
        # pinned afresh: the allocator hands a block out again once the copy from it is done, so nothing waits here
        staged = torch.zeros(self._words, dtype=torch.int32, pin_memory=on_gpu)
        fields = (
            [*offsets, *[tokens] * rest],
            [*slots, *[self.pad_slot_id] * rest],
            [*lengths, *[0] * rest],
            [*accepted, *[1] * rest],
            [*map(bool, known), *[False] * rest],
        )
        for field, values in zip(self._fields(staged), fields, strict=True):
            field.copy_(torch.tensor(values, dtype=field.dtype))
        self._buffer.copy_(staged, non_blocking=True)
        self.count, self.tokens, self._decodes = count, tokens, max(lengths, default=1) == min(lengths, default=1) == 1

    def batch(self, decode_rows: int | None = None) -> BatchMetadata:
        """The plan as a forward context takes it: the persistent tensors, or their first rows.

        Args:
            decode_rows: None: prefill, or prefill and decode together, told apart by ``cu_seqlens``. Else a decode of
                that many rows, at least as many as the plan holds; those past its sequences are padding.

        Raises RuntimeError: more rows than the plan, fewer than its batch, or a batch that is no decode.
        """
        if decode_rows is None:
            return BatchMetadata(self.state_indices, self.cu_seqlens, self.has_initial_state, self.pad_slot_id)
        if not self.count <= decode_rows <= self.num_sequences:
            raise RuntimeError(
                f"decode_rows must lie between the batch's {self.count} sequences and the plan's {self.num_sequences}, "
                f"got {decode_rows}"
            )
        if not self._decodes:
            raise RuntimeError("a decode must have one token of each sequence, got a batch of other lengths")
        return BatchMetadata(self.state_indices[:decode_rows], pad_slot_id=self.pad_slot_id)


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
