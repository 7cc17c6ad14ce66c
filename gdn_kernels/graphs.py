"""The split point between what is captured and what stays outside: forward context, batch metadata, the operator.

An engine compiles and captures a model's projections, splits, norms and out-projections for every token count, and
leaves the core of the mixer (conv and delta rule, which need the batch's metadata) to one opaque operator,
``gdn::linear_attention_with_output``. The operator writes a caller's buffer and returns nothing; it finds its layer and
the batch in the forward context of its thread.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_leaves

from gdn_kernels import contracts, launch
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
        draft_indices, num_accepted_tokens: ``[N, t]`` and ``[N]``, for a verification of t tokens a sequence in place
            of a decode: rows ``n t .. n t + t`` of the batch are sequence n's. It goes on behind the accepted tokens of
            its last verification (1 after a prefill), from the state in ``draft_indices[n, accepted - 1]``, and stores
            the state after its token i in ``draft_indices[n, i]``. Its conv windows stay in slot ``state_indices[n]``,
            the same as ``draft_indices[n, 0]``, of a pool with room for t (``allocate_states(..., draft_tokens=t)``).
            A sequence that has been verified goes on so: a decode would know nothing of its accepted tokens.
    """

    state_indices: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    has_initial_state: torch.Tensor | None = None
    pad_slot_id: int = -1
    draft_indices: torch.Tensor | None = None
    num_accepted_tokens: torch.Tensor | None = None


def _integers(values: Sequence[Any]) -> numpy.ndarray:
    return numpy.asarray(values, dtype=numpy.int64)


#: What a batch may be, see :class:`BatchPlan`.
KINDS = ("prefill", "decode", "verify")


