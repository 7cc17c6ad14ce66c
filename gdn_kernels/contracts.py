"""What every operator accepts: the one place that raises on user input.

Each operator has a function of its own name and arguments here. It runs before anything is allocated or written, in the
real implementations and in the fakes alike, so that a wrong call fails while tracing as far as shapes can tell.

``TypeError``: a dtype. ``ValueError``: shape, stride, device, range or a forbidden combination.
``NotImplementedError``: a legal case that is not built; it names the limit. ``RuntimeError``: machine or mode.
The text is ``<arg> must <rule>, got <value>``. No tensor value is read, except inside ``launch.debug_checks()``.

Token counts and numbers of sequences may be symbolic. They are only ever compared for equality, through
``torch._check_with``, so a check never puts a guard on their size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gdn_kernels import launch

ACTIVATIONS = ("silu", "swish", "sigmoid")
CONV_ACTIVATIONS = (None, "silu", "swish")
HEAD_DIMS = (64, 128, 256)
CONV_WIDTHS = (2, 3, 4)
MAX_NORM_GROUP = launch.NORM_LADDER[-1][0]
CHUNK = 64
QUANT_GROUP = 128
# Value heads of a key head that decode_step holds in one program.
MAX_STEP_RATIO = 8

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_INDICES = (torch.int32, torch.int64)


# ---------------------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------------------


def _check(ok: Any, error: type[Exception], message: Callable[[], str]) -> None:
    if ok is True:
        return
    if ok is False:
        raise error(message())
    torch._check_with(error, ok, message)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        # fp64 is for the oracle, which runs on a CPU
        if tensor.dtype is torch.float64 and torch.float32 in allowed and tensor.device.type == "cpu":
            return
        raise TypeError(f"{name} must be {_names(allowed)}, got {_names((tensor.dtype,))}")


def _same_dtype(name: str, tensor: torch.Tensor, other: str, like: torch.Tensor) -> None:
    if tensor.dtype is not like.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other}, {_names((like.dtype,))}, got {_names((tensor.dtype,))}"
        )


def _same_device(like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def _rank(name: str, tensor: torch.Tensor, layout: str, *ranks: int) -> None:
    if tensor.dim() not in ranks:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")


def _shape(name: str, tensor: torch.Tensor, *shape: Any) -> None:
    if tensor.dim() != len(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    for size, wanted in zip(tensor.shape, shape, strict=True):
        _check(
            size == wanted,
            ValueError,
            lambda: f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}",
        )


def _last_dim_contiguous(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {tuple(tensor.stride())}")


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _index(name: str, tensor: torch.Tensor | None) -> None:
    if tensor is not None and tensor.dtype not in _INDICES:
        raise TypeError(f"{name} must be {_names(_INDICES)}, got {_names((tensor.dtype,))}")


def _flags(name: str, tensor: torch.Tensor | None, count: Any) -> None:
    if tensor is None:
        return
    if tensor.dtype is not torch.bool:
        raise TypeError(f"{name} must be bool, got {_names((tensor.dtype,))}")
    _shape(name, tensor, count)


def _index_vector(name: str, tensor: torch.Tensor | None, count: Any) -> None:
    if tensor is None:
        return
    _index(name, tensor)
    _shape(name, tensor, count)
    _last_dim_contiguous(**{name: tensor})


def _cu_seqlens(cu_seqlens: torch.Tensor) -> Any:
    """Checks the offsets and returns the number of sequences."""
    _index("cu_seqlens", cu_seqlens)
    _rank("cu_seqlens", cu_seqlens, "[N + 1]", 1)
    count = cu_seqlens.shape[0]
    _check(count >= 1, ValueError, lambda: f"cu_seqlens must hold at least one offset, got {count}")
    _last_dim_contiguous(cu_seqlens=cu_seqlens)
    return count - 1


def _state_pool(name: str, state: torch.Tensor, lead: tuple, num_v_heads: Any, v: Any, k: Any) -> None:
    """``[*lead, HV, V, K]``; a None in ``lead`` admits any size. The inner ``[HV, V, K]`` block is contiguous."""
    layout = f"[{', '.join('*' if n is None else str(n) for n in lead)}, {num_v_heads}, {v}, {k}]"
    if state.dim() != len(lead) + 3:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(state.shape)}")
    for size, wanted in zip(state.shape, (*lead, num_v_heads, v, k), strict=True):
        if wanted is not None:
            _check(size == wanted, ValueError, lambda: f"{name} must have shape {layout}, got {tuple(state.shape)}")
    inner = tuple(state.stride()[-3:])
    if inner != (v * k, k, 1):
        raise ValueError(f"{name} must hold each [HV, V, K] block contiguously, got strides {tuple(state.stride())}")


def _has_fp8(name: str, device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return  # traced with fake tensors for a GPU that is elsewhere
    target = launch.target(device)
    if not launch.has_fp8(target):
        raise RuntimeError(f"{name} must run on an architecture with e4m3, got {target.backend} {target.arch}")


def _quant_group_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"quant_group_size must be at least 1, got {size}")
    if size != QUANT_GROUP:
        raise NotImplementedError(f"quant_group_size must be {QUANT_GROUP}, got {size}")


def gradients(name: str, tensors: tuple[Any, ...]) -> None:
    """An operator without a backward must not swallow a gradient silently."""
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise NotImplementedError(
                f"inputs of gdn::{name} must not require grad, got one of shape {tuple(tensor.shape)} that does: "
                "the operator has no backward; call it under torch.no_grad() or torch.inference_mode()"
            )


def written(name: str, argument: str, tensor: torch.Tensor) -> None:
    """An argument that is written in place has no gradient, whatever the others have."""
    if tensor.requires_grad:
        raise NotImplementedError(
            f"{argument} of {name} must not require grad, got one of shape {tuple(tensor.shape)} that does: it is "
            "written in place"
        )


# ---------------------------------------------------------------------------------------------------------------
# Norms
# ---------------------------------------------------------------------------------------------------------------


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
) -> None:
    _dtype("x", x, _FLOATS)
    _rank("x", x, "[..., D] of one to four dimensions", 1, 2, 3, 4)
    columns = x.shape[-1]
    _dtype("weight", weight, _FLOATS)
    _shape("weight", weight, columns)
    if bias is not None:
        _dtype("bias", bias, _FLOATS)
        _shape("bias", bias, columns)
    if z is not None:
        _same_dtype("z", z, "x", x)
        _shape("z", z, *x.shape)
    _same_device(x, weight=weight, bias=bias, z=z)
    _last_dim_contiguous(x=x, weight=weight, bias=bias, z=z)
    _one_of("activation", activation, ACTIVATIONS)
    if columns < 1:
        raise ValueError(f"x must have a last dimension of at least 1, got {columns}")
    if group_size is not None and (group_size < 1 or columns % group_size != 0):
        raise ValueError(f"group_size must divide the last dimension of x, {columns}, got {group_size}")
    if (group_size or columns) > MAX_NORM_GROUP:
        raise NotImplementedError(f"group_size must be at most {MAX_NORM_GROUP}, got {group_size or columns}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def layer_norm_gated_out(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    out: torch.Tensor,
    **options: Any,
) -> None:
    layer_norm_gated(x, weight, bias, z, **options)
    _same_dtype("out", out, "x", x)
    _shape("out", out, *x.shape)
    _same_device(x, out=out)
    _last_dim_contiguous(out=out)


def layer_norm_gated_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    *,
    group_size: int | None = None,
    quant_group_size: int = QUANT_GROUP,
    **options: Any,
) -> None:
    layer_norm_gated(x, weight, bias, z, group_size=group_size, **options)
    _rank("x", x, "[T, HV, V] or [M, D]", 2, 3)
    _quant_group_size(quant_group_size)
    columns = x.shape[-1] if group_size is None else group_size
    if columns % QUANT_GROUP != 0:
        name = "the last dimension of x" if group_size is None else "group_size"
        raise NotImplementedError(f"{name} must be a multiple of quant_group_size, {QUANT_GROUP}, got {columns}")
    _has_fp8("layer_norm_gated_fp8", x.device)


def l2norm(x: torch.Tensor, *, eps: float = 1e-6) -> None:
    _dtype("x", x, _FLOATS)
    _rank("x", x, "[..., D] of one to four dimensions", 1, 2, 3, 4)
    _last_dim_contiguous(x=x)
    columns = x.shape[-1]
    if columns < 1:
        raise ValueError(f"x must have a last dimension of at least 1, got {columns}")
    if columns > MAX_NORM_GROUP:
        raise NotImplementedError(f"x must have a last dimension of at most {MAX_NORM_GROUP}, got {columns}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


# ---------------------------------------------------------------------------------------------------------------
# Gating and the projection split
# ---------------------------------------------------------------------------------------------------------------


def _gate_parameters(A_log: torch.Tensor, dt_bias: torch.Tensor, num_v_heads: Any) -> None:
    for name, tensor in (("A_log", A_log), ("dt_bias", dt_bias)):
        _dtype(name, tensor, _FLOATS)
        _shape(name, tensor, num_v_heads)
        _last_dim_contiguous(**{name: tensor})


def gating(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, *, beta_scale: float = 1.0
) -> None:
    _dtype("a", a, _FLOATS)
    _rank("a", a, "[T, HV] or [B, T, HV]", 2, 3)
    _same_dtype("b", b, "a", a)
    _shape("b", b, *a.shape)
    _gate_parameters(A_log, dt_bias, a.shape[-1])
    _same_device(a, b=b, A_log=A_log, dt_bias=dt_bias)
    _last_dim_contiguous(a=a, b=b)


def _head_counts(num_k_heads: int, num_v_heads: int) -> None:
    if num_k_heads < 1:
        raise ValueError(f"num_k_heads must be at least 1, got {num_k_heads}")
    if num_v_heads < 1 or num_v_heads % num_k_heads != 0:
        raise ValueError(f"num_v_heads must be a multiple of num_k_heads, {num_k_heads}, got {num_v_heads}")


def split_qkvz_ba(
    qkvz: torch.Tensor, ba: torch.Tensor, *, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int
) -> None:
    _head_counts(num_k_heads, num_v_heads)
    if head_k_dim < 1 or head_v_dim < 1:
        raise ValueError(f"head_k_dim and head_v_dim must be at least 1, got {head_k_dim} and {head_v_dim}")
    _dtype("qkvz", qkvz, _FLOATS)
    _dtype("ba", ba, _FLOATS)
    _rank("qkvz", qkvz, "[T, 2 * H * K + 2 * HV * V]", 2)
    _rank("ba", ba, "[T, 2 * HV]", 2)
    tokens = qkvz.shape[0]
    _shape("qkvz", qkvz, tokens, 2 * (num_k_heads * head_k_dim + num_v_heads * head_v_dim))
    _shape("ba", ba, tokens, 2 * num_v_heads)
    _same_device(qkvz, ba=ba)
    _last_dim_contiguous(qkvz=qkvz, ba=ba)


# ---------------------------------------------------------------------------------------------------------------
# Causal convolution
# ---------------------------------------------------------------------------------------------------------------


def _conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor, activation: str | None
) -> int:
    """Checks what the three forms share and returns the width."""
    _dtype("x", x, _FLOATS)
    channels = x.shape[-1]
    _dtype("weight", weight, _FLOATS)
    _rank("weight", weight, "[D, W]", 2)
    width = weight.shape[1]
    if width not in CONV_WIDTHS:
        raise NotImplementedError(f"weight must have a width W of 2 to 4, got {width}")
    _shape("weight", weight, channels, width)
    if bias is not None:
        _dtype("bias", bias, _FLOATS)
        _shape("bias", bias, channels)
    _dtype("conv_state", conv_state, _FLOATS)
    _rank("conv_state", conv_state, "[S, D, W - 1]", 3)
    _check(
        conv_state.shape[1] == channels,
        ValueError,
        lambda: f"conv_state must have {channels} channels, got shape {tuple(conv_state.shape)}",
    )
    _same_device(x, weight=weight, bias=bias, conv_state=conv_state)
    _last_dim_contiguous(x=x, bias=bias)
    _one_of("activation", activation, CONV_ACTIVATIONS)
    return width


def _window(name: str, tensor: torch.Tensor, columns: int) -> None:
    if tensor.shape[-1] != columns:
        raise ValueError(f"{name} must hold W - 1 = {columns} columns, got shape {tuple(tensor.shape)}")


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> None:
    _rank("x", x, "[T, D]", 2)
    width = _conv(x, weight, bias, conv_state, activation)
    _window("conv_state", conv_state, width - 1)
    count = _cu_seqlens(cu_seqlens)
    _index_vector("state_indices", state_indices, count)
    _flags("has_initial_state", has_initial_state, count)
    _same_device(x, cu_seqlens=cu_seqlens, state_indices=state_indices, has_initial_state=has_initial_state)
    if launch.debugging():
        _offset_values(cu_seqlens, x.shape[0])
        _slot_values("state_indices", state_indices, conv_state.shape[0], pad_slot_id)


def causal_conv1d_update(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    *,
    state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> None:
    _rank("x", x, "[N, D] or [N, t, D]", 2, 3)
    width = _conv(x, weight, bias, conv_state, activation)
    rows = x.shape[0]
    tokens = x.shape[1] if x.dim() == 3 else 1
    if num_accepted_tokens is None:
        _window("conv_state", conv_state, width - 1)
    else:
        _index_vector("num_accepted_tokens", num_accepted_tokens, rows)
        if conv_state.shape[-1] < width - 2 + tokens:
            raise ValueError(
                f"conv_state must hold at least W - 2 + t = {width - 2 + tokens} columns with num_accepted_tokens, "
                f"got shape {tuple(conv_state.shape)}"
            )
    if state_indices is not None:
        _index("state_indices", state_indices)
        _shape("state_indices", state_indices, rows)
    _same_device(x, state_indices=state_indices, num_accepted_tokens=num_accepted_tokens)
    if launch.debugging():
        _slot_values("state_indices", state_indices, conv_state.shape[0], pad_slot_id)
        _range_values("num_accepted_tokens", num_accepted_tokens, 1, conv_state.shape[-1] - width + 2)


def causal_conv1d_verify(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    intermediate_windows: torch.Tensor,
    *,
    state_indices: torch.Tensor | None = None,
    intermediate_indices: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
) -> None:
    _rank("x", x, "[N, t, D]", 3)
    width = _conv(x, weight, bias, conv_state, activation)
    rows, tokens, channels = x.shape
    _window("conv_state", conv_state, width - 1)
    _dtype("intermediate_windows", intermediate_windows, _FLOATS)
    _rank("intermediate_windows", intermediate_windows, "[M, t, D, W - 1]", 4)
    _window("intermediate_windows", intermediate_windows, width - 1)
    if intermediate_windows.shape[2] != channels or intermediate_windows.shape[1] < tokens:
        raise ValueError(
            f"intermediate_windows must hold {tokens} tokens of {channels} channels, "
            f"got shape {tuple(intermediate_windows.shape)}"
        )
    _index_vector("state_indices", state_indices, rows)
    _index_vector("intermediate_indices", intermediate_indices, rows)
    if parents is not None:
        _index("parents", parents)
        _shape("parents", parents, rows, tokens)
        _last_dim_contiguous(parents=parents)
    _same_device(
        x,
        intermediate_windows=intermediate_windows,
        state_indices=state_indices,
        intermediate_indices=intermediate_indices,
        parents=parents,
    )
    if launch.debugging():
        _slot_values("state_indices", state_indices, conv_state.shape[0], pad_slot_id, unique=False)
        _slot_values("intermediate_indices", intermediate_indices, intermediate_windows.shape[0], pad_slot_id)
        _parent_values(parents)


# ---------------------------------------------------------------------------------------------------------------
# Delta rule
# ---------------------------------------------------------------------------------------------------------------


def _head_dims(head_k_dim: int, head_v_dim: int) -> None:
    for name, size in (("K", head_k_dim), ("V", head_v_dim)):
        if size not in HEAD_DIMS:
            raise NotImplementedError(f"head size {name} must be one of {', '.join(map(str, HEAD_DIMS))}, got {size}")


def _delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
) -> tuple[Any, int, int, int]:
    """Checks what all forms share; returns the number of sequences, HV, V and K."""
    _dtype("q", q, _FLOATS)
    _rank("q", q, "[B, T, H, K] or [T, H, K]", 4)
    batch, tokens, num_k_heads, head_k_dim = q.shape
    _same_dtype("k", k, "q", q)
    _same_dtype("v", v, "q", q)
    _shape("k", k, batch, tokens, num_k_heads, head_k_dim)
    _rank("v", v, "[B, T, HV, V] or [T, HV, V]", 4)
    num_v_heads, head_v_dim = v.shape[2:]
    _shape("v", v, batch, tokens, num_v_heads, head_v_dim)
    if num_k_heads < 1 or num_v_heads < 1 or num_v_heads % num_k_heads != 0:
        raise ValueError(f"v must have a multiple of q's {num_k_heads} heads, got {num_v_heads}")
    _head_dims(head_k_dim, head_v_dim)
    if (A_log is None) != (dt_bias is None):
        missing = "A_log" if A_log is None else "dt_bias"
        raise ValueError(f"{missing} must be given where its partner is, got None")
    raw = A_log is not None
    for name, tensor in (("g", g), ("beta", beta)):
        _dtype(name, tensor, _FLOATS if raw else (torch.float32,))
        _shape(name, tensor, batch, tokens, num_v_heads)
    if raw:
        _gate_parameters(A_log, dt_bias, num_v_heads)
    _same_device(q, k=k, v=v, g=g, beta=beta, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias)
    _last_dim_contiguous(q=q, k=k, v=v, g=g, beta=beta)
    count = batch
    if cu_seqlens is not None:
        count = _cu_seqlens(cu_seqlens)
        if batch != 1:
            raise ValueError(f"q must have a batch dimension of 1 with cu_seqlens, got {batch}")
    if launch.debugging():
        if cu_seqlens is not None:
            _offset_values(cu_seqlens, tokens)
        if not raw:
            # padding rows may hold anything
            real = g if cu_seqlens is None else g[:, : int(cu_seqlens[-1])]
            positive = real[real > 0]
            if positive.numel():
                raise ValueError(f"g must be at most 0, got {positive.max().item()}")
    return count, num_v_heads, head_v_dim, head_k_dim


def recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    beta_scale: float = 1.0,
) -> None:
    count, num_v_heads, head_v_dim, head_k_dim = _delta_rule(q, k, v, g, beta, cu_seqlens, A_log, dt_bias)
    if initial_state is not None:
        _dtype("initial_state", initial_state, _FLOATS)
        _state_pool("initial_state", initial_state, (count,), num_v_heads, head_v_dim, head_k_dim)
        _same_device(q, initial_state=initial_state)


def _chunked(q: torch.Tensor) -> None:
    if q.device.type == "cuda" and q.dtype is torch.float32:
        raise NotImplementedError(
            "q must be bfloat16 or float16 for a chunked prefill on a GPU, got float32: "
            "recurrent_gated_delta_rule takes float32"
        )


def chunk_gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **options: Any
) -> None:
    recurrent_gated_delta_rule(q, k, v, g, beta, **options)
    _chunked(q)


def chunk_gated_delta_rule_paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    has_initial_state: torch.Tensor | None = None,
    write_indices: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
) -> None:
    count, num_v_heads, head_v_dim, head_k_dim = _delta_rule(q, k, v, g, beta, cu_seqlens, A_log, dt_bias)
    _chunked(q)
    _dtype("state", state, _FLOATS)
    _state_pool("state", state, (None,), num_v_heads, head_v_dim, head_k_dim)
    _same_dtype("out", out, "v", v)
    _shape("out", out, *v.shape)
    _index_vector("state_indices", state_indices, count)
    _index_vector("write_indices", write_indices, count)
    _flags("has_initial_state", has_initial_state, count)
    _same_device(
        q,
        state=state,
        out=out,
        state_indices=state_indices,
        write_indices=write_indices,
        has_initial_state=has_initial_state,
    )
    _last_dim_contiguous(out=out)
    if launch.debugging():
        _slot_values("state_indices", state_indices, state.shape[0], pad_slot_id, unique=write_indices is None)
        _slot_values("write_indices", write_indices, state.shape[0], pad_slot_id)
        _alias_values(state_indices, write_indices, pad_slot_id)


def chunk_gated_delta_rule_paged_checkpoints(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    checkpoints: torch.Tensor,
    state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    checkpoint_offsets: torch.Tensor,
    *,
    checkpoint_interval: int,
    **options: Any,
) -> None:
    chunk_gated_delta_rule_paged(q, k, v, g, beta, state, out, state_indices, cu_seqlens, **options)
    _dtype("checkpoints", checkpoints, (torch.float32,))
    _state_pool("checkpoints", checkpoints, (None,), *state.shape[1:])
    _index_vector("checkpoint_offsets", checkpoint_offsets, cu_seqlens.shape[0])
    _same_device(q, checkpoints=checkpoints, checkpoint_offsets=checkpoint_offsets)
    if checkpoint_interval < CHUNK or checkpoint_interval % CHUNK != 0:
        raise ValueError(f"checkpoint_interval must be a positive multiple of {CHUNK}, got {checkpoint_interval}")


def _rounding_seed(rounding_seed: torch.Tensor | None, name: str, states: torch.Tensor) -> None:
    """A seed of one element, and something to round: ``states``, called ``name``, of 16 bits."""
    if rounding_seed is None:
        return
    _index("rounding_seed", rounding_seed)
    if rounding_seed.dim() > 1 or rounding_seed.numel() != 1:
        raise ValueError(f"rounding_seed must hold one element, got shape {tuple(rounding_seed.shape)}")
    _same_device(states, rounding_seed=rounding_seed)
    if states.dtype is torch.float32:  # the oracle's fp64 stands for a dtype of 16 bits
        raise ValueError(f"rounding_seed must be None where {name} is float32, got a tensor")


def _whole_rows(name: str, tensor: torch.Tensor, rank: int, layout: str, size: int) -> None:
    """``[T, ...]`` of ``rank`` dimensions, or ``[1, T, ...]``, T a multiple of ``size``."""
    _rank(name, tensor, f"[1, {layout}] or [{layout}]", rank, rank + 1)
    batch, tokens = tensor.shape[0], tensor.shape[-rank]
    if tensor.dim() > rank:
        _check(
            batch == 1,
            ValueError,
            lambda: f"{name} must have a batch dimension of 1 with tokens_per_row, got {batch}",
        )
    _check(
        tokens % size == 0,
        ValueError,
        lambda: f"{name} must hold whole rows of tokens_per_row, {size}, got {tokens} tokens",
    )


def tokens_per_row(
    size: int,
    cu_seqlens: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
) -> None:
    """Packed rows of ``size`` tokens each: tensors with or without a leading 1."""
    if size < 1:
        raise ValueError(f"tokens_per_row must be at least 1, got {size}")
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens must be None with tokens_per_row, got a tensor")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _whole_rows(name, tensor, 3, "T, heads, size", size)
    for name, tensor in (("g", g), ("beta", beta)):
        _whole_rows(name, tensor, 2, "T, HV", size)


def recurrent_gated_delta_rule_paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    write_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
    rounding_seed: torch.Tensor | None = None,
) -> None:
    count, num_v_heads, head_v_dim, head_k_dim = _delta_rule(q, k, v, g, beta, cu_seqlens, A_log, dt_bias)
    _dtype("state", state, _FLOATS)
    _state_pool("state", state, (None,), num_v_heads, head_v_dim, head_k_dim)
    _index("state_indices", state_indices)
    _rank("state_indices", state_indices, "[N] or [N, t]", 1, 2)
    _last_dim_contiguous(state_indices=state_indices)
    _shape("state_indices", state_indices, count, *state_indices.shape[1:])
    if state_indices.dim() == 2:
        if write_indices is not None:
            raise ValueError("write_indices must be None where state_indices is [N, t], got a tensor")
        if state_indices.shape[1] < 1:
            raise ValueError("state_indices must have at least one column, got 0")
    elif num_accepted_tokens is not None:
        raise ValueError("num_accepted_tokens must be None where state_indices is [N], got a tensor")
    _index_vector("write_indices", write_indices, count)
    _index_vector("num_accepted_tokens", num_accepted_tokens, count)
    _flags("has_initial_state", has_initial_state, count)
    _same_device(
        q,
        state=state,
        state_indices=state_indices,
        write_indices=write_indices,
        num_accepted_tokens=num_accepted_tokens,
        has_initial_state=has_initial_state,
    )
    _rounding_seed(rounding_seed, "state", state)
    if launch.debugging():
        _slot_values("state_indices", state_indices, state.shape[0], pad_slot_id, unique=write_indices is None)
        _slot_values("write_indices", write_indices, state.shape[0], pad_slot_id)
        _alias_values(state_indices, write_indices, pad_slot_id)
        if state_indices.dim() == 2:
            _range_values("num_accepted_tokens", num_accepted_tokens, 1, state_indices.shape[1])


def recurrent_gated_delta_rule_verify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    intermediate_states: torch.Tensor,
    state_indices: torch.Tensor,
    *,
    intermediate_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    beta_scale: float = 1.0,
    pad_slot_id: int = -1,
    rounding_seed: torch.Tensor | None = None,
) -> None:
    count, num_v_heads, head_v_dim, head_k_dim = _delta_rule(q, k, v, g, beta, cu_seqlens, A_log, dt_bias)
    _dtype("state", state, _FLOATS)
    _state_pool("state", state, (None,), num_v_heads, head_v_dim, head_k_dim)
    _dtype("intermediate_states", intermediate_states, _FLOATS)
    _state_pool("intermediate_states", intermediate_states, (None, None), num_v_heads, head_v_dim, head_k_dim)
    steps = intermediate_states.shape[1]
    if cu_seqlens is None and steps < q.shape[1]:
        raise ValueError(
            f"intermediate_states must hold {q.shape[1]} tokens, got shape {tuple(intermediate_states.shape)}"
        )
    _index_vector("state_indices", state_indices, count)
    _index_vector("intermediate_indices", intermediate_indices, count)
    if parents is not None:
        _index("parents", parents)
        _shape("parents", parents, count, steps if cu_seqlens is not None else parents.shape[-1])
        if cu_seqlens is None and parents.shape[1] < q.shape[1]:
            raise ValueError(f"parents must have a column for each of {q.shape[1]} tokens, got {parents.shape[1]}")
        _last_dim_contiguous(parents=parents)
    _flags("has_initial_state", has_initial_state, count)
    _same_device(
        q,
        state=state,
        intermediate_states=intermediate_states,
        state_indices=state_indices,
        intermediate_indices=intermediate_indices,
        parents=parents,
        has_initial_state=has_initial_state,
    )
    _rounding_seed(rounding_seed, "intermediate_states", intermediate_states)
    if launch.debugging():
        _slot_values("state_indices", state_indices, state.shape[0], pad_slot_id, unique=False)
        _slot_values("intermediate_indices", intermediate_indices, intermediate_states.shape[0], pad_slot_id)
        _parent_values(parents)


def packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    *,
    num_k_heads: int,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    pad_slot_id: int = -1,
    rounding_seed: torch.Tensor | None = None,
) -> None:
    _dtype("mixed_qkv", mixed_qkv, _FLOATS)
    _rank("mixed_qkv", mixed_qkv, "[N, 2 * H * K + HV * V]", 2)
    _dtype("state", state, _FLOATS)
    _rank("state", state, "[S, HV, V, K]", 4)
    rows = mixed_qkv.shape[0]
    num_v_heads, head_v_dim, head_k_dim = state.shape[1:]
    _state_pool("state", state, (None,), num_v_heads, head_v_dim, head_k_dim)
    _head_counts(num_k_heads, num_v_heads)
    _head_dims(head_k_dim, head_v_dim)
    _shape("mixed_qkv", mixed_qkv, rows, 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim)
    for name, tensor in (("a", a), ("b", b)):
        _dtype(name, tensor, _FLOATS)
        _shape(name, tensor, rows, num_v_heads)
    _gate_parameters(A_log, dt_bias, num_v_heads)
    _index_vector("state_indices", state_indices, rows)
    _same_device(mixed_qkv, a=a, b=b, A_log=A_log, dt_bias=dt_bias, state=state, state_indices=state_indices)
    _last_dim_contiguous(mixed_qkv=mixed_qkv, a=a, b=b)
    _rounding_seed(rounding_seed, "state", state)
    if launch.debugging():
        _slot_values("state_indices", state_indices, state.shape[0], pad_slot_id)


def packed_decode_out(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    state_indices: torch.Tensor,
    **options: Any,
) -> None:
    packed_decode(mixed_qkv, a, b, A_log, dt_bias, state, state_indices, **options)
    num_v_heads, head_v_dim = state.shape[1:3]
    _same_dtype("out", out, "mixed_qkv", mixed_qkv)
    _rank("out", out, "[N, HV, V] or [N, 1, HV, V]", 3, 4)
    token = (1,) if out.dim() == 4 else ()
    _shape("out", out, mixed_qkv.shape[0], *token, num_v_heads, head_v_dim)
    _same_device(mixed_qkv, out=out)
    row = num_v_heads * head_v_dim
    for size, stride, wanted in zip(out.shape, out.stride(), (row, *(row for _ in token), head_v_dim, 1), strict=True):
        # is_contiguous would ask how many rows there are
        if stride != wanted and not (isinstance(size, int) and size < 2):
            raise ValueError(f"out must be contiguous, got strides {tuple(out.stride())}")


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
) -> None:
    packed_decode(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        state_indices,
        num_k_heads=num_k_heads,
        pad_slot_id=pad_slot_id,
        rounding_seed=rounding_seed,
    )
    rows, channels = mixed_qkv.shape
    num_v_heads, head_v_dim = state.shape[1:3]
    _dtype("conv_weight", conv_weight, _FLOATS)
    _rank("conv_weight", conv_weight, "[D, W]", 2)
    width = conv_weight.shape[1]
    if width not in CONV_WIDTHS:
        raise NotImplementedError(f"conv_weight must have a width W of 2 to 4, got {width}")
    _shape("conv_weight", conv_weight, channels, width)
    if conv_bias is not None:
        _dtype("conv_bias", conv_bias, _FLOATS)
        _shape("conv_bias", conv_bias, channels)
    _dtype("conv_state", conv_state, _FLOATS)
    # the slots of the one are those of the other
    _shape("conv_state", conv_state, state.shape[0], channels, width - 1)
    _same_dtype("z", z, "mixed_qkv", mixed_qkv)
    _shape("z", z, rows, num_v_heads, head_v_dim)
    _dtype("norm_weight", norm_weight, _FLOATS)
    _shape("norm_weight", norm_weight, head_v_dim)
    _same_device(
        mixed_qkv, z=z, conv_weight=conv_weight, conv_bias=conv_bias, conv_state=conv_state, norm_weight=norm_weight
    )
    _last_dim_contiguous(z=z, conv_bias=conv_bias, norm_weight=norm_weight)
    if num_v_heads // num_k_heads > MAX_STEP_RATIO:
        raise NotImplementedError(
            f"state must have at most {MAX_STEP_RATIO} value heads for each key head, got {num_v_heads // num_k_heads}"
        )
    _one_of("conv_activation", conv_activation, CONV_ACTIVATIONS)
    _one_of("norm_activation", norm_activation, ACTIVATIONS)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def decode_step_fp8(*args: torch.Tensor | None, quant_group_size: int = QUANT_GROUP, **options: Any) -> None:
    decode_step(*args, **options)
    _quant_group_size(quant_group_size)
    z = args[3]
    if z.shape[2] % QUANT_GROUP != 0:
        raise NotImplementedError(
            f"the last dimension of z must be a multiple of quant_group_size, {QUANT_GROUP}, got {z.shape[2]}"
        )
    _has_fp8("decode_step_fp8", z.device)


# ---------------------------------------------------------------------------------------------------------------
# The split point
# ---------------------------------------------------------------------------------------------------------------


def linear_attention_with_output(
    mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, output: torch.Tensor, layer_id: int
) -> None:
    _dtype("mixed_qkv", mixed_qkv, _FLOATS)
    _rank("mixed_qkv", mixed_qkv, "[T, D]", 2)
    tokens = mixed_qkv.shape[0]
    for name, tensor in (("a", a), ("b", b)):
        _dtype(name, tensor, _FLOATS)
        _rank(name, tensor, "[T, HV]", 2)
    _shape("a", a, tokens, a.shape[1])
    _shape("b", b, tokens, a.shape[1])
    _same_dtype("output", output, "mixed_qkv", mixed_qkv)
    _rank("output", output, "[T, HV, V]", 3)
    _shape("output", output, tokens, a.shape[1], output.shape[2])
    _same_device(mixed_qkv, a=a, b=b, output=output)
    _last_dim_contiguous(mixed_qkv=mixed_qkv, a=a, b=b, output=output)


def forward_context(found: Any, layer_id: int) -> None:
    """The split point needs a context, set in the same thread, that holds the layer."""
    if found is None:
        raise RuntimeError(
            "gdn::linear_attention_with_output must run inside graphs.forward_context of this thread, got none"
        )
    if layer_id not in found.layers:
        raise RuntimeError(f"layer_id must be a layer of the forward context, {sorted(found.layers)}, got {layer_id}")


def packed_width(mixed_qkv: torch.Tensor, width: int) -> None:
    """The packed projections must hold the heads that the layer's state has."""
    if mixed_qkv.shape[-1] != width:
        raise ValueError(f"mixed_qkv must have {width} columns for the layer's heads, got {mixed_qkv.shape[-1]}")


