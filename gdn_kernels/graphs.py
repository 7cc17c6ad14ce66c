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
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

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
# Captured in pieces
# ---------------------------------------------------------------------------------------------------------------

# torch allows one capture at a time in a process
_one_capture = threading.Lock()


def _borrowed(x: Any) -> Any:
    """A tensor over the memory of ``x`` that does not own it: a pool then serves the next capture with it again."""
    if not (isinstance(x, torch.Tensor) and x.is_cuda and x.numel()):
        return x
    storage = x.untyped_storage()
    view = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), x.device, storage.nbytes())
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(view, x.storage_offset(), x.shape, x.stride())


def _places(args: Sequence[Any]) -> list[Any]:
    """Where tensors lie, and the other arguments: what a captured call has frozen. Dynamo may hand a number of the
    model, say an eps, to its graph as a new tensor of no dimensions on the CPU at every call."""

    def place(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.item() if x.dim() == 0 and x.device.type == "cpu" else x.data_ptr()

    return [place(x) for x in args]


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Capture the current stream; other threads may go on using theirs."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    finally:
        graph.capture_end()


class _HeldPiece:
    """A piece at one size. On a CPU a replay computes it again over the arguments of the first call, into its results,
    as a CUDA graph would."""

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...], pool: Any) -> None:
        self.places, self.graph = _places(args), None
        if pool is None:
            self.call, self.args, self.results = call, args, call(*args)
            return
        self.graph = torch.cuda.CUDAGraph()
        with _recording(self.graph, pool):
            self.results = call(*args)

    def settle(self) -> Any:
        """The results, for the rest of the capture; once it lets go of them, the pool serves their memory again."""
        results = self.results
        if self.graph is not None:
            self.results = tuple(map(_borrowed, results)) if isinstance(results, tuple | list) else _borrowed(results)
        return results

    def replay(self, args: tuple[Any, ...]) -> Any:
        if _places(args) != self.places:
            raise RuntimeError("a captured piece must get its arguments where they were at capture, got others")
        if self.graph is not None:
            self.graph.replay()
        else:
            found, many = self.call(*self.args), isinstance(self.results, tuple | list)
            for kept, new in zip(self.results if many else (self.results,), found if many else (found,), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)
        return self.results


class _Piece(torch.nn.Module):
    """Stands for a piece in a cut graph: captures and replays it at the runner's size, else calls it."""

    def __init__(self, runner: PiecewiseRunner, call: Callable[..., Any]) -> None:
        super().__init__()
        self.runner, self.call = runner, call

    def forward(self, *args: Any) -> Any:
        held = self.runner._held
        if held is None:
            return self.call(*args)
        if self in held.pieces:
            return held.pieces[self].replay(args)
        held.pieces[self] = piece = _HeldPiece(self.call, args, self.runner._pool)
        return piece.settle()


class _Cut:
    """What a runner holds of one size, cut by a backend: the captured pieces, which the compiled model calls."""

    def __init__(self, call: Callable[..., Any], x: torch.Tensor, pool: Any) -> None:
        self.call, self.x, self.pieces = call, x, {}

    def __len__(self) -> int:
        return len(self.pieces)

    def core(self, *args: Any) -> None:
        _run_core(*args)

    def record(self) -> None:
        self.call(self.x)

    def replay(self) -> torch.Tensor:
        return self.call(self.x)


class _Segments:
    """What a runner holds of one size without a compiler: a capture that stops at each split point and goes on behind.

    On a CPU a replay calls the model."""

    def __init__(self, call: Callable[..., Any], x: torch.Tensor, pool: Any) -> None:
        self.call, self.x, self.pool, self.graphs = call, x, pool, 0
        self.steps: list[Callable[[], None]] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    def __len__(self) -> int:
        return self.graphs

    def _begin(self) -> None:
        self.graphs += 1
        if self.pool is not None:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self.graph = graph

    def _end(self) -> None:
        if self.graph is not None:
            graph, self.graph = self.graph, None
            graph.capture_end()
            self.steps.append(graph.replay)

    def core(self, *args: Any) -> None:
        self._end()
        _run_core(*args)
        if self.pool is not None:
            self.steps.append(functools.partial(_run_core, *map(_borrowed, args)))
        self._begin()

    def record(self) -> None:
        self._begin()
        try:
            result = self.call(self.x)
        finally:
            self._end()
        self.result = _borrowed(result)

    def replay(self) -> torch.Tensor:
        if self.pool is None:
            return self.call(self.x)
        for step in self.steps:
            step()
        return self.result


