"""Calls of every operator over any number of tokens, rows or sequences: for graphs, captures and binaries.

``make(name, count, ...)`` builds the call ``name`` with its varying dimension at ``count``. The seed sets the token
data and everything an engine changes in place between two replays: lengths, slots, which states are known, accepted
counts, draft trees. Strides are those of an engine: q, k, v, z and the gates are column views of wider tensors, pools
have space between their slots. Tokens past the last offset are NaN.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from operator_cases import Call

SEQUENCES = 4  # of a packed batch whose token count varies
SLOTS = 8  # rows past them are padding, so that a pool stays small over thousands of rows
DRAFTS = 3
PACKED_TOKENS = 40  # of a packed batch whose number of sequences varies


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Heads, head sizes and conv width. ``real_limit``: more tokens than that in a packed batch are padding."""

    H: int = 2
    HV: int = 6
    K: int = 128
    V: int = 128
    W: int = 4
    real_limit: int = 1 << 30

    @property
    def D(self) -> int:
        return 2 * self.H * self.K + self.HV * self.V


CPU = Sizes(H=1, HV=2, K=64, V=64, real_limit=70)


class Make:
    """Makes the tensors of one call, from a seed."""

    def __init__(self, sizes: Sizes, device: str, dtype: torch.dtype, seed: int) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        self.random = random.Random(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def columns(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``[T, ...]`` as a column view of a wider tensor, starting at a multiple of 16 bytes."""
        width = math.prod(shape[1:])
        return self.normal(shape[0], width + 32, dtype=dtype)[:, 16 : 16 + width].unflatten(1, shape[1:])

    def integers(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def flags(self, count: int) -> torch.Tensor:
        return torch.tensor([self.random.random() < 0.7 for _ in range(count)], dtype=torch.bool, device=self.device)

    def pool(self, slots: int = SLOTS, *lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        s = self.sizes
        size = s.HV * s.V * s.K
        return self.normal(slots, *lead, size + 64, dtype=dtype)[..., :size].unflatten(-1, (s.HV, s.V, s.K))

    def conv_pool(self, columns: int) -> torch.Tensor:
        return self.normal(SLOTS, columns, self.sizes.D).transpose(1, 2)

    def conv_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.normal(self.sizes.D, self.sizes.W), self.normal(self.sizes.D)

    def slots(self, count: int, first: int = 0) -> torch.Tensor:
        """Different slots from ``first`` on for up to SLOTS of the rows; the others, and one more, are padding."""
        chosen = [*self.random.sample(range(first, first + SLOTS), min(count, SLOTS)), *[-1] * (count - SLOTS)]
        self.random.shuffle(chosen)
        if count > 2:
            chosen[self.random.randrange(count)] = -1
        return self.integers(chosen)

    def offsets(self, tokens: int, count: int = SEQUENCES) -> torch.Tensor:
        """``count`` lengths, some 0, that leave a few tokens as padding."""
        real = min(max(1, tokens - self.random.randrange(4)), tokens, self.sizes.real_limit)
        return self.integers([0, *sorted(self.random.randint(0, real) for _ in range(count - 1)), real])

    def delta(self, rows: int, tokens: int, real: int | None = None) -> tuple[torch.Tensor, ...]:
        """q, k, v ``[rows, tokens, ...]``, g, beta; NaN from token ``real`` on."""
        s, count = self.sizes, rows * tokens
        mixed = self.columns(count, s.D)
        g = torch.nn.functional.logsigmoid(self.normal(count, s.HV, dtype=torch.float32))
        beta = torch.sigmoid(self.normal(count, s.HV, dtype=torch.float32))
        for tensor in (mixed, g, beta):
            tensor[count if real is None else real :] = torch.nan
        q, k, v = (x.unflatten(0, (rows, tokens)) for x in mixed.split((s.H * s.K, s.H * s.K, s.HV * s.V), dim=-1))
        return (
            q.unflatten(-1, (s.H, s.K)),
            k.unflatten(-1, (s.H, s.K)),
            v.unflatten(-1, (s.HV, s.V)),
            g.unflatten(0, (rows, tokens)),
            beta.unflatten(0, (rows, tokens)),
        )

    def packed(self, tokens: int, count: int = SEQUENCES) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        offsets = self.offsets(tokens, count)
        return self.delta(1, tokens, int(offsets[-1])), offsets

    def raw(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b, two column views of one tensor."""
        gates = self.columns(tokens, 2 * self.sizes.HV)
        return gates[:, : self.sizes.HV], gates[:, self.sizes.HV :]

    def gate_parameters(self) -> dict[str, torch.Tensor]:
        return {name: 0.5 * self.normal(self.sizes.HV, dtype=torch.float32) for name in ("A_log", "dt_bias")}

    def seed(self) -> torch.Tensor:
        return self.integers([self.random.randrange(1 << 31)])

    def parents(self, count: int) -> torch.Tensor:
        return self.integers([[self.random.randint(-1, DRAFTS) for _ in range(DRAFTS)] for _ in range(count)])

    def accepted(self, count: int, limit: int = DRAFTS) -> torch.Tensor:
        """Mostly in range; 0 and one too many occur and must do no harm."""
        return self.integers([self.random.randint(0, limit + 1) for _ in range(count)])


Case = Callable[[Make, int], Call]
CASES: dict[str, Case] = {}
L2 = {"use_qk_l2norm": True}


def case(operator: str, what: str) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        CASES[f"{operator}-{what}"] = function
        return function

    return register


@case("layer_norm_gated", "column-views")
def _(m: Make, T: int) -> Call:
    s = m.sizes
    args = m.columns(T, s.HV, s.V), m.normal(s.V), None, m.columns(T, s.HV, s.V)
    return Call("layer_norm_gated", "", args, {"norm_before_gate": True})


@case("layer_norm_gated", "layer-norm-groups")
def _(m: Make, T: int) -> Call:
    options = {"norm_before_gate": False, "is_rms_norm": False, "group_size": 128, "activation": "sigmoid"}
    return Call("layer_norm_gated", "", (m.normal(T, 512), m.normal(512), m.normal(512), m.normal(T, 512)), options)


@case("layer_norm_gated_out", "column-views")
def _(m: Make, T: int) -> Call:
    s = m.sizes
    x, z, out = (m.columns(T, s.HV, s.V) for _ in range(3))
    return Call("layer_norm_gated_out", "", (x, m.normal(s.V), m.normal(s.V), z, out), {"norm_before_gate": True})


@case("layer_norm_gated_fp8", "column-views")
def _(m: Make, T: int) -> Call:
    # 128 columns whatever V is: a group of its own for each head
    args = m.columns(T, m.sizes.HV, 128), m.normal(128), None, m.columns(T, m.sizes.HV, 128)
    return Call("layer_norm_gated_fp8", "", args, {"norm_before_gate": True})


@case("layer_norm_gated_fp8", "layer-norm-groups")
def _(m: Make, T: int) -> Call:
    options = {"norm_before_gate": False, "is_rms_norm": False, "group_size": 256, "activation": "sigmoid"}
    return Call("layer_norm_gated_fp8", "", (m.normal(T, 512), m.normal(512), m.normal(512), m.normal(T, 512)), options)


@case("l2norm", "column-view")
def _(m: Make, T: int) -> Call:
    return Call("l2norm", "", (m.columns(T, m.sizes.H, m.sizes.K),), {})


@case("gating", "column-views")
def _(m: Make, T: int) -> Call:
    return Call("gating", "", (*m.raw(T), *m.gate_parameters().values()), {"beta_scale": 2.0})


@case("split_qkvz_ba", "column-views")
def _(m: Make, T: int) -> Call:
    s = m.sizes
    heads = {"num_k_heads": s.H, "num_v_heads": s.HV, "head_k_dim": s.K, "head_v_dim": s.V}
    return Call("split_qkvz_ba", "", (m.columns(T, s.D + s.HV * s.V), m.columns(T, 2 * s.HV)), heads)


def _conv(m: Make, T: int, count: int) -> Call:
    offsets = m.offsets(T, count)
    x = m.columns(T, m.sizes.D)
    x[int(offsets[-1]) :] = torch.nan
    options = {"state_indices": m.slots(count), "has_initial_state": m.flags(count)}
    return Call("causal_conv1d", "", (x, *m.conv_parameters(), m.conv_pool(m.sizes.W - 1), offsets), options)


@case("causal_conv1d", "tokens")
def _(m: Make, T: int) -> Call:
    return _conv(m, T, SEQUENCES)


@case("causal_conv1d", "sequences")
def _(m: Make, N: int) -> Call:
    return _conv(m, PACKED_TOKENS, N)


@case("causal_conv1d_update", "rows")
def _(m: Make, N: int) -> Call:
    args = m.columns(N, m.sizes.D), *m.conv_parameters(), m.conv_pool(m.sizes.W - 1)
    return Call("causal_conv1d_update", "", args, {"state_indices": m.slots(N)})


@case("causal_conv1d_update", "accepted")
def _(m: Make, N: int) -> Call:
    x = m.columns(N * DRAFTS, m.sizes.D).unflatten(0, (N, DRAFTS))
    options = {"state_indices": m.slots(N), "num_accepted_tokens": m.accepted(N)}
    return Call("causal_conv1d_update", "", (x, *m.conv_parameters(), m.conv_pool(m.sizes.W - 2 + DRAFTS)), options)


@case("causal_conv1d_verify", "tree")
def _(m: Make, N: int) -> Call:
    x = m.columns(N * DRAFTS, m.sizes.D).unflatten(0, (N, DRAFTS))
    windows = m.normal(SLOTS, DRAFTS, m.sizes.D, m.sizes.W - 1)
    options = {"state_indices": m.slots(N), "intermediate_indices": m.slots(N), "parents": m.parents(N)}
    return Call("causal_conv1d_verify", "", (x, *m.conv_parameters(), m.conv_pool(m.sizes.W - 1), windows), options)


def _functional(operator: str) -> None:
    @case(operator, "tokens")
    def _(m: Make, T: int) -> Call:
        inputs, offsets = m.packed(T)
        options = {"cu_seqlens": offsets, "initial_state": m.pool(SEQUENCES), "scale": 0.3, **L2}
        return Call(operator, "", inputs, options)

    @case(operator, "equal-lengths")
    def _(m: Make, T: int) -> Call:
        return Call(operator, "", m.delta(2, T), dict(L2))

    @case(operator, "raw-gates-no-batch-dimension")
    def _(m: Make, T: int) -> Call:
        (q, k, v, *_), offsets = m.packed(T)
        options = {"cu_seqlens": offsets, "beta_scale": 2.0, **L2, **m.gate_parameters()}
        return Call(operator, "", (q[0], k[0], v[0], *m.raw(T)), options)


_functional("chunk_gated_delta_rule")
_functional("recurrent_gated_delta_rule")


def _paged(m: Make, T: int, count: int) -> Call:
    inputs, offsets = m.packed(T, count)
    out = m.columns(T, m.sizes.HV, m.sizes.V)[None]
    args = *inputs, m.pool(), out, m.slots(count), offsets
    return Call("chunk_gated_delta_rule_paged", "", args, {"has_initial_state": m.flags(count), **L2})


@case("chunk_gated_delta_rule_paged", "tokens")
def _(m: Make, T: int) -> Call:
    return _paged(m, T, SEQUENCES)


@case("chunk_gated_delta_rule_paged", "sequences")
def _(m: Make, N: int) -> Call:
    return _paged(m, PACKED_TOKENS, N)


@case("chunk_gated_delta_rule_paged", "write-slots-raw-gates")
def _(m: Make, T: int) -> Call:
    (q, k, v, *_), offsets = m.packed(T)
    reads, out = m.slots(SEQUENCES), m.columns(T, m.sizes.HV, m.sizes.V)[None]
    args = q, k, v, *(x[None] for x in m.raw(T)), m.pool(2 * SLOTS, dtype=m.dtype), out, reads, offsets
    options = {"write_indices": m.slots(SEQUENCES, first=SLOTS), **L2, **m.gate_parameters()}
    return Call("chunk_gated_delta_rule_paged", "", args, options)


@case("chunk_gated_delta_rule_paged_checkpoints", "tokens")
def _(m: Make, T: int) -> Call:
    call = _paged(m, T, SEQUENCES)
    *inputs, state, out, slots, offsets = call.args
    rows = m.integers([0, 1, 3, 3, 6])
    args = *inputs, state, out, m.pool(SLOTS), slots, offsets, rows
    return Call("chunk_gated_delta_rule_paged_checkpoints", "", args, {**call.kwargs, "checkpoint_interval": 64})


@case("recurrent_gated_delta_rule_paged", "rows")
def _(m: Make, N: int) -> Call:
    args = *m.delta(N, 1), m.pool(dtype=m.dtype), m.slots(N)
    return Call("recurrent_gated_delta_rule_paged", "", args, dict(L2))


@case("recurrent_gated_delta_rule_paged", "tokens")
def _(m: Make, T: int) -> Call:
    inputs, offsets = m.packed(T)
    options = {
        "cu_seqlens": offsets,
        "write_indices": m.slots(SEQUENCES, first=SLOTS),
        "has_initial_state": m.flags(SEQUENCES),
        **L2,
    }
    args = *inputs, m.pool(2 * SLOTS), m.slots(SEQUENCES)
    return Call("recurrent_gated_delta_rule_paged", "", args, options)


@case("recurrent_gated_delta_rule_paged", "slot-per-token")
def _(m: Make, N: int) -> Call:
    rows = m.slots(N)[:, None]
    table = torch.where(rows >= 0, rows * DRAFTS + m.integers(list(range(DRAFTS))), -1).to(torch.int32)
    args = *m.delta(N, DRAFTS), m.pool(SLOTS * DRAFTS), table
    return Call("recurrent_gated_delta_rule_paged", "", args, {"num_accepted_tokens": m.accepted(N), **L2})


@case("recurrent_gated_delta_rule_paged", "packed-rows")
def _(m: Make, N: int) -> Call:
    *qkv, g, beta = m.delta(1, N * DRAFTS)
    table = torch.full((N, DRAFTS), -1, dtype=torch.int32, device=m.device)
    table[:, 0] = m.slots(N)
    options = {"tokens_per_row": DRAFTS, **L2}
    return Call("recurrent_gated_delta_rule_paged", "", (*qkv, g[0], beta[0], m.pool(), table), options)


@case("recurrent_gated_delta_rule_paged", "rounded-tokens")
def _(m: Make, T: int) -> Call:
    inputs, offsets = m.packed(T)
    args = *inputs, m.pool(dtype=torch.bfloat16), m.slots(SEQUENCES)
    return Call("recurrent_gated_delta_rule_paged", "", args, {"cu_seqlens": offsets, "rounding_seed": m.seed(), **L2})


@case("recurrent_gated_delta_rule_verify", "rows")
def _(m: Make, N: int) -> Call:
    args = *m.delta(N, DRAFTS), m.pool(), m.pool(SLOTS, DRAFTS), m.slots(N)
    options = {"intermediate_indices": m.slots(N), "parents": m.parents(N), **L2}
    return Call("recurrent_gated_delta_rule_verify", "", args, options)


@case("recurrent_gated_delta_rule_verify", "packed-rows")
def _(m: Make, N: int) -> Call:
    args = *m.delta(1, N * DRAFTS), m.pool(), m.pool(SLOTS, DRAFTS), m.slots(N)
    options = {"intermediate_indices": m.slots(N), "parents": m.parents(N), "tokens_per_row": DRAFTS, **L2}
    return Call("recurrent_gated_delta_rule_verify", "", args, options)


@case("recurrent_gated_delta_rule_verify", "tokens")
def _(m: Make, T: int) -> Call:
    inputs, offsets = m.packed(T)
    args = *inputs, m.pool(), m.pool(SLOTS, DRAFTS), m.slots(SEQUENCES)
    options = {"cu_seqlens": offsets, "has_initial_state": m.flags(SEQUENCES), **L2}
    return Call("recurrent_gated_delta_rule_verify", "", args, options)


@case("recurrent_gated_delta_rule_verify", "rounded-tree")
def _(m: Make, N: int) -> Call:
    args = *m.delta(N, DRAFTS), m.pool(), m.pool(SLOTS, DRAFTS, dtype=torch.float16), m.slots(N)
    options = {"intermediate_indices": m.slots(N), "parents": m.parents(N), "rounding_seed": m.seed(), **L2}
    return Call("recurrent_gated_delta_rule_verify", "", args, options)


@case("packed_decode", "rows")
def _(m: Make, N: int) -> Call:
    args = m.columns(N, m.sizes.D), *m.raw(N), *m.gate_parameters().values(), m.pool(dtype=m.dtype), m.slots(N)
    return Call("packed_decode", "", args, {"num_k_heads": m.sizes.H})


@case("packed_decode_out", "rows")
def _(m: Make, N: int) -> Call:
    s = m.sizes
    args = m.columns(N, s.D), *m.raw(N), *m.gate_parameters().values(), m.pool(dtype=m.dtype), m.normal(N, s.HV, s.V)
    return Call("packed_decode_out", "", (*args, m.slots(N)), {"num_k_heads": s.H})


def _step(m: Make, N: int, operator: str, V: int) -> Call:
    m = Make(dataclasses.replace(m.sizes, V=V), m.device, m.dtype, m.random.randrange(1 << 30))
    s = m.sizes
    args = (
        m.columns(N, s.D),
        *m.raw(N),
        m.columns(N, s.HV, s.V),
        *m.conv_parameters(),
        m.conv_pool(s.W - 1),
        *m.gate_parameters().values(),
        m.pool(dtype=m.dtype),
        m.normal(s.V),
        m.slots(N),
    )
    return Call(operator, "", args, {"num_k_heads": s.H, "norm_before_gate": True})


@case("decode_step", "rows")
def _(m: Make, N: int) -> Call:
    return _step(m, N, "decode_step", m.sizes.V)


@case("decode_step_fp8", "rows")
def _(m: Make, N: int) -> Call:
    return _step(m, N, "decode_step_fp8", 128)


@case("packed_decode", "rounded-rows")
def _(m: Make, N: int) -> Call:
    pool = m.pool(dtype=torch.bfloat16)
    args = m.columns(N, m.sizes.D), *m.raw(N), *m.gate_parameters().values(), pool, m.slots(N)
    return Call("packed_decode", "", args, {"num_k_heads": m.sizes.H, "rounding_seed": m.seed()})


def make(
    name: str, count: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0, sizes: Sizes = CPU
) -> Call:
    """The call ``name`` with its varying dimension at ``count``; the same seed gives the same tensors."""
    return CASES[name](Make(sizes, device, dtype, seed), count)


def results(found: Any) -> list[torch.Tensor]:
    """What an operator returned, as a list."""
    return [] if found is None else list(found) if isinstance(found, (tuple, list)) else [found]


def outcome(call: Call, found: Any) -> list[torch.Tensor]:
    """Copies of what a call returned and of every tensor it was given, which it may have written."""
    return [x.clone() for x in (*results(found), *call.tensors)]


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of floats as integers, so that NaN equals itself and 0.0 is not -0.0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()]) if x.is_floating_point() else x


def assert_same_bits(found: list[torch.Tensor], wanted: list[torch.Tensor], what: str) -> None:
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: tensor {index} has another shape or dtype"
        if not torch.equal(bits(a), bits(b)):
            different = bits(a) != bits(b)
            first = different.nonzero()[0].tolist()
            raise AssertionError(
                f"{what}: {int(different.sum())} of {a.numel()} elements of tensor {index} differ, first at {first}: "
                f"{a[tuple(first)].item()!r} against {b[tuple(first)].item()!r}"
            )
