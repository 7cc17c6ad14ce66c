"""One decode step of a mixer layer, from the projections to the gated norm, in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdn_kernels.reference import conv, decode, norm


def _mixed(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    conv_activation: str | None,
    pad_slot_id: int,
    **options: Any,
) -> Tensor:
    """The mixer's output before its norm; writes both states."""
    convolved = conv.causal_conv1d_update(
        mixed_qkv,
        conv_weight,
        conv_bias,
        conv_state,
        state_indices=state_indices,
        activation=conv_activation,
        pad_slot_id=pad_slot_id,
    )
    return decode.packed_decode(
        convolved, a, b, A_log, dt_bias, state, state_indices, pad_slot_id=pad_slot_id, **options
    )


def decode_step(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    norm_weight: Tensor,
    state_indices: Tensor,
    *,
    num_k_heads: int,
    norm_before_gate: bool,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    eps: float = 1e-6,
    conv_activation: str | None = "silu",
    norm_activation: str = "silu",
    pad_slot_id: int = -1,
    rounding_seed: Tensor | None = None,
) -> Tensor:
    """causal_conv1d_update, packed_decode and layer_norm_gated (RMS) of one token a row, in sequence.

    mixed_qkv ``[N, 2HK + HV V]``, the conv's input; z ``[N, HV, V]``; both pools are updated in place at state_indices
    ``[N]``. Returns ``[N, HV, V]`` in mixed_qkv's dtype. Source: Yang et al., Gated Delta Networks, arXiv 2412.06464.
    """
    o = _mixed(
        mixed_qkv,
        a,
        b,
        conv_weight,
        conv_bias,
        conv_state,
        A_log,
        dt_bias,
        state,
        state_indices,
        conv_activation,
        pad_slot_id,
        num_k_heads=num_k_heads,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        rounding_seed=rounding_seed,
    )
    return norm.layer_norm_gated(
        o, norm_weight, None, z, norm_before_gate=norm_before_gate, eps=eps, activation=norm_activation
    )


def decode_step_fp8(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    norm_weight: Tensor,
    state_indices: Tensor,
    *,
    num_k_heads: int,
    norm_before_gate: bool,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    eps: float = 1e-6,
    conv_activation: str | None = "silu",
    norm_activation: str = "silu",
    pad_slot_id: int = -1,
    rounding_seed: Tensor | None = None,
    quant_group_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """The same with layer_norm_gated_fp8 at its end."""
    o = _mixed(
        mixed_qkv,
        a,
        b,
        conv_weight,
        conv_bias,
        conv_state,
        A_log,
        dt_bias,
        state,
        state_indices,
        conv_activation,
        pad_slot_id,
        num_k_heads=num_k_heads,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        rounding_seed=rounding_seed,
    )
    return norm.layer_norm_gated_fp8(
        o,
        norm_weight,
        None,
        z,
        norm_before_gate=norm_before_gate,
        eps=eps,
        activation=norm_activation,
        quant_group_size=quant_group_size,
    )
