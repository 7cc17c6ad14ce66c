"""``chunk_gated_delta_rule`` and its paged forms: prefill, in chunks of 64 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gdn_kernels import launch
from gdn_kernels.ops.registry import Adapter, Call, define

GATES = "Tensor? A_log=None, Tensor? dt_bias=None, float beta_scale=1.0"
FUNCTIONAL = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, *, float? scale=None, Tensor? initial_state=None, "
    f"Tensor? cu_seqlens=None, bool use_qk_l2norm=False, {GATES}) -> (Tensor o, Tensor final_state)"
)
_PAGED_OPTIONS = (
    "Tensor? has_initial_state=None, Tensor? write_indices=None, float? scale=None, bool use_qk_l2norm=False, "
    f"{GATES}, int pad_slot_id=-1"
)


def is_packed(q: torch.Tensor, *args: Any, **options: Any) -> bool:
    return q.dim() == 3


def _lift(*positions: int) -> Call:
    """Gives the arguments at these positions, ``[T, ...]``, their leading dimension of 1."""

    def lift(*args: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        lifted = (launch.view(x.unsqueeze(0), x) if i in positions else x for i, x in enumerate(args))
        return tuple(lifted), options

    return lift


def _lower(result: Any, *args: Any) -> Any:
    """``o`` without its leading dimension; a final state stays as it is."""
    if isinstance(result, tuple):
        return _lower(result[0]), *result[1:]
    return launch.view(result.squeeze(0), result)


#: q, k, v, g, beta may come as ``[T, ...]``, a packed batch without its leading 1; ``o`` returns in that rank.
PACKED = Adapter(is_packed, _lift(0, 1, 2, 3, 4), _lower)
#: The same for the paged forms, which write ``out``, of the rank of q.
_PACKED_OUT = Adapter(is_packed, _lift(0, 1, 2, 3, 4, 6), lambda result, *args: result)


def fake_functional(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: Any,
    cu_seqlens: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return v.new_empty(v.shape), v.new_empty((count, v.shape[2], v.shape[3], q.shape[3]), dtype=dtype)


define("chunk_gated_delta_rule" + FUNCTIONAL, module="chunk", fake=fake_functional, adapter=PACKED)
define(
    "chunk_gated_delta_rule_paged(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, "
    f"Tensor(b!) out, Tensor state_indices, Tensor cu_seqlens, *, {_PAGED_OPTIONS}) -> ()",
    module="chunk",
    fake=lambda *args, **options: None,
    adapter=_PACKED_OUT,
)
define(
    "chunk_gated_delta_rule_paged_checkpoints(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, "
    "Tensor(b!) out, Tensor(c!) checkpoints, Tensor state_indices, Tensor cu_seqlens, Tensor checkpoint_offsets, *, "
    f"int checkpoint_interval, {_PAGED_OPTIONS}) -> ()",
    module="chunk",
    fake=lambda *args, **options: None,
    adapter=_PACKED_OUT,
)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    beta_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule over whole sequences, in chunks of 64 tokens: prefill, functional.

    Per value head, in fp32: ``S <- exp(g) S``, ``S <- S + beta (v - S k) k^T``, ``o = scale S q``, S of ``[V, K]``.

    Args:
        q, k: ``[B, T, H, K]``, bf16 or fp16, on a CPU also fp32, K of 64, 128 or 256, strides free but the last.
        v: ``[B, T, HV, V]``, the dtype of q, V of 64, 128 or 256, HV a multiple of H; value head i reads key head
            ``i // (HV / H)``.
        g, beta: ``[B, T, HV]`` fp32: the natural log of the decay, at most 0, and the write strength. Where ``A_log``
            and ``dt_bias`` are given: the raw ``a`` and ``b`` in any of the float dtypes, see :func:`gating`.
        scale: of the output; default ``K ** -0.5``.
        initial_state: ``[N, HV, V, K]``, any of the float dtypes; default zeros.
        cu_seqlens: ``[N + 1]`` int32 or int64, for a packed batch of B = 1: sequence n is tokens
            ``cu_seqlens[n] .. cu_seqlens[n + 1]``. Output past the last offset is zero. Without it N = B.
        use_qk_l2norm: divide each row of q and k by ``sqrt(sum(x**2) + 1e-6)``.
        A_log, dt_bias: ``[HV]``; beta_scale: applied to ``sigmoid(b)`` where they are given.

        q, k, v, g, beta may also come without their leading dimension of 1.

    On Hopper a sequence of 8,192 tokens or more may be cut into segments that run at once (``launch.segment_config``).
    Where a head's gates decay a state to 2^-32 over the last chunks of a segment, the next one leaves out what came
    before them.

    Returns:
        ``o`` in the shape and dtype of ``v``, and ``final_state`` ``[N, HV, V, K]`` fp32; both contiguous.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.chunk_gated_delta_rule`` lists.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464.
    """
    return torch.ops.gdn.chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
    )


