"""``recurrent_gated_delta_rule`` and its paged forms: token by token, for decode and verify."""

from __future__ import annotations

from typing import Any

import torch

from gdn_kernels import contracts, launch
from gdn_kernels.ops.chunk import FUNCTIONAL, GATES, PACKED, fake_functional, warm_pool, warm_tensors
from gdn_kernels.ops.registry import Adapter, define

_OPTIONS = (
    f"float? scale=None, bool use_qk_l2norm=False, {GATES}, int pad_slot_id=-1, Tensor? rounding_seed=None, "
    "int? tokens_per_row=None"
)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return v.new_empty(v.shape)


def _has_rows(q: torch.Tensor, *args: Any, **options: Any) -> bool:
    return q.dim() == 3 or "tokens_per_row" in options


def _lift_rows(
    q: torch.Tensor, *args: Any, tokens_per_row: int | None = None, **options: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Packed tokens as rows of ``tokens_per_row``, each tensor with or without its leading 1; else as ``PACKED``."""
    args = (q, *args)
    if tokens_per_row is None:
        return PACKED.lift(*args, **options) if q.dim() == 3 else (args, options)
    contracts.tokens_per_row(tokens_per_row, options.get("cu_seqlens"), *args[:5])
    rows = []
    for x, inner in zip(args, (2, 2, 2, 1, 1), strict=False):
        tokens, *size = x.shape[-inner - 1 :]
        token, *strides = x.stride()[-inner - 1 :]
        # as_strided, because view would ask how large an unbacked T is
        shape = tokens // tokens_per_row, tokens_per_row, *size
        rows.append(launch.view(x.as_strided(shape, (tokens_per_row * token, token, *strides)), x))
    return (*rows, *args[5:]), options


def _lower_rows(o: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> torch.Tensor:
    tokens, heads, size = v.shape[-3:]
    strides = tokens * heads * size, heads * size, size, 1
    return launch.view(o.as_strided(v.shape, strides[-v.dim() :]), o)


#: As ``PACKED``, and packed rows of equal length with ``tokens_per_row``: an engine's drafts, without its offsets.
_ROWS = Adapter(_has_rows, _lift_rows, _lower_rows)


define("recurrent_gated_delta_rule" + FUNCTIONAL, module="recurrent", fake=fake_functional, adapter=PACKED)
define(
    "recurrent_gated_delta_rule_paged(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, "
    "Tensor state_indices, *, Tensor? cu_seqlens=None, Tensor? write_indices=None, Tensor? num_accepted_tokens=None, "
    f"Tensor? has_initial_state=None, {_OPTIONS}) -> Tensor",
    module="recurrent",
    fake=_fake,
    adapter=_ROWS,
)
define(
    "recurrent_gated_delta_rule_verify(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state, "
    "Tensor(a!) intermediate_states, Tensor state_indices, *, Tensor? intermediate_indices=None, "
    f"Tensor? cu_seqlens=None, Tensor? parents=None, Tensor? has_initial_state=None, {_OPTIONS}) -> Tensor",
    module="recurrent",
    fake=_fake,
    adapter=_ROWS,
)


def recurrent_gated_delta_rule(
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
    """:func:`chunk_gated_delta_rule` computed token by token: the same arguments, results and errors, another speed.

    On a CPU it also takes fp64 tensors and is then the oracle that everything else is tested against;
    ``final_state`` is fp64 in that case.
    """
    return torch.ops.gdn.recurrent_gated_delta_rule(
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


def recurrent_gated_delta_rule_paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    write_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
    rounding_seed: torch.Tensor | None = None,
    tokens_per_row: int | None = None,
) -> torch.Tensor:
    """The gated delta rule for a few tokens a sequence on a state pool, in place: decode and verify.

    Args:
        q, k: ``[N, t, H, K]``, t tokens for each of N rows; or packed, ``[1, T, H, K]`` or ``[T, H, K]`` with
            ``cu_seqlens`` ``[N + 1]``. v, g, beta, scale, use_qk_l2norm, A_log, dt_bias, beta_scale: as for
            :func:`chunk_gated_delta_rule`.
        state: ``[S, HV, V, K]`` fp32, bf16 or fp16, each slot contiguous, slot stride free. Written.
        state_indices: int32 or int64. ``[N]``: the slot read, and written after the last token.
            ``[N, t]``: read is ``state_indices[n, num_accepted_tokens[n] - 1]`` (column 0 without accepted counts), and
            the state after token i goes to ``state_indices[n, i]``. An index equal to ``pad_slot_id``, negative or
            past the pool is padding: where read, the row's output is zero and nothing is written; where only written,
            that state is not kept.
        write_indices: ``[N]``, the slot written, with ``state_indices`` ``[N]`` only.
        No row may write a slot that another row reads or writes: rows have no order, so what it holds, and what the
        other row reads, is then undefined. ``launch.debug_checks()`` refuses such indices.
        num_accepted_tokens: ``[N]`` int32 or int64, with ``state_indices`` ``[N, t]`` only. A count outside ``1 .. t``
            makes the row inert: output zero, nothing written.
        has_initial_state: ``[N]`` bool; False: start from zeros whatever the slot holds.
        rounding_seed: one int32 or int64 beside the state, which is bf16 or fp16: every state written is rounded
            stochastically, each element to one of its two neighbours with the probability of the other's distance, so
            that rounding has no bias over a long decode. What the dtype holds stays; past its largest number rounding
            is to nearest. The random numbers are those of the seed, the slot written, the token's position in the call
            and the element's head, row and column, whatever the batch: **give every step, and every layer, a seed of
            its own**, or errors add up again. The kernel reads the tensor, so a captured graph sees the value it holds
            at each replay. Warm-up: ``ModelShapes(stochastic_rounding=True)``.
        tokens_per_row: t, where the N rows come packed without ``cu_seqlens``, token after token: q, k, v
            ``[1, N * t, heads, size]`` and g, beta ``[1, N * t, HV]``, each with or without its leading 1.

    Returns:
        ``o`` in the shape and dtype of ``v``, contiguous.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.recurrent_gated_delta_rule_paged`` lists.
    """
    return torch.ops.gdn.recurrent_gated_delta_rule_paged(
        q,
        k,
        v,
        g,
        beta,
        state,
        state_indices,
        cu_seqlens=cu_seqlens,
        write_indices=write_indices,
        num_accepted_tokens=num_accepted_tokens,
        has_initial_state=has_initial_state,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
        pad_slot_id=pad_slot_id,
        rounding_seed=rounding_seed,
        tokens_per_row=tokens_per_row,
    )


def recurrent_gated_delta_rule_verify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    intermediate_states: torch.Tensor,
    state_indices: torch.Tensor,
    *,
    intermediate_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
    rounding_seed: torch.Tensor | None = None,
    tokens_per_row: int | None = None,
) -> torch.Tensor:
    """:func:`recurrent_gated_delta_rule_paged` for drafted tokens: the pool is left alone, states go to a buffer.

    Args:
        state: ``[S, HV, V, K]``, read only. state_indices: ``[N]``.
        intermediate_states: ``[M, t, HV, V, K]`` fp32, bf16 or fp16, inner block contiguous. Written: ``[m, i]`` is the
            state after token i.
        intermediate_indices: ``[N]``, the row m of each sequence; default n. Outside the buffer: nothing is stored.
        parents: ``[N, t]`` int32 or int64, a tree of drafts: token i starts from the stored state of token
            ``parents[n, i]``, or from the slot's where that is outside ``[0, i)``. Default: token i follows i - 1.
        rounding_seed: as above, for ``intermediate_states`` of bf16 or fp16, with the buffer's row in place of the slot
            and the step as position. A chain goes on from the unrounded state, a tree from the stored one.
        tokens_per_row: as above.
        No two sequences may share a row of the buffer (undefined; ``launch.debug_checks()`` refuses it).

    Returns:
        ``o`` in the shape and dtype of ``v``, contiguous.
    """
    return torch.ops.gdn.recurrent_gated_delta_rule_verify(
        q,
        k,
        v,
        g,
        beta,
        state,
        intermediate_states,
        state_indices,
        intermediate_indices=intermediate_indices,
        cu_seqlens=cu_seqlens,
        parents=parents,
        has_initial_state=has_initial_state,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=beta_scale,
        pad_slot_id=pad_slot_id,
        rounding_seed=rounding_seed,
        tokens_per_row=tokens_per_row,
    )


def _warm(shapes: launch.ModelShapes, device: torch.device) -> None:
    q, k, v, g, beta = warm_tensors(shapes, device)
    offsets = torch.arange(3, dtype=shapes.index_dtype, device=device)
    slots = offsets[:2].clone()
    for l2norm in (False, True):
        recurrent_gated_delta_rule(q, k, v, g, beta, cu_seqlens=offsets, use_qk_l2norm=l2norm)
        for seed in shapes.rounding_seeds(device):
            recurrent_gated_delta_rule_paged(
                q,
                k,
                v,
                g,
                beta,
                warm_pool(shapes, device),
                slots,
                cu_seqlens=offsets,
                use_qk_l2norm=l2norm,
                rounding_seed=seed,
            )


def _warm_drafts(shapes: launch.ModelShapes, device: torch.device) -> None:
    """Verification, where the model is served with it: gates and l2norm inside, a slot a token or a buffer."""
    drafts, pool = shapes.draft_tokens, warm_pool(shapes, device)
    if drafts == 0:
        return
    rows = [x[0, :, None].expand(2, drafts, *x.shape[2:]) for x in warm_tensors(shapes, device)[:3]]
    raw = torch.zeros(2, drafts, shapes.num_v_heads, dtype=shapes.dtype, device=device)
    table = torch.zeros(2, drafts, dtype=shapes.index_dtype, device=device)
    kept = pool[:, None].expand(2, drafts, *pool.shape[1:]).contiguous()
    for seed in shapes.rounding_seeds(device):
        options = {"use_qk_l2norm": True, "rounding_seed": seed, **shapes.gate_parameters(device)}
        for accepted in (None, table[:, 0].contiguous()):
            recurrent_gated_delta_rule_paged(*rows, raw, raw, pool, table - 1, num_accepted_tokens=accepted, **options)
        for tree in (None, table):
            recurrent_gated_delta_rule_verify(
                *rows, raw, raw, pool, kept, table[:, 0].contiguous(), parents=tree, **options
            )


launch.register_warmup("recurrent_gated_delta_rule", _warm)
launch.register_warmup("recurrent_gated_delta_rule_verify", _warm_drafts)
