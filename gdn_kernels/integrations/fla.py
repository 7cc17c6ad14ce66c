"""flash-linear-attention's functions and modules on this package's operators: change the import, keep the calls.

``from fla.ops.gated_delta_rule import chunk_gated_delta_rule`` becomes ``from gdn_kernels.integrations.fla import
chunk_gated_delta_rule``, and so for the other names of ``__all__``; FLA need not be installed. Names, argument order,
defaults and layouts are those of fla-core 0.6.0: ``[B, T, H, K]`` tensors and ``[N, HV, K, V]`` states, or
``[N, HV, V, K]`` with ``state_v_first``. What FLA takes through ``**kwargs`` is spelled out, so that a misspelt option
raises ``TypeError``. An option that is not built raises ``NotImplementedError`` naming it.

Built: head sizes 64, 128 and 256, conv widths 2 to 4. Norms, gates and ``causal_conv1d`` are differentiable, in plain
PyTorch. The delta rule and ``causal_conv1d_update`` have no backward: input that requires grad raises
``NotImplementedError``, call them under ``torch.no_grad()``. Errors of an operator name its own arguments, so FLA's
gate ``g`` of a norm is its ``z``. Everything runs on a CPU too.

Costs to know, all of them copies that FLA makes as well unless said:

- A ``[K, V]`` state that is returned is a transposed view of ``[V, K]`` memory, which costs nothing, nor does passing
  it back; a *contiguous* ``[K, V]`` ``initial_state`` is transposed into a copy of it (FLA: none).
  ``state_v_first=True`` never copies a contiguous one.
- ``g`` and ``beta`` go to the delta rule in fp32; in another dtype they are converted. Given raw, both with
  ``use_gate_in_kernel`` and ``use_beta_sigmoid_in_kernel``, they are read as they are, inside the kernel. Only one of
  the two raw costs one more launch.
- A tensor whose last dimension is not contiguous is copied first; of other strides none is.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from gdn_kernels.integrations._common import differentiates, not_built, rows
from gdn_kernels.ops import chunk, conv, norm, recurrent
from gdn_kernels.ops.gating import gating
from gdn_kernels.reference.backward import joined

__all__ = [
    "FusedLayerNormGated",
    "FusedRMSNormGated",
    "L2Norm",
    "LayerNormGated",
    "RMSNormGated",
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "fused_beta_sigmoid",
    "fused_gdn_gate",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "l2_norm",
    "l2norm",
    "layer_norm_gated",
    "layernorm_fn",
    "rms_norm_gated",
    "rmsnorm_fn",
]

_CHUNK_SIZES = (16, 32, 64)
_BACKENDS = ("triton", "cuda", "mix")


# ---------------------------------------------------------------------------------------------------------------
# The delta rule
# ---------------------------------------------------------------------------------------------------------------


def _v_first(state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError("transpose_state_layout must be left out beside state_v_first, its new name, got both")
    warnings.warn("transpose_state_layout is deprecated and renamed to state_v_first", DeprecationWarning, stacklevel=3)
    return transpose_state_layout


def _gates(
    g: torch.Tensor,
    beta: torch.Tensor,
    use_gate_in_kernel: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """g and beta as the operators take them, and the options that say how."""
    if use_gate_in_kernel and A_log is None:
        raise ValueError("A_log must be given with use_gate_in_kernel=True, got None")
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval must be False without use_beta_sigmoid_in_kernel=True, got True")
    beta_scale = 2.0 if allow_neg_eigval else 1.0
    if use_gate_in_kernel and use_beta_sigmoid_in_kernel:
        dt_bias = torch.zeros_like(A_log) if dt_bias is None else dt_bias
        return rows(g), rows(beta), {"A_log": A_log, "dt_bias": dt_bias, "beta_scale": beta_scale}
    if use_gate_in_kernel:
        g = _decay(g, A_log, dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = fused_beta_sigmoid(beta, beta_scale)
    return rows(_wide(g)), rows(_wide(beta)), {}


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _delta_rule(
    operator: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: tuple[torch.Tensor, torch.Tensor, dict[str, Any]],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    v_first: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    g, beta, options = gates
    if initial_state is not None:
        if not v_first:
            initial_state = initial_state.transpose(-1, -2)
        initial_state = initial_state.contiguous()
    o, final_state = operator(
        rows(q),
        rows(k),
        rows(v),
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
        **options,
    )
    if not output_final_state:
        return o, None
    return o, final_state if v_first else final_state.transpose(-1, -2)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: Any = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule over whole sequences: prefill; formula: :func:`gdn_kernels.chunk_gated_delta_rule`.

    Args:
        q, k: ``[B, T, H, K]``, bf16 or fp16, on a CPU also fp32; K of 64, 128 or 256.
        v: ``[B, T, HV, V]``, the dtype of q, V of 64, 128 or 256, HV a multiple of H.
        g: ``[B, T, HV]``, any float dtype, the natural log of the decay; with ``use_gate_in_kernel`` the raw ``a``, of
            which ``-exp(A_log) * softplus(a + dt_bias)`` is taken.
        beta: ``[B, T, HV]``, any float dtype; with ``use_beta_sigmoid_in_kernel`` raw, of which the sigmoid is taken,
            times 2 with ``allow_neg_eigval``.
        scale: of the output; default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, or ``[N, HV, V, K]`` with ``state_v_first``, any float dtype. Only read.
        output_final_state: return the state after the last token; it is computed in any case.
        use_qk_l2norm_in_kernel: divide each row of q and k by ``sqrt(sum(x**2) + 1e-6)``.
        cu_seqlens: ``[N + 1]`` int32 or int64, for a packed batch of B = 1. cu_seqlens_cpu, chunk_indices: what FLA
            derives from it; accepted and not needed.
        A_log, dt_bias: ``[HV]``, read with ``use_gate_in_kernel`` only; ``dt_bias`` may be None.
        chunk_size: 64. cp_context: not built. transpose_state_layout: FLA's old name of ``state_v_first``.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of v; the final state, fp32, in the layout of ``initial_state``, or None.
        See the module's text for what is copied.

    Raises:
        NotImplementedError: ``cp_context``, a ``chunk_size`` of 16 or 32, a head size, fp32 q on a GPU, input that
            requires grad.
        TypeError, ValueError: as ``contracts.chunk_gated_delta_rule`` lists.

    Source: ``fla/ops/gated_delta_rule/chunk.py`` of fla-core 0.6.0 for the signature.
    """
    not_built("chunk_gated_delta_rule", cp_context=cp_context)
    if chunk_size not in _CHUNK_SIZES:
        raise ValueError(f"chunk_size must be one of {_CHUNK_SIZES}, got {chunk_size}")
    if chunk_size != 64:
        raise NotImplementedError(f"chunk_size must be 64, got {chunk_size}")
    v_first = _v_first(state_v_first, transpose_state_layout)
    gates = _gates(g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _delta_rule(
        chunk.chunk_gated_delta_rule,
        q,
        k,
        v,
        gates,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        v_first,
        cu_seqlens,
    )


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same token by token: decode of a few tokens, any dtype. Arguments as for :func:`chunk_gated_delta_rule`, but:

    Args:
        q, k, v: bf16, fp16 or fp32.
        g: default no decay, zeros. beta: default ones. Either default costs a launch that fills it.
        gk, gv: decays of each key or value column, not built; nor is a ``beta`` of ``[B, T, HV, V]``.

    Returns, Raises: as :func:`chunk_gated_delta_rule`; ``NotImplementedError`` also for ``gk``, ``gv``, that ``beta``.

    Source: ``fla/ops/gated_delta_rule/fused_recurrent.py`` of fla-core 0.6.0 for the signature.
    """
    not_built("fused_recurrent_gated_delta_rule", gk=gk, gv=gv)
    v_first = _v_first(state_v_first, transpose_state_layout)
    if beta is not None and beta.dim() == v.dim():
        raise NotImplementedError(f"beta must be [B, T, HV], one for each head, got shape {tuple(beta.shape)}")
    if g is None and use_gate_in_kernel:
        raise ValueError("g must be given with use_gate_in_kernel=True, got None")
    if g is None:
        g = torch.zeros(v.shape[:-1], device=v.device, dtype=torch.float32)
    if beta is None:
        # post-sigmoid or raw, as in FLA
        beta = torch.ones(v.shape[:-1], device=v.device, dtype=torch.float32)
    gates = _gates(g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _delta_rule(
        recurrent.recurrent_gated_delta_rule,
        q,
        k,
        v,
        gates,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        v_first,
        cu_seqlens,
    )


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


# ---------------------------------------------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------------------------------------------


def fused_gdn_gate(
    g: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``-exp(A_log) * softplus(g + dt_bias)``, the natural log of the decay, of raw ``g`` ``[..., HV]``.

    ``A_log`` holds HV elements, ``dt_bias`` is ``[HV]`` or None. Returns the shape of g, fp32, or ``output_dtype``
    after a conversion. Raises as ``contracts.gating`` lists.

    Source: ``fla/ops/gated_delta_rule/gate.py``, fla-core 0.6.0.
    """
    return _decay(g, A_log, dt_bias).to(output_dtype)


def _decay(g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor | None) -> torch.Tensor:
    a, A_log = rows(g.reshape(-1, g.shape[-1])), A_log.flatten()
    dt_bias = torch.zeros_like(A_log) if dt_bias is None else dt_bias
    return gating(a, a, A_log, dt_bias)[0].view(g.shape)


def fused_beta_sigmoid(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """``scale * sigmoid(x)`` in fp32, of x ``[..., HV]``; scale 2 allows negative eigenvalues.

    Raises as ``contracts.gating`` lists. Source: ``fla/ops/common/gate.py``, fla-core 0.6.0.
    """
    b = rows(x.reshape(-1, x.shape[-1]))
    unused = torch.zeros(x.shape[-1], device=x.device)
    return gating(b, b, unused, unused, beta_scale=scale)[1].view(x.shape)


# ---------------------------------------------------------------------------------------------------------------
# Norms
# ---------------------------------------------------------------------------------------------------------------


def l2norm(x: torch.Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Each row of x ``[..., D]`` divided by ``sqrt(sum(x**2) + eps)``, in the dtype of x.

    ``output_dtype``: returned instead, rounded once; another dtype than x's costs a conversion (FLA: none). Raises as
    ``contracts.l2norm`` lists. Source: ``fla/modules/norm/l2norm.py``, fla-core 0.6.0.
    """
    dtype = x.dtype if output_dtype is None else output_dtype
    flat = rows(x.reshape(-1, x.shape[-1]) if x.dim() > 4 else x).to(torch.promote_types(x.dtype, dtype))
    return norm.l2norm(flat, eps=eps).view(x.shape).to(dtype)


l2_norm = l2norm


class L2Norm(nn.Module):
    """:func:`l2norm` as a module."""

    def __init__(self, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return l2norm(x, self.eps, self.output_dtype)


def _norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, z: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    """The operator on tensors of any rank and strides; no weight is a weight of ones."""
    shape = x.shape
    if x.dim() > 4:
        x = x.reshape(-1, shape[-1])
        z = None if z is None else z.reshape(-1, z.shape[-1])
    weight = x.new_ones(shape[-1]) if weight is None else weight
    return norm.layer_norm_gated(rows(x), rows(weight), rows(bias), rows(z), **options).view(shape)


def layer_norm_gated(
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str = "swish",
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """``(norm(x) * weight + bias) * act(g)`` with the layer norm; arguments as for :func:`rms_norm_gated`."""
    not_built("layer_norm_gated", residual=residual, prenorm=prenorm, residual_in_fp32=residual_in_fp32)
    return _norm(x, weight, bias, g, norm_before_gate=True, is_rms_norm=False, eps=eps, activation=activation)


def rms_norm_gated(
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str = "swish",
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """``(norm(x) * weight + bias) * act(g)`` with the RMS norm of each row; the norm at the end of a mixer.

    Args:
        x: ``[..., D]``, bf16, fp16 or fp32. g: the gate, shape and dtype of x.
        weight: ``[D]``, None for ones, which costs a launch that fills them. bias: ``[D]`` or None.
        activation: ``"swish"`` or ``"silu"``, or ``"sigmoid"``. eps: added to the mean square.
        residual, prenorm, residual_in_fp32: not built.

    Returns:
        The shape and dtype of x.

    Raises:
        NotImplementedError: ``residual``, ``prenorm`` or ``residual_in_fp32``.
        TypeError, ValueError: as ``contracts.layer_norm_gated`` lists; its ``z`` is g.

    Source: ``fla/modules/norm/fused_norm_gate.py``, fla-core 0.6.0.
    """
    not_built("rms_norm_gated", residual=residual, prenorm=prenorm, residual_in_fp32=residual_in_fp32)
    return _norm(x, weight, bias, g, norm_before_gate=True, eps=eps, activation=activation)


def layernorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> torch.Tensor:
    """Layer or RMS norm of x ``[..., D]`` over groups of ``group_size`` columns, times ``silu(z)``, Mamba-2's order by
    ``norm_before_gate=False``. Arguments, results and errors as for :func:`gdn_kernels.layer_norm_gated`.

    Source: ``fla/modules/norm/layernorm_gated.py``, fla-core 0.6.0.
    """
    return _norm(
        x,
        weight,
        bias,
        z,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        eps=eps,
        group_size=group_size,
    )


def rmsnorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """:func:`layernorm_fn` with the RMS norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class _FusedGated(nn.Module):
    """What the two fused modules share: parameters under FLA's names and the call."""

    function: Any

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool,
        bias: bool,
        eps: float,
        activation: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if activation not in ("swish", "silu", "sigmoid"):
            raise ValueError(f"activation must be one of 'swish', 'silu', 'sigmoid', got {activation!r}")
        self.hidden_size, self.elementwise_affine = hidden_size, elementwise_affine
        self.eps, self.activation = eps, activation
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
            if bias:
                self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, elementwise_affine={self.elementwise_affine}, eps={self.eps}, " + (
            f"activation={self.activation}"
        )

    def forward(
        self,
        x: torch.Tensor,
        g: torch.Tensor,
        residual: torch.Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> torch.Tensor:
        return type(self).function(
            x, g, self.weight, self.bias, self.activation, residual, prenorm, residual_in_fp32, self.eps
        )


class FusedRMSNormGated(_FusedGated):
    """:func:`rms_norm_gated` as a module, ``forward(x, g)``; one parameter, ``weight`` ``[hidden_size]``."""

    function = staticmethod(rms_norm_gated)

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, False, eps, activation, device, dtype)


class FusedLayerNormGated(_FusedGated):
    """:func:`layer_norm_gated` as a module, ``forward(x, g)``; ``weight`` and, if asked, ``bias`` ``[hidden_size]``."""

    function = staticmethod(layer_norm_gated)

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        activation: str = "swish",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, bias, eps, activation, device, dtype)


class _Gated(nn.Module):
    """What the two modules in Mamba-2's style share."""

    is_rms_norm: bool

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        group_size: int | None,
        norm_before_gate: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        if self.is_rms_norm:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        return layernorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm
        )


