"""Calls of every operator, one or more for each optional argument: what opcheck, GPU tests and fakes are run on.

Inputs are strided as engines hold them: q, k, v and z are column views of one wide tensor, gates too, pools have padded
slots, packed batches end in padding rows.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import torch

H, HV, K, V, W = 2, 4, 64, 128, 4
D = 2 * H * K + HV * V


@dataclasses.dataclass
class Call:
    """One call: ``torch.ops.gdn.<operator>(*args, **kwargs)``; ``name`` says what is special about it."""

    operator: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.operator}-{self.name}"

    def run(self) -> Any:
        return getattr(torch.ops.gdn, self.operator)(*self.args, **self.kwargs)

    def map(self, change) -> Call:
        """The same call with every tensor replaced by ``change(tensor)``."""
        swap = lambda x: change(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        return dataclasses.replace(
            self, args=tuple(map(swap, self.args)), kwargs={name: swap(x) for name, x in self.kwargs.items()}
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, torch.Tensor)]


class Inputs:
    """Makes inputs of one dtype on one device, the same numbers everywhere."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        numbers = torch.randn(*shape, generator=self.generator) * scale
        return numbers.to(dtype or self.dtype).to(self.device)

    def columns(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``[T, ...]`` as a column view of a wider tensor, starting at a multiple of 16 bytes."""
        if shape[0] == 0:
            return self.normal(*shape, dtype=dtype)
        width = math.prod(shape[1:])
        return self.normal(shape[0], width + 32, dtype=dtype)[:, 16 : 16 + width].view(shape)

    def indices(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def flags(self, *values: bool) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.bool, device=self.device)

    def pool(self, slots: int, dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = ()) -> torch.Tensor:
        """State slots with padding between them."""
        size = HV * V * K
        return self.normal(slots, *lead, size + 64, dtype=dtype)[..., :size].unflatten(-1, (HV, V, K))

    def delta(self, tokens: int, *, batch: int | None = None, padding: int = 0, raw: bool = False) -> tuple:
        """q, k, v, g, beta; the last ``padding`` tokens are NaN. Packed ``[1, T, ...]`` unless ``batch`` is given."""
        count = tokens if batch is None else batch * tokens
        mixed = self.columns(count, D)
        mixed[count - padding :] = torch.nan
        q, k, v = mixed.split((H * K, H * K, HV * V), dim=-1)
        shape = (1, count) if batch is None else (batch, tokens)
        if raw:
            gates = self.columns(count, 2 * HV).view(count, 2, HV)
            g, beta = gates[:, 0], gates[:, 1]
        else:
            g = torch.nn.functional.logsigmoid(self.normal(count, HV, dtype=torch.float32))
            beta = torch.sigmoid(self.normal(count, HV, dtype=torch.float32))
        g[count - padding :] = torch.nan
        return (
            q.view(*shape, H, K),
            k.view(*shape, H, K),
            v.view(*shape, HV, V),
            g.unflatten(0, shape),
            beta.unflatten(0, shape),
        )

    def gate_parameters(self) -> dict[str, torch.Tensor]:
        return {
            "A_log": self.normal(HV, dtype=torch.float32, scale=0.5),
            "dt_bias": self.normal(HV, dtype=torch.float32, scale=0.5),
        }


def norm_calls(m: Inputs) -> list[Call]:
    def call(name: str, args: tuple, operator: str = "layer_norm_gated", **kwargs: Any) -> Call:
        return Call(operator, name, args, {"norm_before_gate": True, **kwargs})

    def row(width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return m.normal(width, dtype=dtype)

    def fp8(name: str, args: tuple, **kwargs: Any) -> Call:
        return call(name, args, "layer_norm_gated_fp8", **kwargs)

    x, z = m.columns(7, HV, V), m.columns(7, HV, V)
    wide = m.normal(5, 1024)
    out = m.columns(7, HV, V)
    zeros = m.columns(7, HV, V)
    zeros[3, 1], zeros[5] = 0, 0
    return [
        call("column-views", (x, row(V), None, z)),
        call("no-gate", (x, row(V))),
        call("bias", (x, row(V), row(V), z)),
        call("gate-first-sigmoid", (x, row(V), None, z), norm_before_gate=False, activation="sigmoid"),
        call("layer-norm-groups", (wide, row(1024), row(1024), wide.flip(0)), is_rms_norm=False, group_size=256),
        call("fp32-weight-swish-eps", (x, row(V, torch.float32), None, z), activation="swish", eps=1e-2),
        call("long-rows", (m.normal(3, 20000), row(20000), None, m.normal(3, 20000)), is_rms_norm=False),
        call("odd-row", (m.normal(3, 97), row(97), None, m.normal(3, 97))),
        call("one-dimension", (m.normal(V), row(V), None, m.normal(V))),
        call("empty", (m.normal(0, HV, V), row(V), None, m.normal(0, HV, V))),
        call("out", (x, row(V), row(V), z, out), "layer_norm_gated_out"),
        call("out-empty", (m.normal(0, V), row(V), None, None, m.normal(0, V)), "layer_norm_gated_out"),
        fp8("column-views", (x, row(V), None, z)),
        fp8("no-gate-fp32-weight", (x, row(V, torch.float32))),
        fp8("bias-zeros", (zeros, row(V), row(V), zeros)),
        fp8("gate-first-sigmoid", (x, row(V), None, z), norm_before_gate=False, activation="sigmoid"),
        fp8("layer-norm-groups", (wide, row(1024), row(1024), wide.flip(0)), is_rms_norm=False, group_size=256),
        fp8("rows-of-three-groups", (m.normal(3, 384), row(384), None, m.normal(3, 384)), quant_group_size=128),
        fp8("long-rows", (m.normal(3, 20096), row(20096), None, m.normal(3, 20096)), is_rms_norm=False),
        fp8("empty", (m.normal(0, HV, V), row(V), None, m.normal(0, HV, V))),
        Call("l2norm", "column-view", (m.columns(9, H, K),), {}),
        Call("l2norm", "eps-fourth-dimension", (m.normal(2, 3, H, K),), {"eps": 1e-2}),
        Call("l2norm", "empty", (m.normal(0, K),), {}),
    ]


def gating_calls(m: Inputs) -> list[Call]:
    parameters = tuple(m.gate_parameters().values())
    a, b = m.columns(9, HV), m.columns(9, HV)
    extreme = m.normal(4, HV)
    extreme[0], extreme[1], extreme[2] = torch.inf, -torch.inf, 100.0
    return [
        Call("gating", "column-views", (a, b, *parameters), {}),
        Call(
            "gating",
            "beta-scale-batch",
            (a.unflatten(0, (3, 3)), b.unflatten(0, (3, 3)), *parameters),
            {"beta_scale": 2.0},
        ),
        Call("gating", "16-bit-parameters", (a, b, *(x.to(torch.bfloat16) for x in parameters)), {}),
        Call("gating", "extremes", (extreme, extreme, *parameters), {}),
        Call("gating", "empty", (m.normal(0, HV), m.normal(0, HV), *parameters), {}),
    ]


def split_calls(m: Inputs) -> list[Call]:
    def call(name: str, tokens: int, ratio: int) -> Call:
        heads = {"num_k_heads": H, "num_v_heads": ratio * H, "head_k_dim": K, "head_v_dim": V}
        width = 2 * H * (K + ratio * V)
        return Call("split_qkvz_ba", name, (m.columns(tokens, width), m.columns(tokens, 2 * ratio * H)), heads)

    return [call(f"ratio-{ratio}", 5, ratio) for ratio in (1, 2, 3, 4)] + [call("empty", 0, 2)]


def conv_calls(m: Inputs) -> list[Call]:
    def state(slots: int, columns: int = W - 1, last: str = "channel") -> torch.Tensor:
        if last == "channel":
            return m.normal(slots, columns, D).transpose(1, 2)
        return m.normal(slots, D, columns)

    weight, bias = m.normal(D, W), m.normal(D)
    x = m.columns(12, D)
    x[10:] = torch.nan
    offsets = m.indices([0, 1, 1, 3, 10])
    slots = m.indices([2, 0, -1, 1])
    rows, drafts = m.columns(4, D), m.normal(4, 3, D)
    windows = m.normal(5, 3, D, W - 1)
    tree = m.indices([[-1, 0, 0], [-1, 0, 1], [-1, -1, 1], [-1, 0, 7]])
    return [
        Call("causal_conv1d", "ragged", (x, weight, bias, state(4), offsets), {}),
        Call(
            "causal_conv1d",
            "slots-fresh",
            (x, weight, None, state(4, last="time"), offsets.long()),
            {"state_indices": slots.long(), "has_initial_state": m.flags(True, False, True, False), "activation": None},
        ),
        Call(
            "causal_conv1d",
            "width-2-null-slot",
            (x, m.normal(D, 2), bias, state(4, 1), offsets),
            {"state_indices": m.indices([0, 1, 2, 3]), "pad_slot_id": 0},
        ),
        Call("causal_conv1d", "no-sequences", (x, weight, bias, state(2), m.indices([0])), {}),
        Call("causal_conv1d", "empty", (m.normal(0, D), weight, bias, state(2), m.indices([0, 0])), {}),
        Call("causal_conv1d_update", "rows", (rows, weight, bias, state(4)), {}),
        Call("causal_conv1d_update", "slots", (rows, weight, None, state(3, last="time")), {"state_indices": slots}),
        Call(
            "causal_conv1d_update",
            "table-column",
            (rows, weight, bias, state(4)),
            {"state_indices": m.indices([[2, 1], [0, 1], [3, 1], [-1, 1]])[:, 0]},
        ),
        Call("causal_conv1d_update", "drafts", (drafts, weight, bias, state(4)), {"activation": None}),
        Call(
            "causal_conv1d_update",
            "accepted",
            (drafts, weight, bias, state(4, W - 1 + 2)),
            {"state_indices": slots, "num_accepted_tokens": m.indices([1, 3, 2, 9])},
        ),
        Call("causal_conv1d_update", "empty", (m.normal(0, D), weight, bias, state(4)), {}),
        Call("causal_conv1d_verify", "chain", (drafts, weight, bias, state(4), windows), {}),
        Call(
            "causal_conv1d_verify",
            "tree",
            (drafts, weight, None, state(4), windows),
            {"state_indices": slots, "intermediate_indices": m.indices([4, 0, 1, -1]), "parents": tree},
        ),
    ]


def delta_calls(m: Inputs, chunked: bool = True) -> list[Call]:
    """``chunked``: with the chunk operators, which take no fp32 on a GPU."""
    offsets = m.indices([0, 70, 70, 71, 199])
    packed = m.delta(203, padding=4)
    initial = m.pool(4)
    names = ["recurrent_gated_delta_rule"] + ["chunk_gated_delta_rule"] * chunked
    calls = []
    for name in names:
        calls += [
            Call(name, "packed", packed, {"cu_seqlens": offsets, "use_qk_l2norm": True}),
            Call(
                name,
                "initial-scale",
                packed,
                {"cu_seqlens": offsets.long(), "initial_state": initial, "scale": 0.3, "use_qk_l2norm": True},
            ),
            Call(name, "equal-lengths", m.delta(67, batch=2), {"use_qk_l2norm": True}),
            Call(
                name,
                "raw-gates",
                m.delta(70, raw=True),
                {"use_qk_l2norm": True, "beta_scale": 2.0, **m.gate_parameters()},
            ),
            Call(name, "no-batch-dimension", tuple(x[0] for x in m.delta(9)), {"use_qk_l2norm": True}),
            Call(name, "no-tokens", m.delta(0), {"cu_seqlens": m.indices([0, 0]), "initial_state": m.pool(1)}),
            Call(name, "no-sequences", packed, {"cu_seqlens": m.indices([0])}),
        ]
    slots = m.indices([3, 1, -1, 4])
    if chunked:
        out = lambda: m.columns(203, HV, V)[None]  # noqa: E731
        fresh = m.flags(True, True, True, False)
        calls += [
            Call(
                "chunk_gated_delta_rule_paged",
                "pool",
                (*packed, m.pool(6), out(), slots, offsets),
                {"use_qk_l2norm": True},
            ),
            Call(
                "chunk_gated_delta_rule_paged",
                "fresh-write-slots-raw",
                (*m.delta(203, raw=True), m.pool(6, m.dtype), out(), slots.long(), offsets.long()),
                {
                    "has_initial_state": fresh,
                    "write_indices": m.indices([0, 1, 2, -1], torch.int64),
                    "use_qk_l2norm": True,
                    "scale": 0.2,
                    **m.gate_parameters(),
                },
            ),
            Call(
                "chunk_gated_delta_rule_paged",
                "no-batch-dimension-null-slot",
                (*(x[0] for x in packed), m.pool(6), out()[0], m.indices([0, 1, 2, 3]), offsets),
                {"use_qk_l2norm": True, "pad_slot_id": 0},
            ),
            Call(
                "chunk_gated_delta_rule_paged_checkpoints",
                "every-64",
                (*packed, m.pool(6), out(), m.pool(4), slots, offsets, m.indices([0, 1, 1, 1, 4])),
                {"checkpoint_interval": 64, "use_qk_l2norm": True},
            ),
        ]
    rows, few, flat = m.delta(3, batch=4), m.delta(9, padding=2), m.delta(12)
    few_offsets = m.indices([0, 3, 3, 4, 7])
    table = m.indices([[0, 1, 2], [3, 4, -1], [5, 6, 7], [-1, 8, 9]])
    calls += [
        Call("recurrent_gated_delta_rule_paged", "rows", (*rows, m.pool(6), slots), {"use_qk_l2norm": True}),
        Call(
            "recurrent_gated_delta_rule_paged",
            "packed-fresh-write-slots",
            (*few, m.pool(6), slots),
            {
                "cu_seqlens": few_offsets,
                "has_initial_state": m.flags(True, False, True, False),
                "write_indices": m.indices([0, 1, 2, 5]),
                "use_qk_l2norm": True,
            },
        ),
        Call(
            "recurrent_gated_delta_rule_paged",
            "slot-per-token",
            (*rows, m.pool(10), table),
            {"num_accepted_tokens": m.indices([2, 1, 3, 1]), "use_qk_l2norm": True, "scale": 0.5},
        ),
        Call(
            "recurrent_gated_delta_rule_paged",
            "raw-null-slot",
            (*m.delta(1, batch=4, raw=True), m.pool(6, m.dtype), m.indices([0, 5, 2, 99])),
            {"use_qk_l2norm": True, "pad_slot_id": 0, **m.gate_parameters()},
        ),
        Call(
            "recurrent_gated_delta_rule_paged",
            "packed-rows-slot-per-token",
            (*flat[:3], *(x[0] for x in flat[3:]), m.pool(10), table),
            {"num_accepted_tokens": m.indices([2, 1, 3, 1]), "tokens_per_row": 3, "use_qk_l2norm": True},
        ),
        Call(
            "recurrent_gated_delta_rule_paged",
            "packed-rows-no-batch-dimension",
            (*(x[0] for x in flat), m.pool(13), m.indices([3, -1, 0, 5, 7, 8, 9, 10, 11, 12, 1, 2])),
            {"tokens_per_row": 1, "use_qk_l2norm": True},
        ),
        Call(
            "recurrent_gated_delta_rule_verify",
            "packed-rows-raw-tree",
            (*m.delta(12, raw=True), m.pool(6), m.pool(4, lead=(3,)), slots),
            {
                "parents": m.indices([[-1, 0, 0], [-1, 0, 1], [-1, -1, 1], [-1, -1, 0]]),
                "tokens_per_row": 3,
                "use_qk_l2norm": True,
                **m.gate_parameters(),
            },
        ),
        Call(
            "recurrent_gated_delta_rule_verify",
            "chain",
            (*rows, m.pool(6), m.pool(4, lead=(3,)), slots),
            {"use_qk_l2norm": True},
        ),
        Call(
            "recurrent_gated_delta_rule_verify",
            "packed-tree",
            (*few, m.pool(6), m.pool(4, lead=(3,)), slots),
            {
                "cu_seqlens": few_offsets,
                "intermediate_indices": m.indices([3, 0, 1, 2]),
                "parents": m.indices([[-1, 0, 0], [-1, 0, 1], [-1, -1, 1], [-1, -1, 0]]),
                "has_initial_state": m.flags(True, True, True, False),
                "use_qk_l2norm": True,
            },
        ),
        Call(
            "recurrent_gated_delta_rule_paged",
            "rounded-slot-per-token",
            (*rows, m.pool(10, torch.float16), table),
            {"use_qk_l2norm": True, "rounding_seed": m.indices(-7)},
        ),
        Call(
            "recurrent_gated_delta_rule_verify",
            "rounded-chain",
            (*rows, m.pool(6), m.pool(4, torch.bfloat16, lead=(3,)), slots),
            {"use_qk_l2norm": True, "rounding_seed": m.indices([2**40], torch.int64)},
        ),
    ]
    gates = m.columns(4, 2 * HV)
    a, b = gates[:, :HV], gates[:, HV:]
    parameters = tuple(m.gate_parameters().values())
    heads = {"num_k_heads": H}
    calls += [
        Call("packed_decode", "slots", (m.columns(4, D), a, b, *parameters, m.pool(6), slots), heads),
        Call(
            "packed_decode",
            "16-bit-pool-scale-null-slot",
            (m.columns(4, D), a, b, *parameters, m.pool(6, m.dtype), m.indices([0, 1, 2, 3], torch.int64)),
            {**heads, "scale": 0.4, "pad_slot_id": 0},
        ),
        Call(
            "packed_decode",
            "no-l2norm",
            (m.columns(4, D), a, b, *parameters, m.pool(6), slots),
            {**heads, "use_qk_l2norm": False, "scale": 0.01},
        ),
        Call(
            "packed_decode",
            "rounded",
            (m.columns(4, D), a, b, *parameters, m.pool(6, torch.bfloat16), slots),
            {**heads, "rounding_seed": m.indices([3], torch.int64)},
        ),
        Call(
            "packed_decode",
            "empty",
            (m.normal(0, D), m.normal(0, HV), m.normal(0, HV), *parameters, m.pool(6), m.indices([])),
            heads,
        ),
        Call(
            "packed_decode_out",
            "slots",
            (m.columns(4, D), a, b, *parameters, m.pool(6), m.normal(4, HV, V), slots),
            {**heads, "scale": 0.4},
        ),
        Call(
            "packed_decode_out",
            "rounded-null-slot-token-dimension",
            (
                m.columns(4, D),
                a,
                b,
                *parameters,
                m.pool(6, torch.float16),
                m.normal(4, 1, HV, V),
                m.indices([0, 1, 2, 3]),
            ),
            {**heads, "pad_slot_id": 0, "rounding_seed": m.indices([3], torch.int64)},
        ),
        Call(
            "packed_decode_out",
            "empty",
            (
                *(m.normal(0, D), m.normal(0, HV), m.normal(0, HV), *parameters, m.pool(6)),
                *(m.normal(0, HV, V), m.indices([])),
            ),
            heads,
        ),
    ]
    return calls


def step_calls(m: Inputs) -> list[Call]:
    def call(
        name: str, rows: int = 4, width: int = W, last: str = "channel", bias: bool = False, **options: Any
    ) -> Call:
        """The second of the rows is padding, and NaN."""
        mixed, gates, z = m.columns(rows, D), m.columns(rows, 2 * HV), m.columns(rows, HV, V)
        mixed[1:2], gates[1:2] = torch.nan, torch.nan
        conv_state = m.normal(6, width - 1, D).transpose(1, 2) if last == "channel" else m.normal(6, D, width - 1)
        kind = options.pop("state_dtype", torch.float32)
        operator = options.pop("operator", "decode_step")
        index = options.pop("state_indices", None)
        args = (
            mixed,
            gates[:, :HV],
            gates[:, HV:],
            z,
            m.normal(D, width),
            m.normal(D) if bias else None,
            conv_state,
            *m.gate_parameters().values(),
            m.pool(6, kind),
            m.normal(V),
            m.indices([3, -1, 0, 5][:rows]) if index is None else index,
        )
        return Call(operator, name, args, {"num_k_heads": H, "norm_before_gate": True, **options})

    null_slot = {"state_indices": m.indices([1, 0, 4, 2], torch.int64), "pad_slot_id": 0}
    return [
        call("slots"),
        call("bias-time-last-16-bit-pool-null-slot", last="time", bias=True, state_dtype=m.dtype, **null_slot),
        call("gate-first-sigmoid-no-conv-activation", norm_before_gate=False, norm_activation="sigmoid", width=2,
             conv_activation=None),
        call("no-l2norm-scale-eps", use_qk_l2norm=False, scale=0.01, eps=1e-2, width=3),
        call("rounded", state_dtype=torch.bfloat16, rounding_seed=m.indices([2**40 + 5], torch.int64)),
        call("empty", rows=0),
        call("slots", operator="decode_step_fp8"),
        call("gate-first-16-bit-pool-null-slot", operator="decode_step_fp8", norm_before_gate=False, bias=True,
             state_dtype=m.dtype, quant_group_size=128, **null_slot),
        call("empty", rows=0, operator="decode_step_fp8"),
    ]  # fmt: skip


def all_calls(m: Inputs, chunked: bool = True) -> list[Call]:
    """Every operator's calls on inputs of ``m``."""
    return [*norm_calls(m), *gating_calls(m), *split_calls(m), *conv_calls(m), *delta_calls(m, chunked), *step_calls(m)]


def calls(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Call]:
    """Every operator's calls, freshly made: running one writes its tensors."""
    return all_calls(Inputs(device, dtype), chunked=device == "cpu" or dtype is not torch.float32)


@functools.cache
def _made(device: str, dtype: torch.dtype) -> dict[str, Call]:
    return {call.id: call for call in calls(device, dtype)}


def call(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call | None:
    """The one of :func:`calls` whose id is ``name``, if there is one: a copy, with its strides and shared storages."""
    return copy.deepcopy(_made(device, dtype).get(name))