def chunk_gated_delta_rule_paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    has_initial_state: torch.Tensor | None = None,
    write_indices: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
) -> None:
    """:func:`chunk_gated_delta_rule` on a state pool, in place, into a caller's ``out``: an engine's prefill.

    Args:
        q, k, v, g, beta, cu_seqlens, scale, use_qk_l2norm, A_log, dt_bias, beta_scale: as there, B = 1.
        state: ``[S, HV, V, K]`` fp32, bf16 or fp16, each slot contiguous, slot stride free. Written: each sequence's
            final state. An empty sequence writes nothing.
        out: the shape and dtype of ``v``, last dimension contiguous. Written: every token; zero past the last offset.
        state_indices: ``[N]`` int32 or int64, the slot read. An index equal to ``pad_slot_id``, negative or past the
            pool is padding: output zero, no state written.
        has_initial_state: ``[N]`` bool; False: start from zeros whatever the slot holds. Default: read every slot.
        write_indices: ``[N]``, the slot written; default the one read. A padding index: the state is not kept. No row
            may write a slot that another row reads.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.chunk_gated_delta_rule_paged`` lists.
    """
    torch.ops.gdn.chunk_gated_delta_rule_paged(
        q,
        k,
        v,
        g,
        beta,
        state,
        out,
        state_indices,
        cu_seqlens,
        has_initial_state=has_initial_state,
        write_indices=write_indices,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
        pad_slot_id=pad_slot_id,
    )


def chunk_gated_delta_rule_paged_checkpoints(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    checkpoints: torch.Tensor,
    state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    checkpoint_offsets: torch.Tensor,
    *,
    checkpoint_interval: int,
    has_initial_state: torch.Tensor | None = None,
    write_indices: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
) -> None:
    """:func:`chunk_gated_delta_rule_paged` that also keeps states along the way, for prefix caches.

    Args:
        checkpoints: ``[M, HV, V, K]`` fp32, written: the state of sequence n after ``(j + 1) * checkpoint_interval`` of
            its tokens goes to row ``checkpoint_offsets[n] + j``, as far as that row lies below
            ``checkpoint_offsets[n + 1]`` and M. Other rows are untouched.
        checkpoint_offsets: ``[N + 1]`` int32 or int64.
        checkpoint_interval: tokens, a multiple of 64.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.chunk_gated_delta_rule_paged_checkpoints`` lists.
    """
    torch.ops.gdn.chunk_gated_delta_rule_paged_checkpoints(
        q,
        k,
        v,
        g,
        beta,
        state,
        out,
        checkpoints,
        state_indices,
        cu_seqlens,
        checkpoint_offsets,
        checkpoint_interval=checkpoint_interval,
        has_initial_state=has_initial_state,
        write_indices=write_indices,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
        pad_slot_id=pad_slot_id,
    )


def warm_tensors(shapes: launch.ModelShapes, device: torch.device, tokens: int = 2) -> tuple[torch.Tensor, ...]:
    """q, k, v, g, beta of two tokens, as an engine holds them: views of one packed tensor, gates in fp32."""
    keys = shapes.num_k_heads * shapes.head_k_dim
    mixed = torch.zeros(tokens, shapes.conv_channels, dtype=shapes.dtype, device=device)
    gates = torch.zeros(1, tokens, shapes.num_v_heads, device=device)
    return (
        mixed[:, :keys].view(1, tokens, shapes.num_k_heads, shapes.head_k_dim),
        mixed[:, keys : 2 * keys].view(1, tokens, shapes.num_k_heads, shapes.head_k_dim),
        mixed[:, 2 * keys :].view(1, tokens, shapes.num_v_heads, shapes.head_v_dim),
        gates,
        gates,
    )


