"""``packed_decode`` and ``packed_decode_out``: one token a sequence, from the packed conv output to the mixer's."""

from __future__ import annotations

from typing import Any

import torch

from gdn_kernels import launch
from gdn_kernels.ops.chunk import warm_pool
from gdn_kernels.ops.registry import define


def _fake(
    mixed_qkv: torch.Tensor, a: Any, b: Any, A_log: Any, dt_bias: Any, state: torch.Tensor, *args: Any, **options: Any
) -> torch.Tensor:
    return mixed_qkv.new_empty(mixed_qkv.shape[0], state.shape[1], state.shape[2])


_OPTIONS = "int num_k_heads, float? scale=None, bool use_qk_l2norm=True, int pad_slot_id=-1, Tensor? rounding_seed=None"

define(
    "packed_decode(Tensor mixed_qkv, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) state, "
    f"Tensor state_indices, *, {_OPTIONS}) -> Tensor",
    module="decode",
    fake=_fake,
)
define(
    "packed_decode_out(Tensor mixed_qkv, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) state, "
    f"Tensor(b!) out, Tensor state_indices, *, {_OPTIONS}) -> ()",
    module="decode",
    fake=lambda *args, **options: None,
)


def packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    *,
    num_k_heads: int,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    pad_slot_id: int = -1,
    rounding_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """One decode step of the gated delta rule: gate, sigmoid, l2norm and recurrence, on a state pool, in place.

    Args:
        mixed_qkv: ``[N, 2 * H * K + HV * V]``, the conv's output in the order q, k, v; bf16, fp16 or fp32, token
            stride free.
        a, b: ``[N, HV]``, raw, any of these dtypes, token stride free. A_log, dt_bias: ``[HV]``.
        state: ``[S, HV, V, K]`` fp32, bf16 or fp16, each slot contiguous, slot stride free; K, V of 64, 128 or 256.
            Written: the slots of ``state_indices``.
        state_indices: ``[N]`` int32 or int64. An index equal to ``pad_slot_id``, negative or past the pool is padding:
            output zero, no state written. No slot may be named twice: which row's state it then holds is undefined;
            ``launch.debug_checks()`` refuses it.
        num_k_heads: H. scale: default ``K ** -0.5``. use_qk_l2norm: divide q and k by ``sqrt(sum(x**2) + 1e-6)``.
        rounding_seed: one int32 or int64, with a bf16 or fp16 state: states are rounded stochastically, see
            :func:`recurrent_gated_delta_rule_paged`. A new seed for every step and layer; the position is 0.

    Returns:
        ``[N, HV, V]`` in the dtype of ``mixed_qkv``, contiguous.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.packed_decode`` lists.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464.
    """
    return torch.ops.gdn.packed_decode(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        state_indices,
        num_k_heads=num_k_heads,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        pad_slot_id=pad_slot_id,
        rounding_seed=rounding_seed,
    )


def packed_decode_out(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    state_indices: torch.Tensor,
    *,
    num_k_heads: int,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    pad_slot_id: int = -1,
    rounding_seed: torch.Tensor | None = None,
) -> None:
    """:func:`packed_decode` into a caller's buffer, by the same kernel with the same bits.

    ``out`` is ``[N, HV, V]``, or ``[N, 1, HV, V]`` as engines hold it, in the dtype of ``mixed_qkv``, contiguous, in
    memory of its own. Writes all of ``out``, zeros where a row is padding; returns nothing.
    """
    torch.ops.gdn.packed_decode_out(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        out,
        state_indices,
        num_k_heads=num_k_heads,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        pad_slot_id=pad_slot_id,
        rounding_seed=rounding_seed,
    )


def _warm(shapes: launch.ModelShapes, device: torch.device) -> None:
    gates = torch.zeros(2, shapes.num_v_heads, dtype=shapes.dtype, device=device)
    for seed in shapes.rounding_seeds(device):
        packed_decode(
            torch.zeros(2, shapes.conv_channels, dtype=shapes.dtype, device=device),
            gates,
            gates,
            **shapes.gate_parameters(device),
            state=warm_pool(shapes, device),
            state_indices=torch.arange(2, dtype=shapes.index_dtype, device=device),
            num_k_heads=shapes.num_k_heads,
            rounding_seed=seed,
        )


launch.register_warmup("packed_decode", _warm)