class BatchPlan:
    """A batch's metadata at a static capacity, in persistent tensors that captured graphs read.

    ``fill`` writes a batch in one copy from a staged host buffer and never synchronises, so a graph that was captured
    over ``batch`` is replayed on the next batch after another ``fill`` on the same stream. Unused entries are inert:
    sequences of no tokens in the padding slot. The tensors, each at 16 bytes:

    - ``cu_seqlens`` ``[N + 1]``, ``state_indices``, ``lengths``, ``num_accepted_tokens`` ``[N]``, ``draft_indices``
      ``[N, t]`` int32; ``has_initial_state`` ``[N]`` bool. Unused: the last offset, ``pad_slot_id``, 0, 1, False.

    One token of a sequence that has a state may stand beside prefills: a mixed batch is a prefill, and such a sequence
    has the chunked form's bits, not those of ``packed_decode``.

    Args:
        num_sequences: N. num_tokens: the tokens that fit, over all sequences.
        draft_tokens: t, the tokens of each sequence in a verification.
        pad_slot_id: as in :class:`BatchMetadata`.
        device: of the tensors.

    Attributes:
        count, tokens: sequences and tokens of the batch.
        kind: ``"verify"``; ``"decode"``, one token of each sequence, all with a state; else ``"prefill"``.
    """

    def __init__(
        self,
        num_sequences: int,
        num_tokens: int,
        *,
        draft_tokens: int = 1,
        pad_slot_id: int = -1,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (
            ("num_sequences", num_sequences),
            ("num_tokens", num_tokens),
            ("draft_tokens", draft_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_sequences, self.num_tokens, self.draft_tokens = num_sequences, num_tokens, draft_tokens
        self.pad_slot_id = pad_slot_id
        counts = (num_sequences + 1, *[num_sequences] * 3, num_sequences * draft_tokens)
        self._starts = [0]
        for count in counts:
            self._starts.append(self._starts[-1] + -(-count // 4) * 4)
        self._words = self._starts[-1] + -(-num_sequences // 4)
        self._buffer = torch.zeros(self._words, dtype=torch.int32, device=device)
        *integers, drafts, self.has_initial_state = self._fields(self._buffer)
        self.cu_seqlens, self.state_indices, self.lengths, self.num_accepted_tokens = integers
        self.draft_indices = drafts.unflatten(0, (num_sequences, draft_tokens))
        self._unused = numpy.zeros(self._words, dtype=numpy.int32)
        for field, value in ((1, pad_slot_id), (3, 1), (4, pad_slot_id)):
            self._unused[self._starts[field] :][: counts[field]] = value
        self.fill([], [])

    def _fields(self, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Offsets, slots, lengths, accepted counts, slots of drafts, known states: views of ``buffer``."""
        n, (a, b, c, d, e, f) = self.num_sequences, self._starts
        known = buffer[f:].view(torch.uint8)[:n].view(torch.bool)
        drafts = buffer[e : e + n * self.draft_tokens]
        return buffer[a : a + n + 1], buffer[b : b + n], buffer[c : c + n], buffer[d : d + n], drafts, known

    def fill(
        self,
        lengths: Sequence[int],
        slots: Sequence[int],
        *,
        has_initial_state: Sequence[bool] | None = None,
    ) -> None:
        """Make the plan hold this batch, on the current stream; ``fill([], [])`` empties it.

        Args:
            lengths: tokens of each sequence; all 1 for a decode. slots: their state slots.
            has_initial_state: default: every sequence continues from its slot.

        Raises:
            RuntimeError: the batch is larger than the plan, or the stream is capturing. ValueError: the lists differ in
            length, a length is negative, or two sequences share a slot. Nothing is written then.
        """
        count, sizes, indices = len(lengths), _integers(lengths), _integers(slots)
        known = numpy.ones(count, bool) if has_initial_state is None else numpy.asarray(has_initial_state, bool)
        decode = bool((sizes == 1).all() and known.all())
        self._fill("decode" if decode else "prefill", sizes, indices[:, None], known, numpy.ones(count, int))

    def fill_verify(self, slots: Sequence[Sequence[int]], num_accepted_tokens: Sequence[int]) -> None:
        """:meth:`fill` for a verification: ``draft_tokens`` tokens of each sequence.

        Args:
            slots: ``[N][t]``, a sequence's ``draft_indices``. num_accepted_tokens: of its last verification, 1 to t.

        Raises as :meth:`fill`, ValueError also for rows that are not of t slots and for other counts.
        """
        t = self.draft_tokens
        if any(len(row) != t for row in slots):
            raise ValueError(f"slots must have {t} entries for each sequence, got {[*map(len, slots)]}")
        accepted, count = _integers(num_accepted_tokens), len(slots)
        if ((accepted < 1) | (accepted > t)).any():
            raise ValueError(f"num_accepted_tokens must lie between 1 and {t}, got {accepted.tolist()}")
        indices = _integers(slots).reshape(count, t)
        self._fill("verify", numpy.full(count, t), indices, numpy.ones(count, bool), accepted)

    def _fill(
        self, kind: str, lengths: numpy.ndarray, slots: numpy.ndarray, known: numpy.ndarray, accepted: numpy.ndarray
    ) -> None:
        """``slots`` ``[N, 1]``, or ``[N, t]`` of a verification. In numpy: the lists of 256 sequences as tensors took
        350 us of host time, this 70."""
        count, tokens = len(lengths), int(lengths.sum())
        if count > self.num_sequences or tokens > self.num_tokens:
            raise RuntimeError(
                f"the batch must fit the plan of {self.num_sequences} sequences and {self.num_tokens} tokens, "
                f"got {count} and {tokens}"
            )
        for name, values in (("slots", slots), ("has_initial_state", known), ("num_accepted_tokens", accepted)):
            if len(values) != count:
                raise ValueError(f"{name} must have an entry for each of the {count} sequences, got {len(values)}")
        if (lengths < 0).any():
            raise ValueError(f"lengths must not be negative, got {lengths.min()}")
        live = slots[(slots >= 0) & (slots != self.pad_slot_id)].tolist()
        if len(set(live)) != len(live):
            raise ValueError(f"slots must name each slot once, got {slots.ravel().tolist()}")
        on_gpu = self._buffer.is_cuda
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("BatchPlan.fill must run outside capture: a graph would keep this batch")
        # pinned afresh: the allocator hands a block out again once the copy from it is done, so nothing waits here
        staged = torch.empty(self._words, dtype=torch.int32, pin_memory=on_gpu)
        words = staged.numpy()
        words[:] = self._unused
        a, b, c, d, e, f = self._starts
        words[a + 1 : a + 1 + count] = lengths.cumsum()
        words[a + 1 + count : a + 1 + self.num_sequences] = tokens
        words[b : b + count], words[c : c + count], words[d : d + count] = slots[:, 0], lengths, accepted
        if kind == "verify":
            words[e : e + slots.size] = slots.ravel()
        words[f:].view(numpy.bool_)[:count] = known
        self._buffer.copy_(staged, non_blocking=True)
        self.count, self.tokens, self.kind = count, tokens, kind

    def batch(self, rows: int | None = None, *, kind: str = "prefill") -> BatchMetadata:
        """The plan as a forward context takes it: the persistent tensors, or their first rows.

        Args:
            rows: sequences, at least as many as the plan holds; those past its own are padding. Default: all N.
            kind: of the metadata. ``"prefill"`` takes decodes too, mixed with prefills or not.

        Raises RuntimeError: more rows than the plan, fewer than its batch, or a batch of another kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        rows = self.num_sequences if rows is None else rows
        if not self.count <= rows <= self.num_sequences:
            raise RuntimeError(
                f"rows must lie between the batch's {self.count} sequences and the plan's {self.num_sequences}, "
                f"got {rows}"
            )
        if self.count and kind != self.kind and (kind, self.kind) != ("prefill", "decode"):
            raise RuntimeError(f"the batch must be a {kind}, got a {self.kind}")
        slots = self.state_indices[:rows]
        if kind == "prefill":
            return BatchMetadata(slots, self.cu_seqlens[: rows + 1], self.has_initial_state[:rows], self.pad_slot_id)
        drafts = (self.draft_indices[:rows], self.num_accepted_tokens[:rows]) if kind == "verify" else (None, None)
        return BatchMetadata(slots, None, None, self.pad_slot_id, *drafts)


@dataclasses.dataclass(frozen=True)
class LayerState:
    """What the core of one mixer layer reads and writes: its parameters and its state pools.

    Args:
        num_k_heads: H.
        conv_weight: ``[D, W]``; conv_bias: ``[D]`` or None. A_log, dt_bias: ``[HV]``.
        conv_state: pool ``[S, D, L]`` by strides, L of W - 1, or W - 2 + t for verifications of t tokens, of which
            everything else uses the first W - 1 columns. Written.
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

    @property
    def conv_windows(self) -> torch.Tensor:
        """The conv pool as prefill and decode use it, ``[S, D, W - 1]``."""
        columns = self.conv_weight.shape[1] - 1
        return self.conv_state if self.conv_state.shape[2] == columns else self.conv_state[..., :columns]


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


@contextlib.contextmanager
def _watching(watch: Callable[..., None]) -> Iterator[None]:
    """Have ``watch`` called in place of the core, in this thread."""
    _thread.watch = watch
    try:
        yield
    finally:
        _thread.watch = None


def current_context() -> ForwardContext | None:
    """The forward context of this thread, or None."""
    return getattr(_thread, "context", None)


def _core(mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, output: torch.Tensor, layer_id: int) -> None:
    watch = getattr(_thread, "watch", None)
    if watch is not None:
        watch(mixed_qkv, a, b, output, layer_id)
    else:
        _run_core(mixed_qkv, a, b, output, layer_id)


def _run_core(mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, output: torch.Tensor, layer_id: int) -> None:
    context = current_context()
    contracts.forward_context(context, layer_id)
    contracts.batch_metadata(context.metadata, mixed_qkv.shape[0])
    metadata = context.metadata
    run = _prefill if metadata.cu_seqlens is not None else _decode if metadata.draft_indices is None else _verify
    run(mixed_qkv, a, b, output, context.layers[layer_id], metadata)


def decode_into(output: torch.Tensor, *arguments: torch.Tensor, **options: Any) -> None:
    """``packed_decode`` of these arguments, the last of which are the slots, into ``output``, strided or not."""
    *inputs, slots = arguments
    if output.is_contiguous():
        torch.ops.gdn.packed_decode_out(*inputs, output, slots, **options)
    else:
        output.copy_(torch.ops.gdn.packed_decode(*arguments, **options))


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
        layer.conv_windows,
        state_indices=metadata.state_indices,
        activation=layer.activation,
        pad_slot_id=metadata.pad_slot_id,
    )
    decode_into(output[:rows], convolved, *arguments, **options)
    output[rows:].zero_()


def _prefill(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    output: torch.Tensor,
    layer: LayerState,
    metadata: BatchMetadata,
) -> None:
    tensors = _heads(mixed_qkv.unsqueeze(0), layer)
    gates = a.unsqueeze(0), b.unsqueeze(0)
    arguments = layer.recurrent_state, output.unsqueeze(0), metadata.state_indices, metadata.cu_seqlens
    options = {
        "has_initial_state": metadata.has_initial_state,
        "use_qk_l2norm": True,
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "pad_slot_id": metadata.pad_slot_id,
    }
    # the whole call is checked before the conv writes its state
    contracts.chunk_gated_delta_rule_paged(*tensors, *gates, *arguments, **options)
    convolved = torch.ops.gdn.causal_conv1d(
        mixed_qkv,
        layer.conv_weight,
        layer.conv_bias,
        layer.conv_windows,
        metadata.cu_seqlens,
        state_indices=metadata.state_indices,
        has_initial_state=metadata.has_initial_state,
        activation=layer.activation,
        pad_slot_id=metadata.pad_slot_id,
    )
    tensors = _heads(convolved.unsqueeze(0), layer)
    torch.ops.gdn.chunk_gated_delta_rule_paged(*tensors, *gates, *arguments, **options)


def _verify(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    output: torch.Tensor,
    layer: LayerState,
    metadata: BatchMetadata,
) -> None:
    shape = metadata.draft_indices.shape
    rows = shape[0] * shape[1]
    x, *gates = (tensor[:rows].unflatten(0, shape) for tensor in (mixed_qkv, a, b))
    arguments = layer.recurrent_state, metadata.draft_indices
    options = {
        "num_accepted_tokens": metadata.num_accepted_tokens,
        "use_qk_l2norm": True,
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "pad_slot_id": metadata.pad_slot_id,
    }
    # the whole call is checked before the conv writes its state
    contracts.recurrent_gated_delta_rule_paged(*_heads(x, layer), *gates, *arguments, **options)
    convolved = torch.ops.gdn.causal_conv1d_update(
        x,
        layer.conv_weight,
        layer.conv_bias,
        layer.conv_state,
        state_indices=metadata.state_indices,
        num_accepted_tokens=metadata.num_accepted_tokens,
        activation=layer.activation,
        pad_slot_id=metadata.pad_slot_id,
    )
    found = torch.ops.gdn.recurrent_gated_delta_rule_paged(*_heads(convolved, layer), *gates, *arguments, **options)
    output[:rows].copy_(found.flatten(0, 1))
    output[rows:].zero_()


def _heads(packed: torch.Tensor, layer: LayerState) -> tuple[torch.Tensor, ...]:
    """q, k and v of ``[..., D]`` by heads: views."""
    num_v_heads, head_v_dim, head_k_dim = layer.recurrent_state.shape[1:]
    keys = layer.num_k_heads * head_k_dim
    contracts.packed_width(packed, 2 * keys + num_v_heads * head_v_dim)
    q, k, v = packed.split((keys, keys, num_v_heads * head_v_dim), dim=-1)
    key_heads = layer.num_k_heads, head_k_dim
    return q.unflatten(-1, key_heads), k.unflatten(-1, key_heads), v.unflatten(-1, (num_v_heads, head_v_dim))


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


# ---------------------------------------------------------------------------------------------------------------
# Cut at the split point
# ---------------------------------------------------------------------------------------------------------------

#: The operators that graphs are cut at unless others are named.
SPLIT_OPERATORS = ("gdn::linear_attention_with_output",)


def _splits(node: torch.fx.Node, names: frozenset[str]) -> bool:
    """Whether ``node`` calls an operator of ``names``, given as ``namespace.name``."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name().startswith("auto_functionalized"):
        target = node.args[0]  # what AOTAutograd makes of an operator that writes its arguments
    return node.op == "call_function" and ".".join(str(target).split(".")[:2]) in names


def split_by_operator(
    graph_module: torch.fx.GraphModule, names: Sequence[str] = SPLIT_OPERATORS
) -> tuple[torch.fx.GraphModule, list[str]]:
    """Cut a graph before and after each call of an operator of ``names``, as engines do with the operators they list.

    Args:
        graph_module: what Dynamo or AOTAutograd gives a backend. Not changed.
        names: of the operators, ``namespace::name`` or ``namespace.name``; every overload counts.

    Returns:
        The graph of submodules, in order, and the names of those that hold no such operator: the pieces to capture.

    Raises ValueError for a name without a namespace.
    """
    from torch.fx.passes.split_module import split_module

    for name in names:
        if len(name.replace("::", ".").split(".")) != 2:
            raise ValueError(f"names must be of operators, namespace::name, got {name!r}")
    wanted = frozenset(name.replace("::", ".") for name in names)
    part, parts, cores = 0, {}, set()
    for node in graph_module.graph.nodes:
        if _splits(node, wanted):
            parts[node] = part + 1
            cores.add(f"submod_{part + 1}")
            part += 2
        elif node.op not in ("placeholder", "output"):
            parts[node] = part
    cut = split_module(graph_module, None, lambda node: parts[node], keep_original_order=True)
    return cut, [name for name, _ in cut.named_children() if name.startswith("submod_") and name not in cores]


# ---------------------------------------------------------------------------------------------------------------
# Captured, in pieces or whole
# ---------------------------------------------------------------------------------------------------------------

# torch allows one capture at a time in a process, and Inductor one wrapper of its partitions
_one_capture = threading.Lock()


def _borrowed(x: Any) -> Any:
    """A tensor over the memory of ``x`` that does not own it: a pool then serves the next capture with it again."""
    if not (isinstance(x, torch.Tensor) and x.is_cuda and x.numel()):
        return x
    storage = x.untyped_storage()
    view = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), x.device, storage.nbytes())
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(view, x.storage_offset(), x.shape, x.stride())


class _Held:
    """What a runner holds of one size: captured pieces and the calls between them, to be replayed in order.

    On a CPU nothing is captured: a piece is computed again over the arguments of its first call, into its results, as a
    CUDA graph would.
    """

    def __init__(self, pool: Any, metadata: BatchMetadata) -> None:
        self.pool, self.metadata, self.pieces, self.result = pool, metadata, 0, None
        self.steps: list[Callable[[], Any]] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        self.pieces += 1
        if self.pool is not None:
            graph = torch.cuda.CUDAGraph()
            # other threads may go on using their streams
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self._graph = graph

    def end(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            graph.capture_end()
            self.steps.append(graph.replay)

    def piece(self, call: Callable[[list[Any]], Any], args: list[Any]) -> Any:
        """Capture ``call``, which may empty its list of arguments."""
        kept = list(args) if self.pool is None else []
        self.begin()
        try:
            results = call(args)
        finally:
            self.end()
        if self.pool is None:
            self.steps.append(functools.partial(self._again, call, kept, results))
        return results

    @staticmethod
    def _again(call: Callable[[list[Any]], Any], args: list[Any], results: Any) -> None:
        for kept, new in zip(tree_leaves(results), tree_leaves(call(list(args))), strict=True):
            if isinstance(kept, torch.Tensor):
                kept.copy_(new)

    def between(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run what stays outside the pieces."""
        result = call(*args)
        if any(isinstance(x, torch.Tensor) for x in tree_leaves(result)):
            raise RuntimeError("a split operator must write a caller's tensor and return nothing, got one with results")
        self.steps.append(functools.partial(call, *map(_borrowed, args)))
        return result

    def replay(self) -> Any:
        for step in self.steps:
            step()
        return self.result


class _Piece(torch.nn.Module):
    """Stands for a submodule of a cut graph, which its runner records while it captures."""

    def __init__(self, runner: _Runner, call: Callable[..., Any], captured: bool) -> None:
        super().__init__()
        self.runner, self.call, self.captured = runner, call, captured

    def forward(self, *args: Any) -> Any:
        held = self.runner._held
        if held is None:
            return self.call(*args)
        if self.captured:
            return held.piece(lambda args: self.call(*args), list(args))
        return held.between(self.call, *args)


class _Runner:
    """What runners share: padding to the next size, one input buffer, one pool of memory, one thread at a time."""

    def __init__(self, model: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.call, self.replays, self.eager = model, 0, 0
        self.seconds: dict[Any, float] = {}
        self._sizes: dict[Any, _Held] = {}
        self._held: _Held | None = None
        self._pool: Any = None
        self._lock = threading.Lock()

    @property
    def captured(self) -> dict[Any, int]:
        """How many pieces are captured, by size."""
        return {size: held.pieces for size, held in self._sizes.items()}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"a {type(self).__name__} must serve one thread at a time, got a call while another runs"
            )
        try:
            with torch.no_grad():
                yield
        finally:
            self._lock.release()

    def _capture(
        self,
        layers: Mapping[int, LayerState],
        example: torch.Tensor,
        sizes: Sequence[tuple[Any, int, BatchMetadata]],
    ) -> None:
        """Record, for each key, so many rows on a batch without live slots."""
        name = type(self).__name__
        if current_context() is not None:
            raise RuntimeError(f"{name}.capture must run outside graphs.forward_context, got one with its slots")
        if self._sizes:
            raise RuntimeError(f"{name}.capture must run once, got a runner that is captured already")
        with self._alone(), _one_capture, launch.capture_mode():
            buffer = example.new_zeros(max(rows for _, rows, _ in sizes), *example.shape[1:])
            stream = torch.cuda.Stream(example.device) if example.is_cuda else None
            if stream is not None:
                gc.collect()  # as torch.cuda.graph does: rather now than while a stream captures
                self._pool = torch.cuda.graph_pool_handle()
                stream.wait_stream(torch.cuda.current_stream(example.device))
            done, seconds = {}, {}
            with torch.cuda.stream(stream):
                # largest first: the smaller ones then fit into its memory
                for key, rows, metadata in sorted(sizes, key=lambda size: -size[1]):
                    start = time.perf_counter()
                    done[key] = held = _Held(self._pool, metadata)
                    with forward_context(layers, metadata):
                        held.result = _borrowed(self._record(held, buffer[:rows]))
                    seconds[key] = time.perf_counter() - start
            if stream is not None:
                torch.cuda.current_stream(example.device).wait_stream(stream)
        self.input, self._sizes, self.seconds = buffer, done, seconds

    def _record(self, held: _Held, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _check(self, x: torch.Tensor) -> None:
        if not self._sizes:
            raise RuntimeError(f"{type(self).__name__} must be captured before it is called, got one that is not")
        like = self.input
        if (x.shape[1:], x.dtype, x.device) != (like.shape[1:], like.dtype, like.device):
            raise ValueError(
                f"x must be like the example, [T, {', '.join(map(str, like.shape[1:]))}] of {like.dtype} on "
                f"{like.device}, got {list(x.shape)} of {x.dtype} on {x.device}"
            )

    def _serve(self, x: torch.Tensor, tokens: int, key: Any) -> torch.Tensor:
        """Replay what is held of ``key`` on the first ``tokens`` rows of ``x``, or run the model where nothing is."""
        with self._alone():
            held = self._sizes.get(key)
            if held is None:
                y = self.call(x)
                self.eager += 1
            else:
                self.input[:tokens].copy_(x[:tokens])
                y = held.replay()
                self.replays += 1
            result = y.new_empty(x.shape[0], *y.shape[1:])
            result[:tokens].copy_(y[:tokens])
            result[tokens:].zero_()
        return result


def _next_size(sizes: Sequence[int], count: int) -> int | None:
    """The least of the sorted ``sizes`` that holds ``count``, if any."""
    index = bisect.bisect_left(sizes, count)
    return sizes[index] if index < len(sizes) else None


def _token_counts(name: str, sizes: Sequence[int]) -> list[int]:
    if min(sizes, default=1) < 1:
        raise ValueError(f"{name} must be counts of at least 1, got {list(sizes)}")
    return sorted(set(sizes))


class PiecewiseRunner(_Runner):
    """Runs a model whose split operators stay outside its captured pieces: a reference and a test bed, not an engine.

    ``capture`` records the pieces for each size, on a GPU as CUDA graphs in one memory pool, the largest size first; on
    a CPU nothing is captured and the bookkeeping is the same. A call inside ``forward_context`` pads the batch to the
    next size and replays, with the core run eagerly on the context's metadata; past the largest size the model runs as
    it is. Nothing of the model's Python or of Dynamo runs in a replay. One runner serves one thread and stream at a
    time; several may work side by side.

    Args:
        model: takes and returns one tensor, ``[T, ...]``, tokens first; rows do not depend on each other outside the
            split operators.
        sizes: the token counts to capture.
        cut: ``"operator"``: compiled once and cut by :func:`piecewise_backend`. ``"partition"``: compiled once by
            Inductor, which cuts by name itself (GPU only). ``"segments"``: no compiler; the capture stops at the split
            operator and goes on after it. The last two cut at ``gdn::linear_attention_with_output`` alone.
        names, inner: as in :func:`piecewise_backend`, with ``"operator"``.

    Attributes:
        graphs: how many graphs Dynamo has made. replays, eager: calls that were replayed, and past the largest size.
        captured: pieces by size. seconds: that the capture of each took on the host, in the order of capture; the first
        also compiled, unless ``call`` had been called.

    Raises ValueError for another ``cut`` or for sizes below 1.
    """

    CUTS = ("operator", "partition", "segments")

    def __init__(
        self,
        model: Callable[[torch.Tensor], torch.Tensor],
        sizes: Sequence[int],
        *,
        cut: str = "operator",
        names: Sequence[str] = SPLIT_OPERATORS,
        inner: str = "eager",
    ) -> None:
        if cut not in self.CUTS:
            raise ValueError(f"cut must be one of {', '.join(map(repr, self.CUTS))}, got {cut!r}")
        super().__init__(model)
        self.sizes, self.cut, self.graphs = _token_counts("sizes", sizes), cut, 0
        if not self.sizes:
            raise ValueError("sizes must hold a token count, got none")
        self._layer_ids: set[int] = set()
        if cut == "operator":
            self.call = torch.compile(model, backend=piecewise_backend(self, names, inner), fullgraph=True)
        elif cut == "partition":
            self.call = torch.compile(model, backend=self._inductor, fullgraph=True)

    def _inductor(self, graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Inductor with its graph partition: it hands its partitions, which take a list and empty it, to ``wrap``."""
        from torch._inductor import compile_fx, config, utils

        def wrap(call: Callable[[list[Any]], Any], metadata: Any) -> Callable[[list[Any]], Any]:
            return lambda args: call(args) if self._held is None else self._held.piece(call, args)

        before = utils._unstable_customized_partition_wrapper.wrapper
        utils.set_customized_partition_wrappers(wrap)
        try:
            with config.patch(graph_partition=True, custom_should_partition_ops=list(SPLIT_OPERATORS)):
                compiled = compile_fx.compile_fx(graph_module, example_inputs)
        finally:
            utils.set_customized_partition_wrappers(before)
        self.graphs += 1
        return compiled

    def capture(self, layers: Mapping[int, LayerState], example: torch.Tensor) -> None:
        """Record the pieces for every size. Runs the model on a batch of no sequences, which writes no state.

        Args:
            layers: as in :func:`forward_context`. example: ``[T, ...]`` of any T, like the inputs to come.

        Raises RuntimeError inside a forward context, whose slots may be live, and if the runner is captured already.
        """
        nothing = BatchMetadata(torch.empty(0, dtype=torch.int32, device=example.device))
        self._capture(layers, example, [(size, size, nothing) for size in self.sizes])

    def _record(self, held: _Held, x: torch.Tensor) -> torch.Tensor:
        if self.cut != "segments":
            # else a count of 1, or one that is another size of the model too, makes a graph of its own
            torch._dynamo.decorators.mark_unbacked(x, 0)
        with _watching(self._note):
            self.call(x)
        if self.cut == "operator":
            with self._recording(held):
                return self.call(x)
        if self.cut == "partition":
            with self._recording(held), _watching(lambda *args: held.between(_run_core, *args)):
                result = self.call(x)
            if not held.pieces:
                raise RuntimeError("cut 'partition' must have a GPU, for which alone Inductor cuts graphs, got none")
            return result

        def core(*args: Any) -> None:
            held.end()
            held.between(_run_core, *args)
            held.begin()

        held.begin()
        try:
            with _watching(core):
                result = self.call(x)
        finally:
            held.end()
        if self._pool is None:
            held.steps = [functools.partial(held._again, lambda args: self.call(*args), [x], result)]
        return result

    @contextlib.contextmanager
    def _recording(self, held: _Held) -> Iterator[None]:
        self._held = held
        try:
            yield
        finally:
            self._held = None

    def _note(self, *args: Any) -> None:
        self._layer_ids.add(args[-1])
        _run_core(*args)

    def __call__(self, x: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """The model on the batch of the forward context.

        Args:
            x: ``[T, ...]``, the dtype and trailing shape of the example at capture. tokens: how many of its rows are
                the batch's; default all. The others may hold anything.

        Returns a new tensor of T rows, zeros past ``tokens``.

        Raises:
            RuntimeError: not captured, no context in this thread, a layer of the model missing from it, a runner in use
            by another thread; nothing is written then. ValueError: ``x`` or ``tokens`` do not fit.
        """
        self._check(x)
        context, rows = current_context(), x.shape[0]
        for layer_id in self._layer_ids:
            contracts.forward_context(context, layer_id)
        tokens = rows if tokens is None else tokens
        if not 0 <= tokens <= rows:
            raise ValueError(f"tokens must lie between 0 and the {rows} rows of x, got {tokens}")
        needed, metadata = tokens, context.metadata
        if metadata.cu_seqlens is None:
            each = metadata.state_indices if metadata.draft_indices is None else metadata.draft_indices
            needed = max(tokens, each.numel())
        return self._serve(x, tokens, _next_size(self.sizes, needed))


class WholeRunner(_Runner):
    """Runs a model captured whole, the core with it, on the batch that a :class:`BatchPlan` holds.

    A graph for each token count serves prefills, and prefills and decodes together; one for each number of sequences
    serves decodes, another verifications. Between replays the plan is filled and the input copied, both on the device's
    stream; a batch past the largest size runs the model as it is. On a CPU nothing is captured. As for threads and
    ``model``, which may be compiled, see :class:`PiecewiseRunner`.

    Args:
        plan: what the graphs read; fill it, then call.
        sizes: token counts of prefills and mixed batches. prefill_rows: the sequences that these hold at most, by
            default as many as the plan; each empty one costs its programs.
        decode_rows, verify_rows: numbers of sequences.

    Attributes: as of :class:`PiecewiseRunner`; ``captured`` by kind and size.
    """

    def __init__(
        self,
        model: Callable[[torch.Tensor], torch.Tensor],
        plan: BatchPlan,
        sizes: Sequence[int] = (),
        *,
        prefill_rows: int | None = None,
        decode_rows: Sequence[int] = (),
        verify_rows: Sequence[int] = (),
    ) -> None:
        super().__init__(model)
        self.plan, self.prefill_rows = plan, plan.num_sequences if prefill_rows is None else prefill_rows
        self.sizes = {
            "prefill": _token_counts("sizes", sizes),
            "decode": _token_counts("decode_rows", decode_rows),
            "verify": _token_counts("verify_rows", verify_rows),
        }
        if not any(self.sizes.values()):
            raise ValueError("sizes, decode_rows or verify_rows must hold a count, got none")

    def _batch(self, kind: str, size: int) -> tuple[int, BatchMetadata]:
        """Tokens and metadata of a batch of ``kind`` at a captured size."""
        if kind == "prefill":
            return size, self.plan.batch(min(size, self.prefill_rows))
        return size * (self.plan.draft_tokens if kind == "verify" else 1), self.plan.batch(size, kind=kind)

    def capture(self, layers: Mapping[int, LayerState], example: torch.Tensor) -> None:
        """Capture every size, on the empty plan: no state is written. The graphs keep ``layers``.

        Raises RuntimeError where the plan holds a batch, whose slots may be live, and as ``PiecewiseRunner.capture``.
        """
        if self.plan.count:
            raise RuntimeError(
                f"WholeRunner.capture must run on an empty plan, got a batch of {self.plan.count} sequences"
            )
        sizes = [((kind, rows), *self._batch(kind, rows)) for kind, counts in self.sizes.items() for rows in counts]
        self._capture(layers, example, sizes)
        self.layers = layers

    def _record(self, held: _Held, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.decorators.mark_unbacked(x, 0)
        self.call(x)
        return held.piece(lambda args: self.call(*args), [x])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The model on the plan's batch.

        ``x``: ``[T, ...]`` as at capture, its first ``plan.tokens`` rows the batch's; the others may hold anything.
        Returns a new tensor of T rows, zeros past the batch's.

        Raises RuntimeError: not captured, inside a forward context, in use by another thread. ValueError: ``x`` does
        not fit. Nothing is written then.
        """
        self._check(x)
        plan = self.plan
        if x.shape[0] < plan.tokens:
            raise ValueError(f"x must hold the plan's {plan.tokens} tokens, got {x.shape[0]} rows")
        kind = plan.kind
        size = _next_size(self.sizes[kind], max(plan.tokens, plan.count) if kind == "prefill" else plan.count)
        if kind == "prefill" and plan.count > self.prefill_rows:
            size = None
        held = self._sizes.get((kind, size))
        # past the largest size the model runs on a batch of its own number of sequences
        metadata = plan.batch(plan.count, kind=kind) if held is None else held.metadata
        with forward_context(self.layers, metadata):
            return self._serve(x, plan.tokens, (kind, size))


def piecewise_backend(
    runner: PiecewiseRunner, names: Sequence[str] = SPLIT_OPERATORS, inner: str = "eager"
) -> Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]:
    """A ``torch.compile`` backend that cuts at the operators ``names`` and gives the pieces to ``runner``.

    A runner with ``cut="operator"`` makes its own. ``inner`` is the backend that compiles the pieces, by its name:
    ``"eager"`` keeps eager's bits, ``"inductor"`` fuses.
    """

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        cut, pieces = split_by_operator(graph_module, names)
        for name, part in list(cut.named_children()):
            call: Callable[..., Any] = part
            if name in pieces:
                inputs = [node.meta["example_value"] for node in part.graph.find_nodes(op="placeholder")]
                call = torch._dynamo.lookup_backend(inner)(part, inputs)
            setattr(cut, name, _Piece(runner, call, name in pieces))
        runner.graphs += 1
        return cut

    return backend
