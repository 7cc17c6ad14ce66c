"""``layer_norm_gated``, ``layer_norm_gated_out`` and ``l2norm``: norms over rows, with an optional gate."""

from __future__ import annotations

import torch

from gdn_kernels import launch
from gdn_kernels.ops.registry import define

_OPTIONS = (
    "bool norm_before_gate, bool is_rms_norm=True, float eps=1e-6, int? group_size=None, str activation='silu'"
).replace("'", '"')

define(
    f"layer_norm_gated(Tensor x, Tensor weight, Tensor? bias=None, Tensor? z=None, *, {_OPTIONS}) -> Tensor",
    module="norm",
    fake=lambda x, *args, **options: x.new_empty(x.shape),
)
define(
    f"layer_norm_gated_out(Tensor x, Tensor weight, Tensor? bias, Tensor? z, Tensor(a!) out, *, {_OPTIONS}) -> ()",
    module="norm",
    fake=lambda *args, **options: None,
)
define(
    "l2norm(Tensor x, *, float eps=1e-6) -> Tensor",
    module="norm",
    fake=lambda x, **options: x.new_empty(x.shape),
)


def layer_norm_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    *,
    norm_before_gate: bool,
    is_rms_norm: bool = True,
    eps: float = 1e-6,
    group_size: int | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """RMS or layer norm of each row, times an activation of ``z``; the norm at the end of a Gated Delta Net mixer.

    Args:
        x: ``[..., D]``, bf16, fp16 or fp32, one to four dimensions, last one contiguous, other strides free.
        weight: ``[D]``, any of these dtypes.
        bias: ``[D]`` or None.
        z: the gate, shape and dtype of ``x``, strides of its own; None for no gate.
        norm_before_gate: True: ``norm(x) * weight + bias``, then ``* act(z)`` (Qwen3-Next, FLA). False: the norm is
            taken of ``x * act(z)`` (Mamba-2). There is no default, because codebases disagree.
        is_rms_norm: RMS norm, else layer norm with the biased variance.
        eps: added to the mean square or the variance, in fp32.
        group_size: the norm is taken over groups of this many columns; default ``D``. At most 65,536.
        activation: ``"silu"`` (``"swish"`` is the same) or ``"sigmoid"``.

    Returns:
        ``[..., D]`` in the dtype of ``x``, contiguous. Computed in fp32.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.layer_norm_gated`` lists.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467; the gate as in Dao and Gu,
    "Transformers are SSMs", arXiv 2405.21060.
    """
    return torch.ops.gdn.layer_norm_gated(
        x,
        weight,
        bias,
        z,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        eps=eps,
        group_size=group_size,
        activation=activation,
    )


def layer_norm_gated_out(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    out: torch.Tensor,
    *,
    norm_before_gate: bool,
    is_rms_norm: bool = True,
    eps: float = 1e-6,
    group_size: int | None = None,
    activation: str = "silu",
) -> None:
    """:func:`layer_norm_gated` into a caller's buffer.

    ``out`` has the shape and dtype of ``x``, a contiguous last dimension, other strides free; it may be ``x`` itself.
    Writes all of ``out``; returns nothing.
    """
    torch.ops.gdn.layer_norm_gated_out(
        x,
        weight,
        bias,
        z,
        out,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        eps=eps,
        group_size=group_size,
        activation=activation,
    )


def l2norm(x: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Each row divided by ``sqrt(sum(x**2) + eps)``; for q and k, where a delta rule does not normalise them inside.

    ``x`` is ``[..., D]``, bf16, fp16 or fp32, one to four dimensions, last one contiguous. Returns the same shape and
    dtype, contiguous, computed in fp32.
    """
    return torch.ops.gdn.l2norm(x, eps=eps)


def _warm_norm(shapes: launch.ModelShapes, device: torch.device) -> None:
    x = torch.ones(2, shapes.num_v_heads, shapes.head_v_dim, dtype=shapes.dtype, device=device)
    weight = torch.ones(shapes.head_v_dim, dtype=shapes.dtype, device=device)
    layer_norm_gated(x, weight, None, x, norm_before_gate=True)
    # the layer's form: z is a column view of a wider projection
    wide = torch.ones(2, 2 * shapes.num_v_heads * shapes.head_v_dim, dtype=shapes.dtype, device=device)
    z = wide[:, shapes.num_v_heads * shapes.head_v_dim :].view(2, shapes.num_v_heads, shapes.head_v_dim)
    layer_norm_gated(x, weight, None, z, norm_before_gate=True)


def _warm_l2norm(shapes: launch.ModelShapes, device: torch.device) -> None:
    l2norm(torch.ones(2, shapes.num_k_heads, shapes.head_k_dim, dtype=shapes.dtype, device=device))


launch.register_warmup("layer_norm_gated", _warm_norm)
launch.register_warmup("l2norm", _warm_l2norm)
