"""Modules: ``RMSNormGated`` and ``GatedDeltaNet``, the token mixer of Qwen3-Next and Qwen3.5.

Parameter names are those of the published checkpoints, so ``load_state_dict`` takes a layer's tensors as they are.
Inference only: run them under ``torch.no_grad()`` or ``torch.inference_mode()``.
"""

from __future__ import annotations

import torch

from gdn_kernels import graphs
from gdn_kernels.ops.norm import layer_norm_gated


class RMSNormGated(torch.nn.Module):
    """RMS norm of the last dimension times an activation of a gate; see :func:`gdn_kernels.layer_norm_gated`.

    Args:
        hidden_size: columns. eps: added to the mean square.
        norm_before_gate: True as in Qwen3-Next and FLA (norm, then gate); False as in Mamba-2 (gate, then norm).
        group_size: the norm is taken over groups of this many columns; default all.
        activation: of the gate, ``"silu"`` or ``"sigmoid"``. bias: add a learned bias after the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        norm_before_gate: bool = True,
        group_size: int | None = None,
        activation: str = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.norm_before_gate, self.group_size, self.activation = (
            eps,
            norm_before_gate,
            group_size,
            activation,
        )
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """``x``, ``z``: ``[..., hidden_size]``; returns the shape and dtype of ``x``."""
        return layer_norm_gated(
            x,
            self.weight,
            self.bias,
            z,
            norm_before_gate=self.norm_before_gate,
            eps=self.eps,
            group_size=self.group_size,
            activation=self.activation,
        )


class GatedDeltaNet(torch.nn.Module):
    """The Gated Delta Net token mixer over a packed batch: projections, conv, delta rule, gated norm, out-projection.

    The core runs through ``torch.ops.gdn.linear_attention_with_output``, so a compiled model can be cut there. Call the
    layer inside ``graphs.forward_context``.

    Args:
        hidden_size: columns of the input.
        num_k_heads, num_v_heads, head_k_dim, head_v_dim: H, HV, K, V **of this rank**; slicing the weights for tensor
            parallelism, and summing the ranks' outputs, is the caller's.
        conv_kernel_size: W.
        layer_id: the layer's key in the forward context.
        fused_in_proj: True: ``in_proj_qkvz`` and ``in_proj_ba``, interleaved by key head, as Qwen3-Next stores them.
            False: ``in_proj_qkv``, ``in_proj_z``, ``in_proj_b``, ``in_proj_a``, as Qwen3.5 does.
        eps: of the gated norm. activation: of conv and gate.
        dtype: of the projections, conv and norm weights; ``A_log`` is kept in fp32.
    """

    def __init__(
        self,
        hidden_size: int,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int = 128,
        head_v_dim: int = 128,
        conv_kernel_size: int = 4,
        *,
        layer_id: int,
        fused_in_proj: bool = True,
        eps: float = 1e-6,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_k_heads, self.num_v_heads = num_k_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_k_dim, head_v_dim
        self.layer_id, self.fused_in_proj, self.activation = layer_id, fused_in_proj, activation
        keys, values = num_k_heads * head_k_dim, num_v_heads * head_v_dim
        channels = 2 * keys + values
        factory = {"device": device, "dtype": dtype}
        if fused_in_proj:
            self.in_proj_qkvz = torch.nn.Linear(hidden_size, channels + values, bias=False, **factory)
            self.in_proj_ba = torch.nn.Linear(hidden_size, 2 * num_v_heads, bias=False, **factory)
        else:
            self.in_proj_qkv = torch.nn.Linear(hidden_size, channels, bias=False, **factory)
            self.in_proj_z = torch.nn.Linear(hidden_size, values, bias=False, **factory)
            self.in_proj_b = torch.nn.Linear(hidden_size, num_v_heads, bias=False, **factory)
            self.in_proj_a = torch.nn.Linear(hidden_size, num_v_heads, bias=False, **factory)
        # holds the weight [D, 1, W] under its checkpoint name; the conv itself is an operator
        self.conv1d = torch.nn.Conv1d(channels, channels, conv_kernel_size, groups=channels, bias=False, **factory)
        self.dt_bias = torch.nn.Parameter(torch.ones(num_v_heads, **factory))
        self.A_log = torch.nn.Parameter(torch.empty(num_v_heads, device=device).uniform_(0.01, 16).log_())
        self.norm = RMSNormGated(head_v_dim, eps, activation=activation, **factory)
        self.out_proj = torch.nn.Linear(values, hidden_size, bias=False, **factory)

    def allocate_states(
        self, num_slots: int, state_dtype: torch.dtype = torch.float32, *, draft_tokens: int = 1
    ) -> graphs.LayerState:
        """Zeroed state pools of ``num_slots`` slots for this layer, with the parameters that its core reads.

        The conv pool is channel-last, in the dtype of the conv's weight; the recurrent pool is ``[S, HV, V, K]`` in
        ``state_dtype``. ``draft_tokens``: of a verification; the conv pool is that much wider. Allocate after the layer
        has reached its device and dtype.
        """
        weight = self.conv1d.weight.detach()
        channels, width = weight.shape[0], weight.shape[2]
        pool = torch.zeros(num_slots, width - 2 + draft_tokens, channels, dtype=weight.dtype, device=weight.device)
        return graphs.LayerState(
            num_k_heads=self.num_k_heads,
            conv_weight=weight.squeeze(1),
            conv_bias=None,
            A_log=self.A_log.detach(),
            dt_bias=self.dt_bias.detach(),
            conv_state=pool.transpose(1, 2),
            recurrent_state=torch.zeros(
                num_slots,
                self.num_v_heads,
                self.head_v_dim,
                self.head_k_dim,
                dtype=state_dtype,
                device=weight.device,
            ),
            activation=self.activation,
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``hidden_states`` ``[T, hidden_size]``, the tokens of the batch, possibly padded; returns the same shape."""
        if self.fused_in_proj:
            mixed_qkv, z, b, a = torch.ops.gdn.split_qkvz_ba(
                self.in_proj_qkvz(hidden_states),
                self.in_proj_ba(hidden_states),
                num_k_heads=self.num_k_heads,
                num_v_heads=self.num_v_heads,
                head_k_dim=self.head_k_dim,
                head_v_dim=self.head_v_dim,
            )
        else:
            mixed_qkv = self.in_proj_qkv(hidden_states)
            z = self.in_proj_z(hidden_states).unflatten(-1, (self.num_v_heads, self.head_v_dim))
            b, a = self.in_proj_b(hidden_states), self.in_proj_a(hidden_states)
        core = mixed_qkv.new_empty(mixed_qkv.shape[0], self.num_v_heads, self.head_v_dim)
        torch.ops.gdn.linear_attention_with_output(mixed_qkv, a, b, core, self.layer_id)
        return self.out_proj(self.norm(core, z).flatten(1))