def warm_pool(shapes: launch.ModelShapes, device: torch.device) -> torch.Tensor:
    return torch.zeros(
        2, shapes.num_v_heads, shapes.head_v_dim, shapes.head_k_dim, dtype=shapes.state_dtype, device=device
    )


def _warm_plans(shapes: launch.ModelShapes, device: torch.device) -> list[tuple[int, int]]:
    """Sequences and tokens of the calls that together launch every binary: few and many sequences, and the same with
    one so long that it is cut, or mapped."""
    target = launch.target(device)
    if not launch.has_descriptors(target):
        return [(2, 2)]
    from gdn_kernels.kernels import chunk_segments

    heads, head_dim = shapes.num_v_heads, shapes.head_v_dim
    plans: dict[Any, tuple[int, int]] = {}
    for count in (1, 2, 4, 5, 1 + launch.HOPPER_SMS):
        facts = heads, head_dim, target, launch.prefill_policy(), count * heads
        segments = launch.config("chunk_segments", *facts)
        # uncut, cut, mapped, and in as many segments as there may be
        bounds = {0}
        if segments.max_segments > 1:
            longest = max(segments.max_segments, 2 * segments.most_segments) * segments.min_tokens
            most = min(count, 4) * max(segments.long_tokens, longest)
            bounds |= {segments.long_tokens, segments.map_tokens, most} - {launch.NEVER}
        for bound in sorted(bounds):
            tokens = bound + 1 + launch.HOPPER_SMS
            states = chunk_segments.num_states(count, tokens, heads, segments)
            kind = segments if bound else None, bound >= segments.map_tokens
            plans.setdefault((*kind, launch.hopper_scan_config(head_dim, states)), (count, tokens))
    return list(plans.values())


def _warm_offsets(shapes: launch.ModelShapes, device: torch.device, count: int, tokens: int) -> torch.Tensor:
    """Offsets of ``count`` sequences, the last of which holds what ``tokens`` are left."""
    offsets = torch.arange(count + 1, dtype=shapes.index_dtype, device=device).clamp(max=tokens)
    offsets[-1] = tokens
    return offsets


def _warm_functional(l2norm: bool) -> Callable[[launch.ModelShapes, torch.device], None]:
    def warm(shapes: launch.ModelShapes, device: torch.device) -> None:
        for count, tokens in _warm_plans(shapes, device):
            offsets = _warm_offsets(shapes, device, count, tokens)
            chunk_gated_delta_rule(*warm_tensors(shapes, device, tokens), cu_seqlens=offsets, use_qk_l2norm=l2norm)

    return warm


def _warm_paged(raw: bool) -> Callable[[launch.ModelShapes, torch.device], None]:
    """``raw``: the layer's form, with gates and l2norm inside."""

    def warm(shapes: launch.ModelShapes, device: torch.device) -> None:
        for count, tokens in _warm_plans(shapes, device):
            q, k, v, g, beta = warm_tensors(shapes, device, tokens)
            offsets = _warm_offsets(shapes, device, count, tokens)
            # the pool has two slots; more sequences have none
            slots = torch.arange(count, dtype=shapes.index_dtype, device=device)
            slots[2:] = -1
            fresh = torch.ones(count, dtype=torch.bool, device=device)
            state, out = warm_pool(shapes, device), torch.empty_like(v, memory_format=torch.contiguous_format)
            options: dict[str, Any] = {}
            if raw:
                g = beta = torch.zeros(1, tokens, shapes.num_v_heads, dtype=shapes.dtype, device=device)
                options = {"use_qk_l2norm": True, **shapes.gate_parameters(device)}
            for known in (None, fresh):
                chunk_gated_delta_rule_paged(
                    q, k, v, g, beta, state, out, slots, offsets, has_initial_state=known, **options
                )
            chunk_gated_delta_rule_paged_checkpoints(
                q,
                k,
                v,
                g,
                beta,
                state,
                out,
                state.float(),
                slots,
                offsets,
                torch.zeros_like(offsets),
                checkpoint_interval=64,
                has_initial_state=fresh,
                **options,
            )

    return warm


launch.register_warmup("chunk_gated_delta_rule", _warm_functional(False))
launch.register_warmup("chunk_gated_delta_rule, l2norm inside", _warm_functional(True))
launch.register_warmup("chunk_gated_delta_rule_paged", _warm_paged(False))
launch.register_warmup("chunk_gated_delta_rule_paged, gates and l2norm inside", _warm_paged(True))