def batch_metadata(metadata: Any, tokens: int) -> None:
    """The batch's metadata must fit the tokens of the call."""
    rows, drafts, accepted = metadata.state_indices.shape[0], metadata.draft_indices, metadata.num_accepted_tokens
    if (drafts is None) != (accepted is None) or (drafts is not None and metadata.cu_seqlens is not None):
        raise ValueError(
            "draft_indices and num_accepted_tokens must come together and without cu_seqlens, got one or all"
        )
    if drafts is not None:
        _rank("draft_indices", drafts, "[N, t]", 2)
        _shape("draft_indices", drafts, rows, drafts.shape[1])
        if drafts.numel() > tokens:
            raise ValueError(f"draft_indices must have at most one entry a token, {tokens}, got {drafts.numel()}")
    elif metadata.cu_seqlens is None and rows > tokens:
        raise ValueError(f"state_indices must have at most one row a token, {tokens}, got {rows}")


# ---------------------------------------------------------------------------------------------------------------
# Values, inside launch.debug_checks() only
# ---------------------------------------------------------------------------------------------------------------


def _offset_values(cu_seqlens: torch.Tensor, tokens: int) -> None:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > tokens or any(b < a for a, b in zip(offsets, offsets[1:], strict=False)):
        raise ValueError(f"cu_seqlens must rise from 0 to at most {tokens}, got {offsets}")