class RMSNormGated(_Gated):
    """:func:`rmsnorm_fn` as a module, ``forward(x, z)``. FLA's default is the gate **before** the norm."""

    is_rms_norm = True

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype)


class LayerNormGated(_Gated):
    """:func:`layernorm_fn` as a module, ``forward(x, z)``. FLA's default is the norm before the gate."""

    is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype)


# ---------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: Any = None,
    *,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Depthwise causal convolution of whole sequences. See :func:`gdn_kernels.causal_conv1d` for the formula.

    Args:
        x: ``[B, T, D]`` or ``[B, T, H, D / H]``, bf16, fp16 or fp32. Batch rows that do not follow one another in
            memory, or a last dimension that is not contiguous, are copied first (FLA: neither).
        weight: ``[D, W]``, W of 2 to 4. bias: ``[D]`` or None. activation: ``"silu"``, ``"swish"`` or None.
        initial_state: ``[N, D, W]``, W columns as FLA keeps them, newest last; the first is never used. Only read.
        output_final_state: return the last W columns of (initial_state, x).
        cu_seqlens: ``[N + 1]`` int32 or int64, for a packed batch of B = 1. cu_seqlens_cpu, chunk_indices: what FLA
            derives from it; accepted and not needed. backend: one of FLA's; there is one implementation here.
        residual, cp_context, seq_idx: not built.

    Returns:
        The shape and dtype of x, contiguous; the final state ``[N, D, W]`` in the dtype of x, or None.

    Raises:
        NotImplementedError: an option that is not built, no weight, a width.
        TypeError, ValueError: as ``contracts.causal_conv1d`` lists.

    Source: ``fla/modules/causal_conv1d/ops.py``, fla-core 0.6.0.
    """
    not_built("causal_conv1d", residual=residual, cp_context=cp_context, seq_idx=seq_idx)
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}")
    weight = _conv_weight(weight)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, T, D], got shape {tuple(x.shape)}")
    shape = x.shape
    x = rows(x.flatten(2))
    batch, length, channels = x.shape
    if cu_seqlens is None:
        offsets = torch.arange(batch + 1, device=x.device, dtype=torch.int32) * length
    elif batch != 1:
        raise ValueError(f"x must have a batch dimension of 1 with cu_seqlens, got {batch}")
    else:
        offsets = cu_seqlens
    count, width = offsets.shape[0] - 1, weight.shape[1]
    tokens = x.flatten(0, 1)
    if initial_state is not None:
        _fla_state("initial_state", initial_state, (count, channels, width))
    if differentiates(tokens, weight, bias, initial_state) and (initial_state is not None or output_final_state):
        y, state = _as_tokens(tokens, weight, rows(bias), initial_state, offsets, activation)
        return y.view(shape), state if output_final_state else None
    # The operator's window is the W - 1 newest of FLA's W columns: it works on a view of them.
    if initial_state is None:
        state = x.new_zeros(count, channels, width)
    else:
        state = initial_state.clone(memory_format=torch.contiguous_format)
    oldest = _oldest_column(tokens, state, offsets) if output_final_state else None
    y = conv.causal_conv1d(tokens, weight, rows(bias), state[..., 1:], offsets, activation=activation).view(shape)
    if oldest is None:
        return y, None
    state[..., 0] = oldest
    return y, state.to(x.dtype)


def causal_conv1d_update(
    x: torch.Tensor,
    cache: torch.Tensor,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution of one new token a sequence, on FLA's cache of W columns, in place.

    Args:
        x: ``[N, D]``, ``[1, N, D]`` or ``[N, 1, D]``, bf16, fp16 or fp32.
        cache: ``[N, D, W]``, newest column last. Written: moved by one column, x last. Its first column, which is never
            used, moves with one small copy; ``gdn_kernels.causal_conv1d_update`` keeps W - 1 columns and needs none.
        weight: ``[D, W]``, W of 2 to 4. bias, activation: as for :func:`causal_conv1d`. residual: not built.

    Returns:
        The shape and dtype of x, contiguous; ``cache``.

    Raises: as :func:`causal_conv1d`.

    Source: ``fla/modules/causal_conv1d/ops.py``, fla-core 0.6.0.
    """
    not_built("causal_conv1d_update", residual=residual)
    weight = _conv_weight(weight)
    if x.dim() not in (2, 3) or (x.dim() == 3 and 1 not in x.shape[:2]):
        raise ValueError(f"x must be [N, D], [1, N, D] or [N, 1, D], got shape {tuple(x.shape)}")
    tokens = rows(x.reshape(-1, x.shape[-1]))
    _fla_state("cache", cache, (*tokens.shape, weight.shape[1]))
    second = cache[..., 1].clone()
    y = conv.causal_conv1d_update(tokens, weight, rows(bias), cache[..., 1:], activation=activation)
    cache[..., 0].copy_(second)
    return y.view(x.shape), cache


