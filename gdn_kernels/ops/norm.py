"""``layer_norm_gated`` with its out and fp8 variants, and ``l2norm``: norms over rows, with an optional gate."""

from __future__ import annotations

from typing import Any

import torch

from gdn_kernels import contracts, launch
from gdn_kernels.ops.registry import define
from gdn_kernels.reference import backward

_OPTIONS = (
    "bool norm_before_gate, bool is_rms_norm=True, float eps=1e-6, int? group_size=None, str activation='silu'"
).replace("'", '"')

define(
    f"layer_norm_gated(Tensor x, Tensor weight, Tensor? bias=None, Tensor? z=None, *, {_OPTIONS}) -> Tensor",
    module="norm",
    fake=lambda x, *args, **options: x.new_empty(x.shape),
    backward=backward.layer_norm_gated,
)
define(
    f"layer_norm_gated_out(Tensor x, Tensor weight, Tensor? bias, Tensor? z, Tensor(a!) out, *, {_OPTIONS}) -> ()",
    module="norm",
    fake=lambda *args, **options: None,
)


def _fp8_results(x: torch.Tensor, *args: Any, quant_group_size: int = 128, **options: Any) -> tuple[torch.Tensor, ...]:
    scales = x.shape[0], x.shape[1:].numel() // quant_group_size
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(scales, dtype=torch.float32)


define(
    "layer_norm_gated_fp8(Tensor x, Tensor weight, Tensor? bias=None, Tensor? z=None, *, "
    f"{_OPTIONS}, int quant_group_size=128) -> (Tensor values, Tensor scales)",
    module="norm",
    fake=_fp8_results,
)
define(
    "l2norm(Tensor x, *, float eps=1e-6) -> Tensor",
    module="norm",
    fake=lambda x, **options: x.new_empty(x.shape),
    backward=backward.l2norm,
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
        ``[..., D]`` in the dtype of ``x``, contiguous. Computed in fp32. Differentiable in all four tensors.

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


def layer_norm_gated_fp8(
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
    quant_group_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`layer_norm_gated`, quantised to fp8 in the same kernel: the input of an fp8 output projection.

    The norm is rounded to the dtype of ``x`` first. Then, for each token and group of 128 columns,
    ``scale = max(max |y|, 1e-10) / 448`` and ``value = y / scale`` rounded to nearest even: bit for bit
    :func:`layer_norm_gated` followed by that quantisation in PyTorch, by true divisions. A group of zeros gets the
    scale ``1e-10 / 448`` and zeros; a group with a NaN gets a scale and values of NaN.

    Args:
        x: ``[T, HV, V]`` or ``[M, D]``; a token is ``x[t]``, its columns ``HV * V`` or ``D``. Otherwise this and the
            arguments that are not named here are those of :func:`layer_norm_gated`.
        group_size: columns that the norm is taken over, a multiple of 128; default ``V`` or ``D``, which then is one.
        quant_group_size: columns that share a scale: 128.

    Returns:
        values: the shape of ``x``, ``torch.float8_e4m3fn`` (largest number 448), contiguous.
        scales: ``[T, HV * V / 128]`` fp32, contiguous; ``values * scales`` are the norm's.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.layer_norm_gated_fp8`` lists.
        RuntimeError: the GPU has no e4m3: CUDA below sm_89, gfx942.

    Source: the norm as :func:`layer_norm_gated`; the quantisation as ``per_token_group_quant_fp8`` of vLLM and SGLang.
    """
    return torch.ops.gdn.layer_norm_gated_fp8(
        x,
        weight,
        bias,
        z,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        eps=eps,
        group_size=group_size,
        activation=activation,
        quant_group_size=quant_group_size,
    )


def l2norm(x: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Each row divided by ``sqrt(sum(x**2) + eps)``; for q and k, where a delta rule does not normalise them inside.

    ``x`` is ``[..., D]``, bf16, fp16 or fp32, one to four dimensions, last one contiguous. Returns the same shape and
    dtype, contiguous, computed in fp32. Differentiable.
    """
    return torch.ops.gdn.l2norm(x, eps=eps)


def _norm_inputs(shapes: launch.ModelShapes, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x, weight, and z as the layer has it: a column view of a wider projection."""
    x = torch.ones(2, shapes.num_v_heads, shapes.head_v_dim, dtype=shapes.dtype, device=device)
    weight = torch.ones(shapes.head_v_dim, dtype=shapes.dtype, device=device)
    wide = torch.ones(2, 2 * shapes.num_v_heads * shapes.head_v_dim, dtype=shapes.dtype, device=device)
    z = wide[:, shapes.num_v_heads * shapes.head_v_dim :].view(2, shapes.num_v_heads, shapes.head_v_dim)
    return x, weight, z


def _warm_norm(shapes: launch.ModelShapes, device: torch.device) -> None:
    x, weight, z = _norm_inputs(shapes, device)
    layer_norm_gated(x, weight, None, x, norm_before_gate=True)
    layer_norm_gated(x, weight, None, z, norm_before_gate=True)


def _warm_norm_fp8(shapes: launch.ModelShapes, device: torch.device) -> None:
    # where it is refused there is nothing to build
    if shapes.head_v_dim % contracts.QUANT_GROUP == 0 and launch.has_fp8(launch.target(device)):
        x, weight, z = _norm_inputs(shapes, device)
        layer_norm_gated_fp8(x, weight, None, x, norm_before_gate=True)
        layer_norm_gated_fp8(x, weight, None, z, norm_before_gate=True)


def _warm_l2norm(shapes: launch.ModelShapes, device: torch.device) -> None:
    l2norm(torch.ones(2, shapes.num_k_heads, shapes.head_k_dim, dtype=shapes.dtype, device=device))


launch.register_warmup("layer_norm_gated", _warm_norm)
launch.register_warmup("layer_norm_gated_fp8", _warm_norm_fp8)
launch.register_warmup("l2norm", _warm_l2norm)
