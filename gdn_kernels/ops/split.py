"""``split_qkvz_ba``: unpacks the interleaved in-projections of Qwen3-Next."""

from __future__ import annotations

import torch

from gdn_kernels import launch
from gdn_kernels.ops.registry import define


def _fake(
    qkvz: torch.Tensor, ba: torch.Tensor, *, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = qkvz.shape[0]
    return (
        qkvz.new_empty(tokens, 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim),
        qkvz.new_empty(tokens, num_v_heads, head_v_dim),
        ba.new_empty(tokens, num_v_heads),
        ba.new_empty(tokens, num_v_heads),
    )


define(
    "split_qkvz_ba(Tensor qkvz, Tensor ba, *, int num_k_heads, int num_v_heads, int head_k_dim, int head_v_dim) "
    "-> (Tensor mixed_qkv, Tensor z, Tensor b, Tensor a)",
    module="split",
    fake=_fake,
)


def split_qkvz_ba(
    qkvz: torch.Tensor, ba: torch.Tensor, *, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reorders the two fused in-projections of Qwen3-Next into what conv, gating and norm read.

    Args:
        qkvz: ``[T, 2 * H * K + 2 * HV * V]``, for each key head ``[q: K | k: K | v: r * V | z: r * V]``,
            ``r = HV / H``; bf16, fp16 or fp32, last dimension contiguous, token stride free.
        ba: ``[T, 2 * HV]``, for each key head ``[b: r | a: r]``.
        num_k_heads, num_v_heads, head_k_dim, head_v_dim: H, HV, K, V.

    Returns:
        ``mixed_qkv`` ``[T, 2 * H * K + HV * V]`` (all q, then k, then v), ``z`` ``[T, HV, V]``, ``b`` and ``a``
        ``[T, HV]``, each contiguous in the dtype of its source.

    Raises:
        TypeError, ValueError: as ``contracts.split_qkvz_ba`` lists.
    """
    return torch.ops.gdn.split_qkvz_ba(
        qkvz,
        ba,
        num_k_heads=num_k_heads,
        num_v_heads=num_v_heads,
        head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
    )


def _warm(shapes: launch.ModelShapes, device: torch.device) -> None:
    width = 2 * (shapes.num_k_heads * shapes.head_k_dim + shapes.num_v_heads * shapes.head_v_dim)
    split_qkvz_ba(
        torch.zeros(2, width, dtype=shapes.dtype, device=device),
        torch.zeros(2, 2 * shapes.num_v_heads, dtype=shapes.dtype, device=device),
        num_k_heads=shapes.num_k_heads,
        num_v_heads=shapes.num_v_heads,
        head_k_dim=shapes.head_k_dim,
        head_v_dim=shapes.head_v_dim,
    )


launch.register_warmup("split_qkvz_ba", _warm)
