"""``decode_step``: one token a sequence, from the projections to the gated norm, in one kernel; and its fp8 variant."""

from __future__ import annotations

from typing import Any

import torch

from gdn_kernels import contracts, launch
from gdn_kernels.ops.chunk import warm_pool
from gdn_kernels.ops.registry import define

_ARGUMENTS = (
    "Tensor mixed_qkv, Tensor a, Tensor b, Tensor z, Tensor conv_weight, Tensor? conv_bias, Tensor(a!) conv_state, "
    "Tensor A_log, Tensor dt_bias, Tensor(b!) state, Tensor norm_weight, Tensor state_indices, *, int num_k_heads, "
    "bool norm_before_gate, float? scale=None, bool use_qk_l2norm=True, float eps=1e-6, "
    "str? conv_activation='silu', str norm_activation='silu', int pad_slot_id=-1, Tensor? rounding_seed=None"
).replace("'", '"')


def _fake(mixed_qkv: torch.Tensor, a: Any, b: Any, z: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return mixed_qkv.new_empty(z.shape)


def _fake_fp8(
    mixed_qkv: torch.Tensor, a: Any, b: Any, z: torch.Tensor, *args: Any, quant_group_size: int = 128, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    scales = z.shape[0], z.shape[1:].numel() // quant_group_size
    return z.new_empty(z.shape, dtype=torch.float8_e4m3fn), z.new_empty(scales, dtype=torch.float32)


define(f"decode_step({_ARGUMENTS}) -> Tensor", module="step", fake=_fake)
define(
    f"decode_step_fp8({_ARGUMENTS}, int quant_group_size=128) -> (Tensor values, Tensor scales)",
    module="step",
    fake=_fake_fp8,
)


def decode_step(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    z: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    state_indices: torch.Tensor,
    *,
    num_k_heads: int,
    norm_before_gate: bool,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    eps: float = 1e-6,
    conv_activation: str | None = "silu",
    norm_activation: str = "silu",
    pad_slot_id: int = -1,
    rounding_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """One decode step of a mixer layer, from its in-projections to the input of its out-projection, in one kernel.

    Bit for bit :func:`causal_conv1d_update`, :func:`packed_decode` and :func:`layer_norm_gated` (RMS) in sequence, with
    their roundings: the conv's output and the recurrence's are rounded to the dtype of ``mixed_qkv``.

    Args:
        mixed_qkv: ``[N, D]``, D = 2 * H * K + HV * V, the conv's input in the order q, k, v; bf16, fp16 or fp32, token
            stride free.
        a, b: ``[N, HV]``, raw, any of these dtypes, token stride free. A_log, dt_bias: ``[HV]``.
        z: ``[N, HV, V]``, the norm's gate, in the dtype of ``mixed_qkv``, token and head strides free.
        conv_weight: ``[D, W]``, W of 2 to 4, strides free. conv_bias: ``[D]`` or None.
        conv_state: ``[S, D, W - 1]`` by strides, newest token last. Written: the slots of ``state_indices``.
        state: ``[S, HV, V, K]`` fp32, bf16 or fp16, each slot contiguous, slot stride free; K, V of 64, 128 or 256.
            Written: the slots of ``state_indices``.
        norm_weight: ``[V]``.
        state_indices: ``[N]`` int32 or int64, the slot of each row in both pools. An index equal to ``pad_slot_id``,
            negative or past the pools is padding: the norm of zeros, no state written.
        num_k_heads: H. norm_before_gate, eps, norm_activation: as ``norm_before_gate``, ``eps`` and ``activation`` of
            :func:`layer_norm_gated`. conv_activation: ``"silu"``, ``"swish"`` or None. scale: default ``K ** -0.5``.
            use_qk_l2norm: divide q and k by ``sqrt(sum(x**2) + 1e-6)``. rounding_seed: as in :func:`packed_decode`.

    Returns:
        ``[N, HV, V]`` in the dtype of ``mixed_qkv``, contiguous.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.decode_step`` lists.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464.
    """
    return torch.ops.gdn.decode_step(
        mixed_qkv,
        a,
        b,
        z,
        conv_weight,
        conv_bias,
        conv_state,
        A_log,
        dt_bias,
        state,
        norm_weight,
        state_indices,
        num_k_heads=num_k_heads,
        norm_before_gate=norm_before_gate,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        eps=eps,
        conv_activation=conv_activation,
        norm_activation=norm_activation,
        pad_slot_id=pad_slot_id,
        rounding_seed=rounding_seed,
    )


def decode_step_fp8(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    z: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    state_indices: torch.Tensor,
    *,
    num_k_heads: int,
    norm_before_gate: bool,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    eps: float = 1e-6,
    conv_activation: str | None = "silu",
    norm_activation: str = "silu",
    pad_slot_id: int = -1,
    rounding_seed: torch.Tensor | None = None,
    quant_group_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`decode_step` that ends in :func:`layer_norm_gated_fp8`, bit for bit: the input of an fp8 out-projection.

    V is a multiple of 128. The arguments are those of :func:`decode_step`, and ``quant_group_size``, which is 128.

    Returns:
        values: ``[N, HV, V]`` ``torch.float8_e4m3fn``. scales: ``[N, HV * V / 128]`` fp32. Both contiguous.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``contracts.decode_step_fp8`` lists.
        RuntimeError: the GPU has no e4m3: CUDA below sm_89, gfx942.
    """
    return torch.ops.gdn.decode_step_fp8(
        mixed_qkv,
        a,
        b,
        z,
        conv_weight,
        conv_bias,
        conv_state,
        A_log,
        dt_bias,
        state,
        norm_weight,
        state_indices,
        num_k_heads=num_k_heads,
        norm_before_gate=norm_before_gate,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        eps=eps,
        conv_activation=conv_activation,
        norm_activation=norm_activation,
        pad_slot_id=pad_slot_id,
        rounding_seed=rounding_seed,
        quant_group_size=quant_group_size,
    )


def _inputs(shapes: launch.ModelShapes, device: torch.device) -> tuple[tuple[torch.Tensor | None, ...], dict[str, Any]]:
    """Two rows as a layer has them: z a tensor of its own, the conv pool channel-last."""
    heads, channels = shapes.num_v_heads, shapes.conv_channels
    gates, parameters = torch.zeros(2, heads, dtype=shapes.dtype, device=device), shapes.gate_parameters(device)
    pool = torch.zeros(2, shapes.conv_width - 1, channels, dtype=shapes.dtype, device=device).transpose(1, 2)
    arguments = (
        torch.zeros(2, channels, dtype=shapes.dtype, device=device),
        gates,
        gates,
        torch.zeros(2, heads, shapes.head_v_dim, dtype=shapes.dtype, device=device),
        torch.zeros(channels, shapes.conv_width, dtype=shapes.dtype, device=device),
        None,
        pool,
        parameters["A_log"],
        parameters["dt_bias"],
        warm_pool(shapes, device),
        torch.ones(shapes.head_v_dim, dtype=shapes.dtype, device=device),
        torch.arange(2, dtype=shapes.index_dtype, device=device),
    )
    return arguments, {"num_k_heads": shapes.num_k_heads, "norm_before_gate": True}


def _warm(shapes: launch.ModelShapes, device: torch.device) -> None:
    arguments, options = _inputs(shapes, device)
    for seed in shapes.rounding_seeds(device):
        decode_step(*arguments, **options, rounding_seed=seed)


def _warm_fp8(shapes: launch.ModelShapes, device: torch.device) -> None:
    # where it is refused there is nothing to build
    if shapes.head_v_dim % contracts.QUANT_GROUP == 0 and launch.has_fp8(launch.target(device)):
        arguments, options = _inputs(shapes, device)
        for seed in shapes.rounding_seeds(device):
            decode_step_fp8(*arguments, **options, rounding_seed=seed)


launch.register_warmup("decode_step", _warm)
launch.register_warmup("decode_step_fp8", _warm_fp8)
