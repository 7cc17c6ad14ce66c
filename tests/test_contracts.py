"""Bad input: which error, with which text, from the operator and while tracing, and nothing written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import operator_cases
import pytest
import torch
from operator_cases import HV, Call, D, H, K, V, W
from token_cases import assert_same_bits, results
from torch._subclasses.fake_tensor import FakeTensorMode

from gdn_kernels import graphs, launch
from gdn_kernels.ops import OPERATORS

FLOATS = "bfloat16 or float16 or float32"
INDICES = "int32 or int64"
# Of every message: "<arg> must <rule>, got <value>".
FORM = re.compile(r"^[A-Za-z_' ]+ must [^\n]+, got [^\n]+$", re.DOTALL)

Change = dict[str, Any]


def arguments(call: Call) -> dict[str, Any]:
    """Every argument of the call by its name in the schema."""
    schema = getattr(torch.ops.gdn, call.operator).default._schema
    names = [argument.name for argument in schema.arguments]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def changed(named: dict[str, Any], change: Change) -> dict[str, Any]:
    """``named`` with some arguments replaced; a function is applied to the argument of its name."""
    put = {name: value(named.get(name)) if callable(value) else value for name, value in change.items()}
    return {**named, **put}


def tensors(named: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in named.values() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]


# Changes of one tensor.
def to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype)


def meta(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


def longer(x: torch.Tensor) -> torch.Tensor:
    """One more along the first dimension."""
    return torch.cat([x, x[:1]])


def wider(x: torch.Tensor) -> torch.Tensor:
    """One more along the last dimension."""
    return torch.cat([x, x[..., :1]], dim=-1)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with a gap between neighbours of the last dimension."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Any], torch.Tensor]:
    return lambda _: torch.zeros(shape, dtype=dtype)


def ints(*values: Any) -> Callable[[Any], torch.Tensor]:
    return lambda _: torch.tensor(values, dtype=torch.int32)


# (call, what is changed, error, the message's beginning)
Row = tuple[str, Change, type[Exception], str]
TABLE: list[Row] = []


def rows(base: str, *entries: tuple[Change, type[Exception], str]) -> None:
    TABLE.extend((base, *entry) for entry in entries)


def index_rows(base: str, *names: str) -> None:
    """An index vector has an index dtype, one entry a sequence, neighbours beside each other, and the device of all."""
    for name in names:
        rows(
            base,
            ({name: to(torch.float32)}, TypeError, f"{name} must be {INDICES}, got float32"),
            ({name: to(torch.int16)}, TypeError, f"{name} must be {INDICES}, got int16"),
            ({name: longer}, ValueError, f"{name} must have shape"),
            ({name: lambda x: x[:, None]}, ValueError, f"{name} must have shape"),
            ({name: strided}, ValueError, f"{name} must have a contiguous last dimension, got strides (2,)"),
            ({name: meta}, ValueError, f"{name} must be on cpu, got meta"),
        )


def flag_rows(base: str, name: str = "has_initial_state") -> None:
    rows(
        base,
        ({name: to(torch.int32)}, TypeError, f"{name} must be bool, got int32"),
        ({name: longer}, ValueError, f"{name} must have shape (4,), got (5,)"),
        ({name: meta}, ValueError, f"{name} must be on cpu, got meta"),
    )


def offset_rows(base: str) -> None:
    name = "cu_seqlens"
    rows(
        base,
        ({name: to(torch.float32)}, TypeError, f"{name} must be {INDICES}, got float32"),
        ({name: lambda x: x[None]}, ValueError, f"{name} must be [N + 1], got shape (1, "),
        ({name: ints()}, ValueError, f"{name} must hold at least one offset, got 0"),
        ({name: strided}, ValueError, f"{name} must have a contiguous last dimension, got strides (2,)"),
        ({name: meta}, ValueError, f"{name} must be on cpu, got meta"),
    )


rows(
    "layer_norm_gated-bias",
    ({"x": to(torch.int32)}, TypeError, f"x must be {FLOATS}, got int32"),
    ({"x": to(torch.complex64)}, TypeError, f"x must be {FLOATS}, got complex64"),
    ({"x": new()}, ValueError, "x must be [..., D] of one to four dimensions, got shape ()"),
    ({"x": new(1, 1, 1, 7, V)}, ValueError, "x must be [..., D] of one to four dimensions, got shape (1, 1, 1, 7,"),
    ({"x": strided}, ValueError, "x must have a contiguous last dimension, got strides"),
    ({"x": new(2, 0), "weight": new(0), "bias": None, "z": None}, ValueError, "x must have a last dimension of at le"),
    ({"weight": to(torch.int64)}, TypeError, f"weight must be {FLOATS}, got int64"),
    ({"weight": longer}, ValueError, f"weight must have shape ({V},), got ({V + 1},)"),
    ({"weight": lambda x: x[None]}, ValueError, f"weight must have shape ({V},), got (1, {V})"),
    ({"weight": strided}, ValueError, "weight must have a contiguous last dimension, got strides (2,)"),
    ({"weight": meta}, ValueError, "weight must be on cpu, got meta"),
    ({"bias": to(torch.bool)}, TypeError, f"bias must be {FLOATS}, got bool"),
    ({"bias": longer}, ValueError, f"bias must have shape ({V},), got ({V + 1},)"),
    ({"bias": meta}, ValueError, "bias must be on cpu, got meta"),
    ({"z": to(torch.bfloat16)}, TypeError, "z must have the dtype of x, float32, got bfloat16"),
    ({"z": longer}, ValueError, f"z must have shape (7, {HV}, {V}), got (8, {HV}, {V})"),
    ({"z": strided}, ValueError, "z must have a contiguous last dimension, got strides"),
    ({"z": meta}, ValueError, "z must be on cpu, got meta"),
    ({"activation": "tanh"}, ValueError, "activation must be one of 'silu', 'swish', 'sigmoid', got 'tanh'"),
    ({"group_size": 48}, ValueError, f"group_size must divide the last dimension of x, {V}, got 48"),
    ({"group_size": 0}, ValueError, f"group_size must divide the last dimension of x, {V}, got 0"),
    ({"group_size": -V}, ValueError, f"group_size must divide the last dimension of x, {V}, got -{V}"),
    ({"eps": -1e-6}, ValueError, "eps must be at least 0, got -1e-06"),
    ({"eps": float("nan")}, ValueError, "eps must be at least 0, got nan"),
    (
        {"x": new(1, 65537), "weight": new(65537), "bias": None, "z": None},
        NotImplementedError,
        "group_size must be at most 65536, got 65537",
    ),
)
rows(
    "layer_norm_gated_out-out",
    ({"x": to(torch.int32)}, TypeError, f"x must be {FLOATS}, got int32"),
    ({"group_size": 48}, ValueError, f"group_size must divide the last dimension of x, {V}, got 48"),
    ({"out": to(torch.float16)}, TypeError, "out must have the dtype of x, float32, got float16"),
    ({"out": longer}, ValueError, f"out must have shape (7, {HV}, {V}), got (8, {HV}, {V})"),
    ({"out": strided}, ValueError, "out must have a contiguous last dimension, got strides"),
    ({"out": meta}, ValueError, "out must be on cpu, got meta"),
)
rows(
    "layer_norm_gated_fp8-column-views",
    ({"x": to(torch.int32)}, TypeError, f"x must be {FLOATS}, got int32"),
    ({"x": lambda x: x[0, 0], "z": None}, ValueError, f"x must be [T, HV, V] or [M, D], got shape ({V},)"),
    ({"x": lambda x: x[None], "z": None}, ValueError, "x must be [T, HV, V] or [M, D], got shape (1, 7,"),
    ({"x": strided}, ValueError, "x must have a contiguous last dimension, got strides"),
    ({"weight": longer}, ValueError, f"weight must have shape ({V},), got ({V + 1},)"),
    ({"bias": new(V, dtype=torch.int32)}, TypeError, f"bias must be {FLOATS}, got int32"),
    ({"z": to(torch.bfloat16)}, TypeError, "z must have the dtype of x, float32, got bfloat16"),
    ({"z": meta}, ValueError, "z must be on cpu, got meta"),
    ({"activation": "relu"}, ValueError, "activation must be one of 'silu', 'swish', 'sigmoid', got 'relu'"),
    ({"quant_group_size": 0}, ValueError, "quant_group_size must be at least 1, got 0"),
    ({"quant_group_size": 64}, NotImplementedError, "quant_group_size must be 128, got 64"),
    ({"group_size": 48}, ValueError, f"group_size must divide the last dimension of x, {V}, got 48"),
    (
        {"group_size": 64},
        NotImplementedError,
        "group_size must be a multiple of quant_group_size, 128, got 64",
    ),
    (
        {"x": new(4, 192), "weight": new(192), "z": None},
        NotImplementedError,
        "the last dimension of x must be a multiple of quant_group_size, 128, got 192",
    ),
)
rows(
    "l2norm-column-view",
    ({"x": to(torch.uint8)}, TypeError, f"x must be {FLOATS}, got uint8"),
    ({"x": new()}, ValueError, "x must be [..., D] of one to four dimensions, got shape ()"),
    ({"x": strided}, ValueError, "x must have a contiguous last dimension, got strides"),
    ({"x": new(3, 0)}, ValueError, "x must have a last dimension of at least 1, got 0"),
    ({"x": new(1, 65537)}, NotImplementedError, "x must have a last dimension of at most 65536, got 65537"),
    ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
)
rows(
    "gating-column-views",
    ({"a": to(torch.int64)}, TypeError, f"a must be {FLOATS}, got int64"),
    ({"a": new(HV)}, ValueError, f"a must be [T, HV] or [B, T, HV], got shape ({HV},)"),
    ({"a": strided}, ValueError, "a must have a contiguous last dimension, got strides"),
    ({"b": to(torch.float16)}, TypeError, "b must have the dtype of a, float32, got float16"),
    ({"b": longer}, ValueError, f"b must have shape (9, {HV}), got (10, {HV})"),
    ({"b": strided}, ValueError, "b must have a contiguous last dimension, got strides"),
    ({"b": meta}, ValueError, "b must be on cpu, got meta"),
    ({"A_log": to(torch.int32)}, TypeError, f"A_log must be {FLOATS}, got int32"),
    ({"A_log": longer}, ValueError, f"A_log must have shape ({HV},), got ({HV + 1},)"),
    ({"A_log": strided}, ValueError, "A_log must have a contiguous last dimension, got strides (2,)"),
    ({"A_log": meta}, ValueError, "A_log must be on cpu, got meta"),
    ({"dt_bias": to(torch.int32)}, TypeError, f"dt_bias must be {FLOATS}, got int32"),
    ({"dt_bias": longer}, ValueError, f"dt_bias must have shape ({HV},), got ({HV + 1},)"),
    ({"dt_bias": meta}, ValueError, "dt_bias must be on cpu, got meta"),
)
rows(
    "split_qkvz_ba-ratio-2",
    ({"num_k_heads": 0}, ValueError, "num_k_heads must be at least 1, got 0"),
    ({"num_v_heads": 3}, ValueError, f"num_v_heads must be a multiple of num_k_heads, {H}, got 3"),
    ({"num_v_heads": 0}, ValueError, f"num_v_heads must be a multiple of num_k_heads, {H}, got 0"),
    ({"head_k_dim": 0}, ValueError, f"head_k_dim and head_v_dim must be at least 1, got 0 and {V}"),
    ({"qkvz": to(torch.int32)}, TypeError, f"qkvz must be {FLOATS}, got int32"),
    ({"ba": to(torch.int32)}, TypeError, f"ba must be {FLOATS}, got int32"),
    ({"qkvz": lambda x: x[None]}, ValueError, "qkvz must be [T, 2 * H * K + 2 * HV * V], got shape (1, 5,"),
    ({"ba": lambda x: x[None]}, ValueError, "ba must be [T, 2 * HV], got shape (1, 5, 8)"),
    ({"qkvz": wider}, ValueError, "qkvz must have shape (5, 1280), got (5, 1281)"),
    ({"ba": wider}, ValueError, "ba must have shape (5, 8), got (5, 9)"),
    ({"ba": longer}, ValueError, "ba must have shape (5, 8), got (6, 8)"),
    ({"qkvz": strided}, ValueError, "qkvz must have a contiguous last dimension, got strides"),
    ({"ba": meta}, ValueError, "ba must be on cpu, got meta"),
)


def conv_rows(base: str, ranks: str) -> None:
    """What the three convolutions share."""
    rows(
        base,
        ({"x": to(torch.int32)}, TypeError, f"x must be {FLOATS}, got int32"),
        ({"x": new(D)}, ValueError, f"x must be {ranks}, got shape ({D},)"),
        ({"x": strided}, ValueError, "x must have a contiguous last dimension, got strides"),
        ({"weight": to(torch.int32)}, TypeError, f"weight must be {FLOATS}, got int32"),
        ({"weight": lambda x: x[:, None]}, ValueError, f"weight must be [D, W], got shape ({D}, 1, {W})"),
        ({"weight": longer}, ValueError, f"weight must have shape ({D}, {W}), got ({D + 1}, {W})"),
        ({"weight": wider}, NotImplementedError, "weight must have a width W of 2 to 4, got 5"),
        ({"weight": lambda x: x[:, :1]}, NotImplementedError, "weight must have a width W of 2 to 4, got 1"),
        ({"weight": meta}, ValueError, "weight must be on cpu, got meta"),
        ({"bias": new(D + 1)}, ValueError, f"bias must have shape ({D},), got ({D + 1},)"),
        ({"bias": new(D, dtype=torch.int32)}, TypeError, f"bias must be {FLOATS}, got int32"),
        ({"bias": lambda _: strided(torch.zeros(D))}, ValueError, "bias must have a contiguous last dimension"),
        ({"conv_state": to(torch.int32)}, TypeError, f"conv_state must be {FLOATS}, got int32"),
        ({"conv_state": lambda x: x[0]}, ValueError, "conv_state must be [S, D, W - 1], got shape"),
        ({"conv_state": lambda x: x[:, 1:]}, ValueError, f"conv_state must have {D} channels, got shape"),
        ({"conv_state": meta}, ValueError, "conv_state must be on cpu, got meta"),
        ({"activation": "sigmoid"}, ValueError, "activation must be one of None, 'silu', 'swish', got 'sigmoid'"),
    )


conv_rows("causal_conv1d-slots-fresh", "[T, D]")
offset_rows("causal_conv1d-slots-fresh")
flag_rows("causal_conv1d-slots-fresh")
index_rows("causal_conv1d-slots-fresh", "state_indices")
rows(
    "causal_conv1d-slots-fresh",
    ({"conv_state": lambda x: x[..., 1:]}, ValueError, "conv_state must hold W - 1 = 3 columns, got shape"),
    ({"conv_state": wider}, ValueError, "conv_state must hold W - 1 = 3 columns, got shape"),
    ({"x": new(1, 12, D)}, ValueError, "x must be [T, D], got shape (1, 12,"),
)
conv_rows("causal_conv1d_update-accepted", "[N, D] or [N, t, D]")
index_rows("causal_conv1d_update-accepted", "num_accepted_tokens")
rows(
    "causal_conv1d_update-table-column",
    ({"state_indices": to(torch.int16)}, TypeError, f"state_indices must be {INDICES}, got int16"),
    ({"state_indices": longer}, ValueError, "state_indices must have shape (4,), got (5,)"),
    ({"state_indices": lambda x: x[:, None]}, ValueError, "state_indices must have shape (4,), got (4, 1)"),
    ({"state_indices": meta}, ValueError, "state_indices must be on cpu, got meta"),
)
rows(
    "causal_conv1d_update-accepted",
    (
        {"conv_state": lambda x: x[..., 1:]},
        ValueError,
        "conv_state must hold at least W - 2 + t = 5 columns with num_accepted_tokens, got shape",
    ),
    ({"num_accepted_tokens": None}, ValueError, "conv_state must hold W - 1 = 3 columns, got shape"),
)
conv_rows("causal_conv1d_verify-tree", "[N, t, D]")
index_rows("causal_conv1d_verify-tree", "state_indices", "intermediate_indices")
rows(
    "causal_conv1d_verify-tree",
    ({"conv_state": wider}, ValueError, "conv_state must hold W - 1 = 3 columns, got shape"),
    ({"intermediate_windows": to(torch.int8)}, TypeError, f"intermediate_windows must be {FLOATS}, got int8"),
    ({"intermediate_windows": lambda x: x[0]}, ValueError, "intermediate_windows must be [M, t, D, W - 1], got shape"),
    ({"intermediate_windows": wider}, ValueError, "intermediate_windows must hold W - 1 = 3 columns, got shape"),
    ({"intermediate_windows": lambda x: x[:, 1:]}, ValueError, "intermediate_windows must hold 3 tokens of"),
    ({"intermediate_windows": lambda x: x[:, :, 1:]}, ValueError, "intermediate_windows must hold 3 tokens of"),
    ({"intermediate_windows": meta}, ValueError, "intermediate_windows must be on cpu, got meta"),
    ({"parents": to(torch.float32)}, TypeError, f"parents must be {INDICES}, got float32"),
    ({"parents": wider}, ValueError, "parents must have shape (4, 3), got (4, 4)"),
    ({"parents": strided}, ValueError, "parents must have a contiguous last dimension, got strides"),
    ({"parents": meta}, ValueError, "parents must be on cpu, got meta"),
)


def delta_rows(base: str, gates: bool = True) -> None:
    """What every form of the delta rule shares."""
    rows(
        base,
        ({"q": to(torch.int32)}, TypeError, f"q must be {FLOATS}, got int32"),
        ({"q": lambda x: x[0, 0]}, ValueError, "q must be [B, T, H, K] or [T, H, K], got shape"),
        ({"k": to(torch.float16)}, TypeError, "k must have the dtype of q, float32, got float16"),
        ({"k": lambda x: x[:, 1:]}, ValueError, "k must have shape"),
        ({"v": to(torch.bfloat16)}, TypeError, "v must have the dtype of q, float32, got bfloat16"),
        ({"v": lambda x: x[:, 1:]}, ValueError, "v must have shape"),
        ({"v": lambda x: x[:, :, :3]}, ValueError, f"v must have a multiple of q's {H} heads, got 3"),
        ({"q": lambda x: x[..., :32], "k": lambda x: x[..., :32]}, NotImplementedError, "head size K must be one of"),
        ({"v": lambda x: x[..., :96]}, NotImplementedError, "head size V must be one of 64, 128, 256, got 96"),
        ({"g": lambda x: x[..., 1:]}, ValueError, "g must have shape"),
        ({"beta": lambda x: x[:, 1:]}, ValueError, "beta must have shape"),
        ({"q": strided}, ValueError, "q must have a contiguous last dimension, got strides"),
        ({"k": strided}, ValueError, "k must have a contiguous last dimension, got strides"),
        ({"v": strided}, ValueError, "v must have a contiguous last dimension, got strides"),
        ({"g": strided}, ValueError, "g must have a contiguous last dimension, got strides"),
        ({"beta": meta}, ValueError, "beta must be on cpu, got meta"),
        ({"k": meta}, ValueError, "k must be on cpu, got meta"),
    )
    if gates:
        rows(
            base,
            ({"g": to(torch.bfloat16)}, TypeError, "g must be float32, got bfloat16"),
            ({"beta": to(torch.float16)}, TypeError, "beta must be float32, got float16"),
            ({"A_log": new(HV)}, ValueError, "dt_bias must be given where its partner is, got None"),
            ({"dt_bias": new(HV)}, ValueError, "A_log must be given where its partner is, got None"),
        )


def pool_rows(base: str, name: str = "state") -> None:
    block = f"[*, {HV}, {V}, {K}]"
    rows(
        base,
        ({name: to(torch.int8)}, TypeError, f"{name} must be {FLOATS}, got int8"),
        ({name: lambda x: x[0]}, ValueError, f"{name} must have shape {block}, got ({HV}, {V}, {K})"),
        ({name: lambda x: x[:, 1:]}, ValueError, f"{name} must have shape {block}, got"),
        ({name: lambda x: x.transpose(2, 3)}, ValueError, f"{name} must have shape {block}, got"),
        ({name: lambda x: torch.cat([x, x], 1)[:, ::2]}, ValueError, f"{name} must hold each [HV, V, K] block contig"),
        ({name: meta}, ValueError, f"{name} must be on cpu, got meta"),
    )


for functional in ("chunk_gated_delta_rule", "recurrent_gated_delta_rule"):
    delta_rows(f"{functional}-initial-scale")
    offset_rows(f"{functional}-packed")
    rows(
        f"{functional}-initial-scale",
        ({"initial_state": to(torch.int8)}, TypeError, f"initial_state must be {FLOATS}, got int8"),
        ({"initial_state": longer}, ValueError, f"initial_state must have shape [4, {HV}, {V}, {K}], got (5,"),
        ({"initial_state": lambda x: x[0]}, ValueError, "initial_state must have shape"),
        ({"initial_state": strided}, ValueError, "initial_state must hold each [HV, V, K] block contiguously, got str"),
        ({"initial_state": meta}, ValueError, "initial_state must be on cpu, got meta"),
    )
    rows(
        f"{functional}-equal-lengths",
        ({"cu_seqlens": ints(0, 67)}, ValueError, "q must have a batch dimension of 1 with cu_seqlens, got 2"),
    )
    delta_rows(f"{functional}-raw-gates", gates=False)
    rows(
        f"{functional}-raw-gates",
        ({"g": to(torch.int32)}, TypeError, f"g must be {FLOATS}, got int32"),
        ({"A_log": longer}, ValueError, f"A_log must have shape ({HV},), got ({HV + 1},)"),
        ({"dt_bias": to(torch.int32)}, TypeError, f"dt_bias must be {FLOATS}, got int32"),
        ({"dt_bias": None}, ValueError, "dt_bias must be given where its partner is, got None"),
        ({"A_log": meta}, ValueError, "A_log must be on cpu, got meta"),
    )

CHUNK_PAGED = "chunk_gated_delta_rule_paged-fresh-write-slots-raw"
CHECKPOINTS = "chunk_gated_delta_rule_paged_checkpoints-every-64"
delta_rows(CHUNK_PAGED, gates=False)
offset_rows(CHUNK_PAGED)
pool_rows(CHUNK_PAGED)
flag_rows(CHUNK_PAGED)
index_rows(CHUNK_PAGED, "state_indices", "write_indices")
for base in (CHUNK_PAGED, CHECKPOINTS):
    rows(
        base,
        ({"out": to(torch.bfloat16)}, TypeError, "out must have the dtype of v, float32, got bfloat16"),
        ({"out": lambda x: x[:, 1:]}, ValueError, f"out must have shape (1, 203, {HV}, {V}), got (1, 202, {HV}, {V})"),
        ({"out": strided}, ValueError, "out must have a contiguous last dimension, got strides"),
        ({"out": meta}, ValueError, "out must be on cpu, got meta"),
    )
delta_rows(CHECKPOINTS)
pool_rows(CHECKPOINTS)
index_rows(CHECKPOINTS, "state_indices", "checkpoint_offsets")
rows(
    CHECKPOINTS,
    ({"checkpoints": to(torch.bfloat16)}, TypeError, "checkpoints must be float32, got bfloat16"),
    ({"checkpoints": lambda x: x[:, 1:]}, ValueError, f"checkpoints must have shape [*, {HV}, {V}, {K}], got"),
    ({"checkpoints": strided}, ValueError, "checkpoints must hold each [HV, V, K] block contiguously, got strides"),
    ({"checkpoints": meta}, ValueError, "checkpoints must be on cpu, got meta"),
    ({"checkpoint_interval": 0}, ValueError, "checkpoint_interval must be a positive multiple of 64, got 0"),
    ({"checkpoint_interval": 96}, ValueError, "checkpoint_interval must be a positive multiple of 64, got 96"),
)

PAGED = "recurrent_gated_delta_rule_paged-packed-fresh-write-slots"
TABLED = "recurrent_gated_delta_rule_paged-slot-per-token"
delta_rows(PAGED)
offset_rows(PAGED)
pool_rows(PAGED)
flag_rows(PAGED)
index_rows(PAGED, "write_indices")
index_rows(TABLED, "num_accepted_tokens")
rows(
    PAGED,
    ({"state_indices": to(torch.float32)}, TypeError, f"state_indices must be {INDICES}, got float32"),
    (
        {"state_indices": lambda x: x[None, None]},
        ValueError,
        "state_indices must be [N] or [N, t], got shape (1, 1, 4)",
    ),
    ({"state_indices": longer}, ValueError, "state_indices must have shape (4,), got (5,)"),
    ({"state_indices": meta}, ValueError, "state_indices must be on cpu, got meta"),
    ({"num_accepted_tokens": ints(1, 1, 1, 1)}, ValueError, "num_accepted_tokens must be None where state_indices is"),
)
rows(
    TABLED,
    ({"write_indices": ints(0, 1, 2, 3)}, ValueError, "write_indices must be None where state_indices is [N, t], got"),
    ({"state_indices": lambda x: x[:, :0]}, ValueError, "state_indices must have at least one column, got 0"),
    ({"state_indices": longer}, ValueError, "state_indices must have shape (4, 3), got (5, 3)"),
    ({"state_indices": strided}, ValueError, "state_indices must have a contiguous last dimension, got strides"),
)

VERIFY = "recurrent_gated_delta_rule_verify-packed-tree"
delta_rows(VERIFY)
offset_rows(VERIFY)
pool_rows(VERIFY)
flag_rows(VERIFY)
index_rows(VERIFY, "state_indices", "intermediate_indices")
rows(
    VERIFY,
    ({"intermediate_states": to(torch.int8)}, TypeError, f"intermediate_states must be {FLOATS}, got int8"),
    ({"intermediate_states": lambda x: x[0]}, ValueError, "intermediate_states must have shape [*, *,"),
    ({"intermediate_states": lambda x: x[:, :, 1:]}, ValueError, "intermediate_states must have shape [*, *,"),
    ({"intermediate_states": strided}, ValueError, "intermediate_states must hold each [HV, V, K] block contiguously"),
    ({"intermediate_states": meta}, ValueError, "intermediate_states must be on cpu, got meta"),
    ({"parents": to(torch.float32)}, TypeError, f"parents must be {INDICES}, got float32"),
    ({"parents": wider}, ValueError, "parents must have shape (4, 3), got (4, 4)"),
    ({"parents": strided}, ValueError, "parents must have a contiguous last dimension, got strides"),
    ({"parents": meta}, ValueError, "parents must be on cpu, got meta"),
)
rows(
    "recurrent_gated_delta_rule_verify-chain",
    ({"intermediate_states": lambda x: x[:, :2]}, ValueError, "intermediate_states must hold 3 tokens, got shape"),
    ({"parents": new(4, 2, dtype=torch.int32)}, ValueError, "parents must have a column for each of 3 tokens, got 2"),
)

ROWS = "recurrent_gated_delta_rule_verify-packed-rows-raw-tree"
rows(
    ROWS,
    ({"tokens_per_row": 0}, ValueError, "tokens_per_row must be at least 1, got 0"),
    ({"cu_seqlens": ints(0, 3, 6, 9, 12)}, ValueError, "cu_seqlens must be None with tokens_per_row, got a tensor"),
    ({"tokens_per_row": 5}, ValueError, "q must hold whole rows of tokens_per_row, 5, got 12 tokens"),
    ({"v": lambda x: x[:, :11]}, ValueError, "v must hold whole rows of tokens_per_row, 3, got 11 tokens"),
    ({"beta": lambda x: x[0, :10]}, ValueError, "beta must hold whole rows of tokens_per_row, 3, got 10 tokens"),
    ({"k": lambda x: x.view(2, 6, H, K)}, ValueError, "k must have a batch dimension of 1 with tokens_per_row, got 2"),
    ({"g": lambda x: x[0, 0]}, ValueError, f"g must be [1, T, HV] or [T, HV], got shape ({HV},)"),
    ({"q": lambda x: x[0, 0]}, ValueError, f"q must be [1, T, heads, size] or [T, heads, size], got shape ({H}, {K})"),
    ({"g": lambda x: x[:, :9]}, ValueError, f"g must have shape (4, 3, {HV}), got (3, 3, {HV})"),
    ({"state_indices": longer}, ValueError, "state_indices must have shape (4,), got (5,)"),
    ({"k": to(torch.float16)}, TypeError, "k must have the dtype of q, float32, got float16"),
)

DECODE = "packed_decode-slots"
index_rows(DECODE, "state_indices")
rows(
    DECODE,
    ({"mixed_qkv": to(torch.int32)}, TypeError, f"mixed_qkv must be {FLOATS}, got int32"),
    ({"mixed_qkv": lambda x: x[None]}, ValueError, "mixed_qkv must be [N, 2 * H * K + HV * V], got shape (1, 4,"),
    ({"mixed_qkv": wider}, ValueError, f"mixed_qkv must have shape (4, {D}), got (4, {D + 1})"),
    ({"mixed_qkv": strided}, ValueError, "mixed_qkv must have a contiguous last dimension, got strides"),
    ({"num_k_heads": 0}, ValueError, "num_k_heads must be at least 1, got 0"),
    ({"num_k_heads": 3}, ValueError, f"num_v_heads must be a multiple of num_k_heads, 3, got {HV}"),
    ({"num_k_heads": 4}, ValueError, "mixed_qkv must have shape"),
    ({"state": to(torch.int8)}, TypeError, f"state must be {FLOATS}, got int8"),
    ({"state": lambda x: x[0]}, ValueError, f"state must be [S, HV, V, K], got shape ({HV}, {V}, {K})"),
    ({"state": strided}, ValueError, "state must hold each [HV, V, K] block contiguously, got strides"),
    ({"state": new(6, HV, V, 32)}, NotImplementedError, "head size K must be one of 64, 128, 256, got 32"),
    ({"state": new(6, HV, 32, K)}, NotImplementedError, "head size V must be one of 64, 128, 256, got 32"),
    ({"state": meta}, ValueError, "state must be on cpu, got meta"),
    ({"a": to(torch.int32)}, TypeError, f"a must be {FLOATS}, got int32"),
    ({"a": longer}, ValueError, f"a must have shape (4, {HV}), got (5, {HV})"),
    ({"a": strided}, ValueError, "a must have a contiguous last dimension, got strides"),
    ({"b": wider}, ValueError, f"b must have shape (4, {HV}), got (4, {HV + 1})"),
    ({"b": meta}, ValueError, "b must be on cpu, got meta"),
    ({"A_log": longer}, ValueError, f"A_log must have shape ({HV},), got ({HV + 1},)"),
    ({"dt_bias": to(torch.int32)}, TypeError, f"dt_bias must be {FLOATS}, got int32"),
)

DECODE_OUT = "packed_decode_out-slots"
index_rows(DECODE_OUT, "state_indices")
rows(
    DECODE_OUT,
    ({"mixed_qkv": to(torch.int32)}, TypeError, f"mixed_qkv must be {FLOATS}, got int32"),
    ({"state": strided}, ValueError, "state must hold each [HV, V, K] block contiguously, got strides"),
    ({"out": to(torch.float16)}, TypeError, "out must have the dtype of mixed_qkv, float32, got float16"),
    ({"out": lambda x: x[0]}, ValueError, f"out must be [N, HV, V] or [N, 1, HV, V], got shape ({HV}, {V})"),
    ({"out": longer}, ValueError, f"out must have shape (4, {HV}, {V}), got (5, {HV}, {V})"),
    ({"out": wider}, ValueError, f"out must have shape (4, {HV}, {V}), got (4, {HV}, {V + 1})"),
    ({"out": new(4, 2, HV, V)}, ValueError, f"out must have shape (4, 1, {HV}, {V}), got (4, 2, {HV}, {V})"),
    ({"out": strided}, ValueError, "out must be contiguous, got strides"),
    ({"out": lambda x: torch.cat([x, x], -1)[..., :V]}, ValueError, "out must be contiguous, got strides"),
    ({"out": lambda x: torch.cat([x, x], 1)[:, :HV]}, ValueError, "out must be contiguous, got strides"),
    ({"out": meta}, ValueError, "out must be on cpu, got meta"),
)

STEP = "decode_step-slots"
index_rows(STEP, "state_indices")
rows(
    STEP,
    ({"mixed_qkv": to(torch.int32)}, TypeError, f"mixed_qkv must be {FLOATS}, got int32"),
    ({"mixed_qkv": wider}, ValueError, f"mixed_qkv must have shape (4, {D}), got (4, {D + 1})"),
    ({"num_k_heads": 3}, ValueError, f"num_v_heads must be a multiple of num_k_heads, 3, got {HV}"),
    ({"state": new(6, HV, 32, K)}, NotImplementedError, "head size V must be one of 64, 128, 256, got 32"),
    ({"a": wider}, ValueError, f"a must have shape (4, {HV}), got (4, {HV + 1})"),
    ({"z": to(torch.bfloat16)}, TypeError, "z must have the dtype of mixed_qkv, float32, got bfloat16"),
    ({"z": longer}, ValueError, f"z must have shape (4, {HV}, {V}), got (5, {HV}, {V})"),
    ({"z": strided}, ValueError, "z must have a contiguous last dimension, got strides"),
    ({"z": meta}, ValueError, "z must be on cpu, got meta"),
    ({"conv_weight": to(torch.int32)}, TypeError, f"conv_weight must be {FLOATS}, got int32"),
    ({"conv_weight": lambda x: x[:, None]}, ValueError, f"conv_weight must be [D, W], got shape ({D}, 1, {W})"),
    ({"conv_weight": new(D, 5)}, NotImplementedError, "conv_weight must have a width W of 2 to 4, got 5"),
    ({"conv_weight": longer}, ValueError, f"conv_weight must have shape ({D}, {W}), got ({D + 1}, {W})"),
    ({"conv_bias": new(D, dtype=torch.int8)}, TypeError, f"conv_bias must be {FLOATS}, got int8"),
    ({"conv_bias": new(D + 1)}, ValueError, f"conv_bias must have shape ({D},), got ({D + 1},)"),
    ({"conv_state": to(torch.int32)}, TypeError, f"conv_state must be {FLOATS}, got int32"),
    ({"conv_state": wider}, ValueError, f"conv_state must have shape (6, {D}, {W - 1}), got (6, {D}, {W})"),
    ({"conv_state": longer}, ValueError, f"conv_state must have shape (6, {D}, {W - 1}), got (7, {D}, {W - 1})"),
    ({"conv_state": meta}, ValueError, "conv_state must be on cpu, got meta"),
    ({"norm_weight": to(torch.int32)}, TypeError, f"norm_weight must be {FLOATS}, got int32"),
    ({"norm_weight": longer}, ValueError, f"norm_weight must have shape ({V},), got ({V + 1},)"),
    ({"conv_activation": "relu"}, ValueError, "conv_activation must be one of None, 'silu', 'swish', got 'relu'"),
    ({"norm_activation": "relu"}, ValueError, "norm_activation must be one of 'silu', 'swish', 'sigmoid', got 'relu'"),
    ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    (
        {
            "num_k_heads": 1,
            "mixed_qkv": new(4, 2 * K + 9 * V),
            "a": new(4, 9),
            "b": new(4, 9),
            "A_log": new(9),
            "dt_bias": new(9),
            "z": new(4, 9, V),
            "conv_weight": new(2 * K + 9 * V, W),
            "conv_state": new(6, 2 * K + 9 * V, W - 1),
            "state": new(6, 9, V, K),
        },
        NotImplementedError,
        "state must have at most 8 value heads for each key head, got 9",
    ),
)
rows(
    "decode_step_fp8-slots",
    ({"z": to(torch.bfloat16)}, TypeError, "z must have the dtype of mixed_qkv, float32, got bfloat16"),
    ({"quant_group_size": 0}, ValueError, "quant_group_size must be at least 1, got 0"),
    ({"quant_group_size": 64}, NotImplementedError, "quant_group_size must be 128, got 64"),
    (
        {
            "mixed_qkv": new(4, 2 * H * K + HV * 64),
            "z": new(4, HV, 64),
            "conv_weight": new(2 * H * K + HV * 64, W),
            "conv_state": new(6, 2 * H * K + HV * 64, W - 1),
            "state": new(6, HV, 64, K),
            "norm_weight": new(64),
        },
        NotImplementedError,
        "the last dimension of z must be a multiple of quant_group_size, 128, got 64",
    ),
)
for base, name in (
    ("packed_decode-rounded", "state"),
    ("recurrent_gated_delta_rule_paged-rounded-slot-per-token", "state"),
    ("recurrent_gated_delta_rule_verify-rounded-chain", "intermediate_states"),
):
    rows(
        base,
        ({"rounding_seed": to(torch.float32)}, TypeError, f"rounding_seed must be {INDICES}, got float32"),
        ({"rounding_seed": to(torch.int16)}, TypeError, f"rounding_seed must be {INDICES}, got int16"),
        ({"rounding_seed": ints(1, 2)}, ValueError, "rounding_seed must hold one element, got shape (2,)"),
        ({"rounding_seed": new(0, dtype=torch.int64)}, ValueError, "rounding_seed must hold one element, got sh"),
        ({"rounding_seed": new(1, 1, dtype=torch.int64)}, ValueError, "rounding_seed must hold one element, got sh"),
        ({"rounding_seed": meta}, ValueError, "rounding_seed must be on cpu, got meta"),
        ({name: to(torch.float32)}, ValueError, f"rounding_seed must be None where {name} is float32, got a tensor"),
    )

IDS = [f"{base}-{'-'.join(change)}-{index}" for index, (base, change, *_) in enumerate(TABLE)]


@pytest.fixture(scope="module")
def calls() -> dict[str, dict[str, Any]]:
    """The arguments of every call by name. Nothing may write them, so they are made once."""
    return {call.id: arguments(call) for call in operator_cases.calls()}


def refused(operator: str, named: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        getattr(torch.ops.gdn, operator)(**named)
    assert type(caught.value) is error
    text = str(caught.value)
    assert text.startswith(message) and FORM.match(text), text


def test_the_table_reaches_every_operator() -> None:
    assert {base.split("-")[0] for base, *_ in TABLE} | {"linear_attention_with_output"} == set(OPERATORS)
    for operator in OPERATORS[:-1]:
        kinds = {error for base, _, error, _ in TABLE if base.split("-")[0] == operator}
        assert kinds >= {TypeError, ValueError}, operator


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_bad_input_is_refused_and_nothing_written(row: Row, calls: dict[str, dict[str, Any]]) -> None:
    base, change, error, message = row
    named = changed(calls[base], change)
    before = [x.clone() for x in tensors(named)]
    refused(base.split("-")[0], named, error, message)
    assert_same_bits(tensors(named), before, base)


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_bad_input_is_refused_while_tracing(row: Row, calls: dict[str, dict[str, Any]]) -> None:
    base, change, error, message = row
    named = changed(calls[base], change)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in named.items()}
        refused(base.split("-")[0], fake, error, message)


def test_every_call_of_the_table_is_good_before_its_change() -> None:
    """Else a row could pass for another reason than its change."""
    for base in dict.fromkeys(base for base, *_ in TABLE):
        call = operator_cases.call(base)
        getattr(torch.ops.gdn, call.operator)(**arguments(call))


def test_the_strides_of_single_entries_do_not_count() -> None:
    """One row of a wider tensor, or one with a token dimension, is contiguous."""
    call = operator_cases.call(DECODE_OUT)
    named = arguments(call)
    for name in ("mixed_qkv", "a", "b", "state_indices"):
        named[name] = named[name][:1]
    wide = torch.full((3, 2 * HV, V), torch.nan)
    for out in (wide[:1, :HV], wide[1:2, None, :HV]):
        assert out.stride(0) != HV * V
        torch.ops.gdn.packed_decode_out(**{**named, "state": named["state"].clone(), "out": out})
    wanted = torch.ops.gdn.packed_decode(**{name: x for name, x in named.items() if name != "out"})
    assert torch.equal(wide[:2, :HV], wanted.expand(2, HV, V)) and wide[:, HV:].isnan().all() and wide[2].isnan().all()


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name.startswith("chunk")])
def test_a_chunked_prefill_in_fp32_on_a_gpu_is_refused(operator: str) -> None:
    call = next(call for call in operator_cases.calls() if call.operator == operator)
    with FakeTensorMode() as mode:
        try:
            on_gpu = call.map(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda"))
        except (AssertionError, RuntimeError) as error:
            pytest.skip(f"this torch makes no fake tensor for a GPU it has not: {error}")
        assert mode is not None
        message = "q must be bfloat16 or float16 for a chunked prefill on a GPU, got float32"
        refused(operator, arguments(on_gpu), NotImplementedError, message)


# ---------------------------------------------------------------------------------------------------------------
# The split point
# ---------------------------------------------------------------------------------------------------------------


def split_arguments() -> dict[str, Any]:
    m = operator_cases.Inputs("cpu", torch.float32)
    return {
        "mixed_qkv": m.columns(5, D),
        "a": m.columns(5, HV),
        "b": m.columns(5, HV),
        "output": m.columns(5, HV, V),
        "layer_id": 1,
    }


def layer_state() -> graphs.LayerState:
    m = operator_cases.Inputs("cpu", torch.float32, 1)
    window = m.normal(6, W - 1, D).transpose(1, 2)
    return graphs.LayerState(H, m.normal(D, W), None, *m.gate_parameters().values(), window, m.pool(6))


PREFILL = {"cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32), "has_initial_state": torch.tensor([True, False])}
SPLIT_TABLE = [
    ({"mixed_qkv": to(torch.int32)}, TypeError, f"mixed_qkv must be {FLOATS}, got int32"),
    ({"mixed_qkv": lambda x: x[None]}, ValueError, "mixed_qkv must be [T, D], got shape (1, 5,"),
    ({"mixed_qkv": strided}, ValueError, "mixed_qkv must have a contiguous last dimension, got strides"),
    ({"a": to(torch.int32)}, TypeError, f"a must be {FLOATS}, got int32"),
    ({"a": lambda x: x[None]}, ValueError, f"a must be [T, HV], got shape (1, 5, {HV})"),
    ({"a": longer}, ValueError, f"a must have shape (5, {HV}), got (6, {HV})"),
    ({"b": wider}, ValueError, f"b must have shape (5, {HV}), got (5, {HV + 1})"),
    ({"b": meta}, ValueError, "b must be on cpu, got meta"),
    ({"output": to(torch.float16)}, TypeError, "output must have the dtype of mixed_qkv, float32, got float16"),
    ({"output": lambda x: x.flatten(1)}, ValueError, f"output must be [T, HV, V], got shape (5, {HV * V})"),
    ({"output": longer}, ValueError, f"output must have shape (5, {HV}, {V}), got (6, {HV}, {V})"),
    ({"output": strided}, ValueError, "output must have a contiguous last dimension, got strides"),
    ({"output": meta}, ValueError, "output must be on cpu, got meta"),
]


@pytest.mark.parametrize("change, error, message", SPLIT_TABLE, ids=[message for *_, message in SPLIT_TABLE])
def test_bad_input_of_the_split_point_is_refused(change: Change, error: type[Exception], message: str) -> None:
    named, layer = changed(split_arguments(), change), layer_state()
    metadata = graphs.BatchMetadata(torch.tensor([1, 2], dtype=torch.int32), **PREFILL)
    written = [*tensors(named), layer.conv_state, layer.recurrent_state]
    before = [x.clone() for x in written]
    with graphs.forward_context({1: layer}, metadata):
        refused("linear_attention_with_output", named, error, message)
        assert_same_bits(written, before, message)
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in named.items()}
            refused("linear_attention_with_output", fake, error, message)


METADATA_TABLE = [
    ("state_indices", torch.zeros(2), {}, TypeError, f"state_indices must be {INDICES}, got float32"),
    ("state_indices", torch.zeros(2), PREFILL, TypeError, f"state_indices must be {INDICES}, got float32"),
    ("state_indices", torch.zeros(6, dtype=torch.int32), {}, ValueError, "state_indices must have at most one row a t"),
    ("state_indices", torch.zeros(3, dtype=torch.int32), PREFILL, ValueError, "state_indices must have shape (2,)"),
    ("cu_seqlens", torch.zeros(3), PREFILL, TypeError, f"cu_seqlens must be {INDICES}, got float32"),
    ("has_initial_state", torch.zeros(2), PREFILL, TypeError, "has_initial_state must be bool, got float32"),
]


@pytest.mark.parametrize(
    "name, value, others, error, message", METADATA_TABLE, ids=[f"{row[0]}-{i}" for i, row in enumerate(METADATA_TABLE)]
)
def test_metadata_that_does_not_fit_is_refused_before_the_conv_writes(
    name: str, value: torch.Tensor, others: dict[str, Any], error: type[Exception], message: str
) -> None:
    named, layer = split_arguments(), layer_state()
    fields = {"state_indices": torch.tensor([1, 2], dtype=torch.int32), **others, name: value}
    written = [named["output"], layer.conv_state, layer.recurrent_state]
    before = [x.clone() for x in written]
    with graphs.forward_context({1: layer}, graphs.BatchMetadata(**fields)):
        refused("linear_attention_with_output", named, error, message)
    assert_same_bits(written, before, message)


@pytest.mark.parametrize("others", [{}, PREFILL], ids=["decode", "prefill"])
def test_projections_that_do_not_fit_the_layer_are_refused_before_the_conv_writes(others: dict[str, Any]) -> None:
    named, layer = split_arguments(), layer_state()
    named["mixed_qkv"] = named["mixed_qkv"][:, : D - 64]
    written = [named["output"], layer.conv_state, layer.recurrent_state]
    before = [x.clone() for x in written]
    metadata = graphs.BatchMetadata(torch.tensor([1, 2], dtype=torch.int32), **others)
    with graphs.forward_context({1: layer}, metadata):
        refused("linear_attention_with_output", named, ValueError, "mixed_qkv must have ")
    assert_same_bits(written, before, "projections too narrow")


# ---------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------

UPDATE, TREE = "causal_conv1d_update-accepted", "causal_conv1d_verify-tree"
VALUES: list[tuple[str, Change, str]] = [
    (
        "causal_conv1d-slots-fresh",
        {"cu_seqlens": ints(0, 5, 3, 3, 10)},
        "cu_seqlens must rise from 0 to at most 12, got",
    ),
    (
        "causal_conv1d-slots-fresh",
        {"cu_seqlens": ints(0, 1, 2, 3, 13)},
        "cu_seqlens must rise from 0 to at most 12, got",
    ),
    (
        "causal_conv1d-slots-fresh",
        {"cu_seqlens": ints(1, 1, 2, 3, 9)},
        "cu_seqlens must rise from 0 to at most 12, got",
    ),
    (
        "causal_conv1d-slots-fresh",
        {"state_indices": ints(0, 1, 2, 4)},
        "state_indices must be below the 4 slots of the",
    ),
    ("causal_conv1d-slots-fresh", {"state_indices": ints(0, 1, 3, 1)}, "state_indices must name each slot once, got"),
    (
        UPDATE,
        {"state_indices": ints(0, 1, 2, 9), "num_accepted_tokens": ints(1, 1, 1, 1)},
        "state_indices must be below",
    ),
    (UPDATE, {"state_indices": ints(0, 0, 2, 1), "num_accepted_tokens": ints(1, 1, 1, 1)}, "state_indices must name"),
    (UPDATE, {"num_accepted_tokens": ints(1, 0, 2, 3)}, "num_accepted_tokens must lie in 1..3, got [1, 0, 2, 3]"),
    (UPDATE, {"num_accepted_tokens": ints(1, 4, 2, 3)}, "num_accepted_tokens must lie in 1..3, got [1, 4, 2, 3]"),
    (TREE, {"state_indices": ints(0, 0, 1, 4)}, "state_indices must be below the 4 slots of the pool, got 4"),
    (TREE, {"intermediate_indices": ints(4, 0, 1, 4)}, "intermediate_indices must name each slot once, got"),
    (TREE, {"intermediate_indices": ints(4, 0, 1, 5)}, "intermediate_indices must be below the 5 slots"),
    (TREE, {"parents": lambda x: x * 0}, "parents must be -1 or an earlier token, got [0, 0, 0]"),
    (TREE, {"parents": lambda x: x * 0 - 2}, "parents must be -1 or an earlier token, got [-2, -2, -2]"),
    (CHECKPOINTS, {"g": lambda x: x * 0 + 0.5}, "g must be at most 0, got 0.5"),
    (PAGED, {"g": lambda x: x * 0 + 0.5}, "g must be at most 0, got 0.5"),
    ("chunk_gated_delta_rule-packed", {"cu_seqlens": ints(0, 9, 8)}, "cu_seqlens must rise from 0 to at most 203, got"),
    (
        "recurrent_gated_delta_rule-packed",
        {"cu_seqlens": ints(0, 204)},
        "cu_seqlens must rise from 0 to at most 203, got",
    ),
    (CHUNK_PAGED, {"state_indices": ints(0, 1, 2, 6)}, "state_indices must be below the 6 slots of the pool, got 6"),
    (CHUNK_PAGED, {"write_indices": ints(0, 1, 2, 7)}, "write_indices must be below the 6 slots of the pool, got 7"),
    (CHUNK_PAGED, {"write_indices": ints(2, 0, 2, -1)}, "write_indices must name each slot once, got [2, 0, 2, -1]"),
    (
        CHUNK_PAGED,
        {"write_indices": ints(1, 0, 2, -1)},
        "write_indices must not name a slot that another row reads, go",
    ),
    (CHECKPOINTS, {"state_indices": ints(3, 1, -1, 3)}, "state_indices must name each slot once, got [3, 1, -1, 3]"),
    (PAGED, {"write_indices": ints(0, 3, 2, 5)}, "write_indices must not name a slot that another row reads, got 3"),
    (TABLED, {"num_accepted_tokens": ints(0, 1, 1, 1)}, "num_accepted_tokens must lie in 1..3, got [0, 1, 1, 1]"),
    (TABLED, {"num_accepted_tokens": ints(1, 1, 1, 4)}, "num_accepted_tokens must lie in 1..3, got [1, 1, 1, 4]"),
    (TABLED, {"state_indices": lambda x: x * 0}, "state_indices must name each slot once, got"),
    (VERIFY, {"state_indices": ints(0, 1, 2, 6)}, "state_indices must be below the 6 slots of the pool, got 6"),
    (VERIFY, {"intermediate_indices": ints(3, 0, 0, 2)}, "intermediate_indices must name each slot once, got"),
    (VERIFY, {"parents": lambda x: x * 0 + 1}, "parents must be -1 or an earlier token, got [1, 1, 1]"),
    (DECODE, {"state_indices": ints(0, 1, 2, 6)}, "state_indices must be below the 6 slots of the pool, got 6"),
    (DECODE, {"state_indices": ints(0, 1, -1, 1)}, "state_indices must name each slot once, got [0, 1, -1, 1]"),
]
VALUE_IDS = [f"{base}-{'-'.join(change)}-{index}" for index, (base, change, _) in enumerate(VALUES)]


@pytest.mark.parametrize("base, change, message", VALUES, ids=VALUE_IDS)
def test_debug_checks_refuse_harmful_values_and_nothing_is_written(base: str, change: Change, message: str) -> None:
    call = operator_cases.call(base)
    named = changed(arguments(call), change)
    before = [x.clone() for x in tensors(named)]
    with launch.debug_checks():
        refused(call.operator, named, ValueError, message)
    assert_same_bits(tensors(named), before, base)


def test_capture_mode_reads_no_values() -> None:
    call = operator_cases.call(DECODE)
    named = changed(arguments(call), {"state_indices": ints(0, 1, 2, 6)})
    with launch.debug_checks(), launch.capture_mode():
        torch.ops.gdn.packed_decode(**named)
    with launch.debug_checks(), pytest.raises(ValueError, match="must be below"):
        torch.ops.gdn.packed_decode(**named)


# The others have an accepted count, a parent or a slot that is out of range, to see it masked.
GOOD = [
    call.id
    for call in operator_cases.calls()
    if call.id not in (UPDATE, TREE, VERIFY, "recurrent_gated_delta_rule_paged-raw-null-slot")
]


def test_debug_checks_let_good_calls_pass_with_the_same_bits() -> None:
    for name in GOOD:
        checked, plain = operator_cases.call(name), operator_cases.call(name)
        with launch.debug_checks():
            found = results(checked.run())
        wanted = results(plain.run())
        assert_same_bits([*found, *checked.tensors], [*wanted, *plain.tensors], name)


def test_debug_checks_leave_padding_alone() -> None:
    """Gates of padding rows may be anything, and a null slot may be read and written by any row."""
    named = arguments(operator_cases.call(CHECKPOINTS))
    named["g"][:, 199:] = 3.0
    with launch.debug_checks():
        torch.ops.gdn.chunk_gated_delta_rule_paged_checkpoints(**named)
    change = {"state_indices": ints(0, 1, 0, 4), "write_indices": ints(5, 0, 3, 0), "pad_slot_id": 0}
    named = changed(arguments(operator_cases.call(PAGED)), change)
    with launch.debug_checks():
        torch.ops.gdn.recurrent_gated_delta_rule_paged(**named)
    with launch.debug_checks():
        refused(
            "recurrent_gated_delta_rule_paged",
            {**named, "pad_slot_id": -1},
            ValueError,
            "write_indices must name each slot once",
        )


INDEXED = [
    call.id
    for call in operator_cases.calls()
    if isinstance(call.kwargs.get("state_indices", arguments(call).get("state_indices")), torch.Tensor)
    and arguments(call)["state_indices"].numel()
]


@pytest.mark.parametrize("index", [-1, -7, 99, 2**31 - 1], ids=["padding", "negative", "past-the-pool", "largest"])
@pytest.mark.parametrize("base", INDEXED)
def test_a_slot_outside_the_pool_is_padding(base: str, index: int) -> None:
    call = operator_cases.call(base)
    named = changed(arguments(call), {"state_indices": lambda x: torch.full_like(x, index)})
    pools = [named[name] for name in ("conv_state", "state", "intermediate_windows", "intermediate_states")
             if name in named]  # fmt: skip
    before = [x.clone() for x in pools]
    found = results(getattr(torch.ops.gdn, call.operator)(**named)) or [named["out"]]
    # a scale is never zero
    assert all(not x.float().any() for x in (found[:1] if "fp8" in base else found))
    assert_same_bits(pools, before, base)


@pytest.mark.parametrize("count", [0, -1, 4, 1000])
@pytest.mark.parametrize("base, pool", [(UPDATE, "conv_state"), (TABLED, "state")])
def test_an_accepted_count_out_of_range_makes_its_row_inert(base: str, pool: str, count: int) -> None:
    call, good = operator_cases.call(base), operator_cases.call(base)
    named = changed(arguments(call), {"num_accepted_tokens": ints(1, count, 2, 2)})
    right = changed(arguments(good), {"num_accepted_tokens": ints(1, 1, 2, 2)})
    before = named[pool].clone()
    (found,) = results(getattr(torch.ops.gdn, call.operator)(**named))
    (wanted,) = results(getattr(torch.ops.gdn, call.operator)(**right))
    slots = named["state_indices"][1].flatten()
    slots = slots[slots >= 0].long()
    assert not found[1].any() and wanted[1].any()
    assert_same_bits([named[pool][slots]], [before[slots]], "the row's slots")
    assert_same_bits([found[0]], [wanted[0]], "another row")
