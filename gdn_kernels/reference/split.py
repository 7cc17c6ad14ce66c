"""Unpacking of interleaved in-projections, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def split_qkvz_ba(
    qkvz: Tensor, ba: Tensor, *, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per key head ``[q K | k K | v rV | z rV]`` and ``[b r | a r]`` to ``(mixed_qkv, z, b, a)``, r = HV / H.

    qkvz ``[T, H (2K + 2rV)]``, ba ``[T, H 2r]``. Returns new contiguous tensors: mixed_qkv ``[T, 2HK + HV V]``
    in the order q, k, v; z ``[T, HV, V]``; b and a ``[T, HV]``.
    """
    T, H, HV, K, V = qkvz.shape[0], num_k_heads, num_v_heads, head_k_dim, head_v_dim
    ratio = HV // H
    q, k, v, z = qkvz.unflatten(1, (H, -1)).split([K, K, ratio * V, ratio * V], -1)
    b, a = ba.unflatten(1, (H, -1)).split([ratio, ratio], -1)

    mixed_qkv = qkvz.new_empty(T, 2 * H * K + HV * V)
    for part, target in zip((q, k, v), mixed_qkv.split([H * K, H * K, HV * V], -1), strict=True):
        target.unflatten(1, (H, -1)).copy_(part)

    def fresh(part: Tensor, shape: tuple[int, ...]) -> Tensor:  # with one key head a reshape would alias the input
        out = part.new_empty(shape)
        out.view(part.shape).copy_(part)
        return out

    return mixed_qkv, fresh(z, (T, HV, V)), fresh(b, (T, HV)), fresh(a, (T, HV))