class PiecewiseRunner:
    """Runs a model whose split operators stay outside its captured pieces: a reference and a test bed, not an engine.

    ``capture`` records the pieces for each size, on a GPU as CUDA graphs in one memory pool, the largest size first; on
    a CPU nothing is captured and the bookkeeping is the same. A call inside ``forward_context`` pads the batch to the
    next size and replays, with the core run eagerly on the context's metadata; past the largest size the model runs as
    it is. One runner serves one thread and stream at a time; several may work side by side.

    Args:
        model: takes and returns one tensor, ``[T, ...]``, tokens first; rows do not depend on each other outside the
            split operators.
        sizes: the token counts to capture.
        cut: ``"operator"``: compiled once and cut by :func:`piecewise_backend`. ``"segments"``: no compiler; the
            capture stops at ``gdn::linear_attention_with_output`` and goes on after it.
        names, inner: as in :func:`piecewise_backend`, with ``"operator"``.

    Attributes:
        graphs: how many graphs Dynamo has made. replays, eager: calls that were replayed, and past the largest size.
        captured: pieces by size.

    Raises ValueError for another ``cut`` or for sizes below 1.
    """

    def __init__(
        self,
        model: Callable[[torch.Tensor], torch.Tensor],
        sizes: Sequence[int],
        *,
        cut: str = "operator",
        names: Sequence[str] = SPLIT_OPERATORS,
        inner: str = "eager",
    ) -> None:
        if cut not in ("operator", "segments"):
            raise ValueError(f"cut must be 'operator' or 'segments', got {cut!r}")
        if min(sizes, default=0) < 1:
            raise ValueError(f"sizes must be token counts of at least 1, got {list(sizes)}")
        self.sizes, self.cut, self.call = sorted(set(sizes)), cut, model
        if cut == "operator":
            self.call = torch.compile(model, backend=piecewise_backend(self, names, inner), fullgraph=True)
        self.graphs = self.replays = self.eager = 0
        self._sizes: dict[int, _Cut | _Segments] = {}
        self._layer_ids: set[int] = set()
        self._held: _Cut | None = None
        self._pool: Any = None
        self._lock = threading.Lock()

    @property
    def captured(self) -> dict[int, int]:
        return {size: len(held) for size, held in self._sizes.items()}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("a PiecewiseRunner must serve one thread at a time, got a call while another runs")
        try:
            with torch.no_grad():
                yield
        finally:
            self._held = None
            self._lock.release()

    def capture(self, layers: Mapping[int, LayerState], example: torch.Tensor) -> None:
        """Record the pieces for every size. Runs the model on a batch of no sequences, which writes no state.

        Args:
            layers: as in :func:`forward_context`. example: ``[T, ...]`` of any T, like the inputs to come.

        Raises RuntimeError inside a forward context, whose slots may be live, and if the runner is captured already.
        """
        if current_context() is not None:
            raise RuntimeError(
                "PiecewiseRunner.capture must run outside graphs.forward_context, got one with its slots"
            )
        if self._sizes:
            raise RuntimeError("PiecewiseRunner.capture must run once, got a runner that is captured already")
        nothing = BatchMetadata(torch.empty(0, dtype=torch.int32, device=example.device))
        with self._alone(), _one_capture, launch.capture_mode(), forward_context(layers, nothing):
            buffer = example.new_zeros(self.sizes[-1], *example.shape[1:])
            stream = torch.cuda.Stream(example.device) if example.is_cuda else None
            if stream is not None:
                self._pool = torch.cuda.graph_pool_handle()
                stream.wait_stream(torch.cuda.current_stream(example.device))
            done = {}
            with torch.cuda.stream(stream):
                for size in reversed(self.sizes):
                    done[size] = self._record(buffer[:size])
            if stream is not None:
                torch.cuda.current_stream(example.device).wait_stream(stream)
        self.input, self._sizes = buffer, done

    def _record(self, x: torch.Tensor) -> _Cut | _Segments:
        if self.cut == "operator":
            # else a count of 1, or one that is another size of the model too, makes a graph of its own
            torch._dynamo.decorators.mark_unbacked(x, 0)
        with _watching(self._note):
            self.call(x)
        held = (_Cut if self.cut == "operator" else _Segments)(self.call, x, self._pool)
        self._held = held if self.cut == "operator" else None
        with _watching(held.core):
            held.record()
        self._held = None
        return held

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
        context = current_context()
        if not self._sizes:
            raise RuntimeError("PiecewiseRunner must be captured before it is called, got one that is not")
        for layer_id in self._layer_ids:
            contracts.forward_context(context, layer_id)
        like, rows = self.input, x.shape[0]
        tokens = rows if tokens is None else tokens
        if (x.shape[1:], x.dtype, x.device) != (like.shape[1:], like.dtype, like.device):
            raise ValueError(
                f"x must be like the example, [T, {', '.join(map(str, like.shape[1:]))}] of {like.dtype} on "
                f"{like.device}, got {list(x.shape)} of {x.dtype} on {x.device}"
            )
        if not 0 <= tokens <= rows:
            raise ValueError(f"tokens must lie between 0 and the {rows} rows of x, got {tokens}")
        metadata, needed = context.metadata, tokens
        if metadata.cu_seqlens is None:
            needed = max(tokens, metadata.state_indices.shape[0])
        index = bisect.bisect_left(self.sizes, needed)
        with self._alone():
            if index == len(self.sizes):
                y = self.call(x)
                self.eager += 1
            else:
                held = self._sizes[self.sizes[index]]
                self.input[:tokens].copy_(x[:tokens])
                self._held = held if self.cut == "operator" else None
                y = held.replay()
                self.replays += 1
            result = y.new_zeros(rows, *y.shape[1:])
            result[:tokens].copy_(y[:tokens])
        return result


def piecewise_backend(
    runner: PiecewiseRunner, names: Sequence[str] = SPLIT_OPERATORS, inner: str = "eager"
) -> Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]:
    """A ``torch.compile`` backend that cuts at the operators ``names`` and gives the pieces to ``runner``.

    A runner with ``cut="operator"`` makes its own. ``inner`` is the backend that compiles the pieces, by its name:
    ``"eager"`` keeps eager's bits, ``"inductor"`` fuses.
    """

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        cut, pieces = split_by_operator(graph_module, names)
        for name in pieces:
            piece = getattr(cut, name)
            inputs = [node.meta["example_value"] for node in piece.graph.find_nodes(op="placeholder")]
            setattr(cut, name, _Piece(runner, torch._dynamo.lookup_backend(inner)(piece, inputs)))
        runner.graphs += 1
        return cut

    return backend
