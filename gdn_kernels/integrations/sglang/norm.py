"""SGLang's gated norms. Dynamo traces them in piecewise graphs: one graph for every token count."""

from __future__ import annotations

import torch

from gdn_kernels.integrations import _engine_calls as calls
from gdn_kernels.integrations.sglang._plugin import FLA, plugin


@plugin.place(f"{FLA}.layernorm_gated._layer_norm_fwd", "layer_norm_gated", "layer_norm_gated_out")
def layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    z=None,
    out=None,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
    activation="swish",
    quant_heads=0,
):
    """``(y, None, None)``, y of x's shape ``[M, N]``; z ``[M, N]`` or ``[tokens, heads, N]``."""
    if quant_heads:
        return "quant_heads: one fp8 scale a token"
    y = calls.norm(
        x,
        weight,
        bias,
        z,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        activation=activation,
        out=out,
    )
    return y if isinstance(y, str) else (y, None, None)


@plugin.place(f"{FLA}.layernorm_gated.rms_norm_gated", "layer_norm_gated")
def rms_norm_gated(
    *,
    x,
    weight,
    bias,
    z=None,
    eps=1e-6,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
    activation="swish",
):
    """A new tensor of the shape of x ``[..., N]``."""
    return calls.norm(
        x,
        weight,
        bias,
        z,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        activation=activation,
    )


@plugin.place(f"{FLA}.layernorm_gated.layernorm_fn", "layer_norm_gated")
def layernorm_fn(
    x,
    weight,
    bias,
    z=None,
    eps=1e-6,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
    activation="swish",
):
    """As :func:`rms_norm_gated`."""
    return calls.norm(
        x,
        weight,
        bias,
        z,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        activation=activation,
    )


def _module_norm(self, x, z, is_rms_norm, activation):
    return calls.norm(
        x,
        self.weight,
        self.bias,
        z,
        eps=self.eps,
        group_size=self.group_size,
        norm_before_gate=self.norm_before_gate,
        is_rms_norm=is_rms_norm,
        activation=activation,
    )


@plugin.place(f"{FLA}.layernorm_gated.RMSNorm.forward", "layer_norm_gated")
def rms_norm_forward(self, x, z=None):
    """The module's forward: x ``[..., N]``."""
    return _module_norm(self, x, z, True, self.activation)


@plugin.place(f"{FLA}.layernorm_gated.LayerNorm.forward", "layer_norm_gated")
def layer_norm_forward(self, x, z=None):
    """The module's forward: x ``[..., N]``."""
    return _module_norm(self, x, z, False, "swish")


def _in_place_norm(x, g, weight, bias, activation, eps, is_rms_norm):
    """y, written over x, as SGLang does; a new tensor under Dynamo, for which a write is a copy to be proven away."""
    if g.dim() > 3 and x.dim() == 2:
        g = g.reshape(g.shape[-3:])  # leading dimensions of 1
    out = None if torch.compiler.is_compiling() else x
    return calls.norm(x, weight, bias, g, eps, None, True, is_rms_norm, activation, out)


@plugin.place(f"{FLA}.fused_norm_gate.layer_norm_gated_fwd", "layer_norm_gated_out")
def layer_norm_gated_fwd(
    x,
    g,
    weight,
    bias,
    activation="swish",
    eps=1e-5,
    residual=None,
    out_dtype=None,
    residual_dtype=None,
    is_rms_norm=False,
    g_strided=None,
):
    """``(x, None, None, x)``: x ``[T, D]`` is overwritten, as SGLang does without ``out_dtype``."""
    if residual is not None or out_dtype is not None or residual_dtype not in (None, x.dtype):
        return "a residual, or an out of another dtype"
    y = _in_place_norm(x, g, weight, bias, activation, eps, is_rms_norm)
    return y if isinstance(y, str) else (y, None, None, y)


@plugin.place(f"{FLA}.fused_norm_gate.rms_norm_gated", "layer_norm_gated_out")
def fused_rms_norm_gated(
    x,
    g,
    weight,
    bias,
    activation="swish",
    residual=None,
    prenorm=False,
    residual_in_fp32=False,
    eps=1e-6,
):
    """x ``[..., D]``, overwritten; g of its shape, or ``[tokens, heads, D]`` beside ``[T, D]``, any token stride."""
    if residual is not None or prenorm or residual_in_fp32:
        return "a residual"
    return _in_place_norm(x, g, weight, bias, activation, eps, True)


@plugin.place(f"{FLA}.fused_norm_gate.FusedRMSNormGated.forward", "layer_norm_gated_out")
def fused_rms_norm_gated_forward(self, x, g, residual=None, prenorm=False, residual_in_fp32=False):
    """The module's forward, as :func:`fused_rms_norm_gated`."""
    if residual is not None or prenorm or residual_in_fp32:
        return "a residual"
    return _in_place_norm(x, g, self.weight, self.bias, self.activation, self.eps, True)
