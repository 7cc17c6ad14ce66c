"""``gating``: the decay and the write strength of every head from the raw projections."""

from __future__ import annotations

import torch

from gdn_kernels import launch
from gdn_kernels.ops.registry import define
from gdn_kernels.reference import backward


def _fake(a: torch.Tensor, *args: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if a.dtype is torch.float64 else torch.float32
    return a.new_empty(a.shape, dtype=dtype), a.new_empty(a.shape, dtype=dtype)


define(
    "gating(Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, *, float beta_scale=1.0) -> (Tensor g, Tensor beta)",
    module="gating",
    fake=_fake,
    backward=backward.gating,
)


def gating(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, *, beta_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = beta_scale * sigmoid(b)``, both in fp32.

    Args:
        a, b: ``[T, HV]`` or ``[B, T, HV]``, bf16, fp16 or fp32, last dimension contiguous, other strides free.
        A_log, dt_bias: ``[HV]``, bf16, fp16 or fp32.
        beta_scale: 2.0 where the model allows negative eigenvalues.

    Returns:
        ``g``, the natural log of the decay (at most 0), and ``beta``: fp32, contiguous, the shape of ``a``. The
        softplus is ``log1p(exp(x))`` up to 20 and ``x`` above. Differentiable in all four tensors.

    Raises:
        TypeError, ValueError: as ``contracts.gating`` lists.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464; the gate as in Dao and Gu, arXiv
    2405.21060.
    """
    return torch.ops.gdn.gating(a, b, A_log, dt_bias, beta_scale=beta_scale)


def _warm(shapes: launch.ModelShapes, device: torch.device) -> None:
    a = torch.zeros(2, shapes.num_v_heads, dtype=shapes.dtype, device=device)
    gating(a, a, **shapes.gate_parameters(device))


launch.register_warmup("gating", _warm)