def _conv_weight(weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        raise NotImplementedError("weight must be a tensor [D, W], got None")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [D, W], got shape {tuple(weight.shape)}")
    return weight


def _fla_state(name: str, state: torch.Tensor, shape: tuple[int, ...]) -> None:
    if state.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(state.shape)}")


def _as_tokens(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    offsets: torch.Tensor,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With the initial states as each sequence's first tokens, so that states have gradients as x does."""
    count, (channels, width) = offsets.shape[0] - 1, weight.shape
    if initial_state is None:
        initial_state = tokens.new_zeros(count, channels, width)
    columns, own_rows, _, _ = joined(tokens, initial_state.mT.to(tokens.dtype), offsets.long())
    moved = offsets.long() + width * torch.arange(count + 1, device=offsets.device)
    none = tokens.new_zeros(count, channels, width - 1)
    y = conv.causal_conv1d(columns, weight, bias, none, moved, activation=activation)
    last = moved[1:, None] - width + torch.arange(width, device=offsets.device)
    return y[own_rows], columns[last.flatten()].view(count, width, channels).mT


def _oldest_column(tokens: torch.Tensor, state: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """``[N, D]``: the first of the last W columns of (state, sequence), which the operator's window leaves out."""
    width = state.shape[2]
    start, end = offsets[:-1].long(), offsets[1:].long()
    from_state = state[torch.arange(len(state), device=state.device), :, (end - start).clamp(max=width - 1)]
    if not len(tokens):
        return from_state
    inside = (end - start >= width)[:, None]
    return torch.where(inside, tokens[(end - width).clamp(min=0, max=len(tokens) - 1)].to(state.dtype), from_state)
