"""The gates of the delta rule, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from gdn_kernels.reference import _math


def gating(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *, beta_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """g = -exp(A_log) softplus(a + dt_bias), the natural-log decay, and beta = beta_scale sigmoid(b).

    a, b ``[..., HV]``, A_log, dt_bias ``[HV]``. Returns g and beta, new, contiguous and fp32 (fp64 for fp64 a).
    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464.
    """
    g, beta = _math.gates(a, b, A_log, dt_bias, beta_scale, _math.compute_dtype(a))
    return g.contiguous(), beta.contiguous()