def _slot_values(
    name: str, indices: torch.Tensor | None, num_slots: int, pad_slot_id: int, *, unique: bool = True
) -> None:
    if indices is None:
        return
    slots = [slot for slot in indices.flatten().tolist() if slot >= 0 and slot != pad_slot_id]
    if any(slot >= num_slots for slot in slots):
        raise ValueError(f"{name} must be below the {num_slots} slots of the pool, got {max(slots)}")
    if unique and len(set(slots)) != len(slots):
        raise ValueError(f"{name} must name each slot once, got {indices.tolist()}")


def _alias_values(read: torch.Tensor, write: torch.Tensor | None, pad_slot_id: int) -> None:
    """A row may write the slot it reads, never the slot another row reads."""
    if write is None:
        return
    reads, writes = read.tolist(), write.tolist()
    for row, slot in enumerate(writes):
        if slot >= 0 and slot != pad_slot_id and any(other != row and slot == r for other, r in enumerate(reads)):
            raise ValueError(f"write_indices must not name a slot that another row reads, got {slot} in row {row}")


def _range_values(name: str, values: torch.Tensor | None, low: int, high: int) -> None:
    if values is not None and values.numel() and not bool(((values >= low) & (values <= high)).all()):
        raise ValueError(f"{name} must lie in {low}..{high}, got {values.tolist()}")


def _parent_values(parents: torch.Tensor | None) -> None:
    if parents is None:
        return
    for row in parents.tolist():
        if any(not -1 <= parent < token for token, parent in enumerate(row)):
            raise ValueError(f"parents must be -1 or an earlier token, got {row}")
