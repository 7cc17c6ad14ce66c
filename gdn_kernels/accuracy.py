"""Every operator against plain PyTorch in fp64, on random inputs of a model's shapes: the demo's table of errors.

The formulas are written out here a second time, apart from the package's own CPU implementation, so that this compares
the operators with something that shares no code with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gdn_kernels import graphs, launch

Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # (what the operator gave, what plain fp64 gives)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()


def relative_error(pairs: Pairs) -> float:
    """The largest error over the largest value, of the worst output; infinite if anything is not a number."""
    worst = 0.0
    for actual, expected in pairs:
        if actual.shape != expected.shape:
            return math.inf
        error = (wide(actual) - expected).abs().max().item()
        worst = max(worst, error / max(expected.abs().max().item(), 1e-30) if error else 0.0)
        if math.isnan(error):
            return math.inf
    return worst


def fp64_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, rms: bool) -> torch.Tensor:
    if not rms:
        x = x - x.mean(dim=-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight
    return y if bias is None else y + bias


def fp64_conv(x: torch.Tensor, weight: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence ``[T, D]`` after ``window`` ``[D, W-1]``: outputs, and each token's window ``[T, D, W-1]``."""
    columns = torch.cat([window, x.t()], dim=1)
    y = F.silu(F.conv1d(columns[None], weight[:, None], groups=len(weight))[0].t())
    return y, columns.unfold(1, window.shape[1], 1)[:, 1:].transpose(0, 1)


def fp64_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One sequence, token by token: outputs, and the state after 0, 1, ... tokens at multiples of 64 and the end."""
    ratio = v.shape[1] // q.shape[1]
    q, k = (x / torch.sqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(ratio, dim=1) for x in (q, k))
    o, kept = torch.zeros_like(v), []
    for t in range(len(v)):
        state = state * g[t].exp()[:, None, None]
        error = v[t] - torch.einsum("hvk,hk->hv", state, k[t])
        state = state + torch.einsum("h,hv,hk->hvk", beta[t], error, k[t])
        o[t] = torch.einsum("hvk,hk->hv", state, q[t]) * q.shape[-1] ** -0.5
        if (t + 1) % 64 == 0:
            kept.append(state)
    return o, [*kept, state]


class OperatorChecks:
    """Random inputs for every operator, and what plain PyTorch in fp64 makes of them."""

    LENGTHS = (1, 63, 0, 86)  # a packed batch with an empty sequence; two padded tokens follow
    SLOTS = (5, 2, 7, 0)
    HAS_STATE = (True, False, True, True)
    NUM_SLOTS, STEPS = 8, 3  # slots of the pools, tokens a row for decode and verify

    def __init__(self, shape: launch.ModelShapes, device: torch.device) -> None:
        self.shape, self.device, self.dtype = shape, device, shape.dtype
        self.generator = torch.Generator().manual_seed(0)
        HV, K, V = shape.num_v_heads, shape.head_k_dim, shape.head_v_dim
        self.D, self.T = shape.conv_channels, sum(self.LENGTHS) + 2
        self.N = len(self.LENGTHS)
        self.mixed, self.z = self.random(self.T, self.D), self.random(self.T, HV, V)
        self.a, self.b = self.random(self.T, HV), self.random(self.T, HV)
        self.A_log, self.dt_bias = (self.random(HV, dtype=torch.float32) for _ in range(2))
        self.weight = self.random(self.D, self.shape.conv_width)
        self.norm_weight, self.norm_bias = self.random(V), self.random(V)
        self.conv_pool = self.random(self.NUM_SLOTS, self.D, self.shape.conv_width - 1)
        self.pool = self.random(self.NUM_SLOTS, HV, V, K, dtype=torch.float32)
        self.slots = torch.tensor(self.SLOTS, dtype=torch.int32, device=device)
        self.has_state = torch.tensor(self.HAS_STATE, device=device)
        offsets = [sum(self.LENGTHS[:n]) for n in range(self.N + 1)]
        self.offsets, self.cu_seqlens = offsets, torch.tensor(offsets, dtype=torch.int32, device=device)
        self.rows = self.N * self.STEPS  # tokens that decode and verify take, STEPS a row
        self.gates = {"use_qk_l2norm": True, "A_log": self.A_log, "dt_bias": self.dt_bias}
        self.expect()

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def split(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Strided views of ``[..., D]``, as an engine's projections give them."""
        s = self.shape
        q, k, v = mixed.split(
            [s.num_k_heads * s.head_k_dim, s.num_k_heads * s.head_k_dim, s.num_v_heads * s.head_v_dim], dim=-1
        )
        return (
            q.unflatten(-1, (s.num_k_heads, s.head_k_dim)),
            k.unflatten(-1, (s.num_k_heads, s.head_k_dim)),
            v.unflatten(-1, (s.num_v_heads, s.head_v_dim)),
        )

    def expect(self) -> None:
        """Everything that several operators share, computed once."""
        self.g64 = -wide(self.A_log).exp() * F.softplus(wide(self.a) + wide(self.dt_bias))
        self.beta64 = wide(self.b).sigmoid()
        self.o64 = torch.zeros(self.z.shape, dtype=torch.float64)
        self.final64, self.checkpoints64 = [], []
        for n, (start, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            initial = wide(self.pool[self.SLOTS[n]]) * self.HAS_STATE[n]
            self.o64[start:end], kept = self.delta(wide(self.mixed[start:end]), slice(start, end), initial)
            self.final64.append(kept[-1])
            self.checkpoints64 += kept[: (end - start) // 64]
        # The same tokens again as rows of STEPS tokens, each row starting from its slot.
        self.row_o64, self.row_states64 = [], []
        for n in range(self.N):
            state, start = wide(self.pool[self.SLOTS[n]]), n * self.STEPS
            for t in range(start, start + self.STEPS):
                o, kept = self.delta(wide(self.mixed[t : t + 1]), slice(t, t + 1), state)
                state = kept[-1]
                self.row_o64.append(o[0])
                self.row_states64.append(state)

    def delta(self, mixed: torch.Tensor, at: slice, state: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return fp64_delta_rule(*self.split(mixed), self.g64[at], self.beta64[at], state)

    def stacked(self, row_values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(row_values).unflatten(0, (self.N, self.STEPS))

    def pool64(self, finals: list[torch.Tensor], nonempty_only: bool = True) -> torch.Tensor:
        """The pool with each sequence's final state in its slot."""
        pool = wide(self.pool)
        for n, final in enumerate(finals):
            if self.LENGTHS[n] or not nonempty_only:
                pool[self.SLOTS[n]] = final
        return pool

    def as_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: self.rows].unflatten(0, (self.N, self.STEPS))

    # One method an operator, by its name.

    def layer_norm_gated(self) -> Pairs:
        x = self.split(self.mixed)[2]
        y = torch.ops.gdn.layer_norm_gated(x, self.norm_weight, None, self.z, norm_before_gate=True)
        expected = fp64_norm(wide(x), wide(self.norm_weight), None, rms=True) * F.silu(wide(self.z))
        return [(y, expected)]

    def layer_norm_gated_out(self) -> Pairs:
        x = self.split(self.mixed)[2]
        out = torch.empty_like(self.z)
        torch.ops.gdn.layer_norm_gated_out(
            x, self.norm_weight, self.norm_bias, self.z, out, norm_before_gate=False, is_rms_norm=False
        )
        gated = wide(x) * F.silu(wide(self.z))
        return [(out, fp64_norm(gated, wide(self.norm_weight), wide(self.norm_bias), rms=False))]

    def layer_norm_gated_fp8(self) -> Pairs:
        x = self.split(self.mixed)[2]
        values, scales = torch.ops.gdn.layer_norm_gated_fp8(x, self.norm_weight, None, self.z, norm_before_gate=True)
        expected = fp64_norm(wide(x), wide(self.norm_weight), None, rms=True) * F.silu(wide(self.z))
        y = (wide(values).view(*scales.shape, 128) * wide(scales)[..., None]).view(x.shape)
        return [(y, expected), (scales, expected.view(*scales.shape, 128).abs().amax(-1) / 448)]

    def l2norm(self) -> Pairs:
        q = self.split(self.mixed)[0]
        expected = wide(q) / torch.sqrt(wide(q).square().sum(dim=-1, keepdim=True) + 1e-6)
        return [(torch.ops.gdn.l2norm(q), expected)]

    def gating(self) -> Pairs:
        g, beta = torch.ops.gdn.gating(self.a, self.b, self.A_log, self.dt_bias)
        return [(g, self.g64), (beta, self.beta64)]

    def split_qkvz_ba(self) -> Pairs:
        s, r = self.shape, self.shape.num_v_heads // self.shape.num_k_heads
        sizes = [s.head_k_dim, s.head_k_dim, r * s.head_v_dim, r * s.head_v_dim]
        qkvz, ba = self.random(self.T, s.num_k_heads * sum(sizes)), self.random(self.T, s.num_k_heads * 2 * r)
        outputs = torch.ops.gdn.split_qkvz_ba(
            qkvz,
            ba,
            num_k_heads=s.num_k_heads,
            num_v_heads=s.num_v_heads,
            head_k_dim=s.head_k_dim,
            head_v_dim=s.head_v_dim,
        )
        q, k, v, z = wide(qkvz).unflatten(1, (s.num_k_heads, -1)).split(sizes, dim=-1)
        b, a = wide(ba).unflatten(1, (s.num_k_heads, -1)).split(r, dim=-1)
        mixed = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)
        z = z.reshape(self.T, s.num_v_heads, s.head_v_dim)
        return list(zip(outputs, (mixed, z, b.flatten(1), a.flatten(1)), strict=True))

    def causal_conv1d(self) -> Pairs:
        pool = self.conv_pool.clone()
        y = torch.ops.gdn.causal_conv1d(
            self.mixed,
            self.weight,
            None,
            pool,
            self.cu_seqlens,
            state_indices=self.slots,
            has_initial_state=self.has_state,
        )
        y64, pool64 = self.conv64(wide(self.mixed), wide(self.weight), wide(self.conv_pool))
        return [(y, y64), (pool, pool64)]

    def conv64(
        self, mixed: torch.Tensor, weight: torch.Tensor, pool: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, pool = torch.zeros_like(mixed), pool.clone()
        for n, (start, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            if end > start:
                slot = self.SLOTS[n]
                y[start:end], windows = fp64_conv(mixed[start:end], weight, pool[slot] * self.HAS_STATE[n])
                pool[slot] = windows[-1]
        return y, pool

    def conv_rows64(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, weight = self.as_rows(wide(self.mixed)), wide(self.weight)
        found = [fp64_conv(rows[n], weight, wide(self.conv_pool[self.SLOTS[n]])) for n in range(self.N)]
        return torch.stack([y for y, _ in found]), torch.stack([windows for _, windows in found])

    def causal_conv1d_update(self) -> Pairs:
        pool = self.conv_pool.clone()
        y = torch.ops.gdn.causal_conv1d_update(
            self.as_rows(self.mixed), self.weight, None, pool, state_indices=self.slots
        )
        y64, windows = self.conv_rows64()
        pool64 = wide(self.conv_pool)
        pool64[list(self.SLOTS)] = windows[:, -1]
        return [(y, y64), (pool, pool64)]

    def causal_conv1d_verify(self) -> Pairs:
        windows = torch.zeros(
            self.N, self.STEPS, self.D, self.shape.conv_width - 1, dtype=self.dtype, device=self.device
        )
        y = torch.ops.gdn.causal_conv1d_verify(
            self.as_rows(self.mixed), self.weight, None, self.conv_pool, windows, state_indices=self.slots
        )
        y64, windows64 = self.conv_rows64()
        return [(y, y64), (windows, windows64)]

    def functional(self, operator: Callable[..., Any]) -> Pairs:
        q, k, v = self.split(self.mixed[None])
        initial = self.pool[self.slots.long()] * self.has_state[:, None, None, None]
        o, final = operator(
            q, k, v, self.a[None], self.b[None], initial_state=initial, cu_seqlens=self.cu_seqlens, **self.gates
        )
        return [(o[0], self.o64), (final, torch.stack(self.final64))]

    def chunk_gated_delta_rule(self) -> Pairs:
        return self.functional(torch.ops.gdn.chunk_gated_delta_rule)

    def recurrent_gated_delta_rule(self) -> Pairs:
        return self.functional(torch.ops.gdn.recurrent_gated_delta_rule)

    def chunk_gated_delta_rule_paged(self) -> Pairs:
        pool, out = self.pool.clone(), torch.empty_like(self.z[None])
        torch.ops.gdn.chunk_gated_delta_rule_paged(
            *self.split(self.mixed[None]),
            self.a[None],
            self.b[None],
            pool,
            out,
            self.slots,
            self.cu_seqlens,
            has_initial_state=self.has_state,
            **self.gates,
        )
        return [(out[0], self.o64), (pool, self.pool64(self.final64))]

    def chunk_gated_delta_rule_paged_checkpoints(self) -> Pairs:
        pool, out = self.pool.clone(), torch.empty_like(self.z[None])
        offsets = [sum(length // 64 for length in self.LENGTHS[:n]) for n in range(self.N + 1)]
        checkpoints = torch.zeros(offsets[-1], *self.pool.shape[1:], device=self.device)
        torch.ops.gdn.chunk_gated_delta_rule_paged_checkpoints(
            *self.split(self.mixed[None]),
            self.a[None],
            self.b[None],
            pool,
            out,
            checkpoints,
            self.slots,
            self.cu_seqlens,
            torch.tensor(offsets, dtype=torch.int32, device=self.device),
            checkpoint_interval=64,
            has_initial_state=self.has_state,
            **self.gates,
        )
        return [
            (out[0], self.o64),
            (pool, self.pool64(self.final64)),
            (checkpoints, torch.stack(self.checkpoints64)),
        ]

    def recurrent_gated_delta_rule_paged(self) -> Pairs:
        pool = self.pool.clone()
        o = torch.ops.gdn.recurrent_gated_delta_rule_paged(
            *self.split(self.as_rows(self.mixed)),
            self.as_rows(self.a),
            self.as_rows(self.b),
            pool,
            self.slots,
            **self.gates,
        )
        finals = self.row_states64[self.STEPS - 1 :: self.STEPS]
        return [(o, self.stacked(self.row_o64)), (pool, self.pool64(finals, nonempty_only=False))]

    def recurrent_gated_delta_rule_verify(self) -> Pairs:
        states = torch.zeros(self.N, self.STEPS, *self.pool.shape[1:], device=self.device)
        o = torch.ops.gdn.recurrent_gated_delta_rule_verify(
            *self.split(self.as_rows(self.mixed)),
            self.as_rows(self.a),
            self.as_rows(self.b),
            self.pool,
            states,
            self.slots,
            **self.gates,
        )
        return [(o, self.stacked(self.row_o64)), (states, self.stacked(self.row_states64))]

    def packed_decode(self) -> Pairs:
        return self.decoded(torch.ops.gdn.packed_decode)

    def packed_decode_out(self) -> Pairs:
        def into(*arguments: Any, **options: Any) -> torch.Tensor:
            *inputs, slots = arguments
            out = torch.empty_like(self.z[: self.rows : self.STEPS], memory_format=torch.contiguous_format)
            torch.ops.gdn.packed_decode_out(*inputs, out, slots, **options)
            return out

        return self.decoded(into)

    def decoded(self, operator: Callable[..., torch.Tensor]) -> Pairs:
        pool, first = self.pool.clone(), slice(0, self.rows, self.STEPS)  # each row's first token
        o = operator(
            self.mixed[first],
            self.a[first],
            self.b[first],
            self.A_log,
            self.dt_bias,
            pool,
            self.slots,
            num_k_heads=self.shape.num_k_heads,
        )
        return [
            (o, torch.stack(self.row_o64[:: self.STEPS])),
            (pool, self.pool64(self.row_states64[:: self.STEPS], nonempty_only=False)),
        ]

    def step(self, operator: Callable[..., Any]) -> tuple[Any, torch.Tensor, Pairs]:
        """What ``operator`` returned for each row's first token, what it should be, and the pools with theirs."""
        first, conv_pool, pool = slice(0, self.rows, self.STEPS), self.conv_pool.clone(), self.pool.clone()
        found = operator(
            self.mixed[first],
            self.a[first],
            self.b[first],
            self.z[first],
            self.weight,
            None,
            conv_pool,
            self.A_log,
            self.dt_bias,
            pool,
            self.norm_weight,
            self.slots,
            num_k_heads=self.shape.num_k_heads,
            norm_before_gate=True,
        )
        y64, windows = self.conv_rows64()
        conv64, pool64, o64 = wide(self.conv_pool), wide(self.pool), []
        conv64[list(self.SLOTS)] = windows[:, 0]
        for n, slot in enumerate(self.SLOTS):
            at = slice(n * self.STEPS, n * self.STEPS + 1)
            o, kept = self.delta(y64[n, :1], at, pool64[slot])
            o64.append(o[0])
            pool64[slot] = kept[-1]
        normed = fp64_norm(torch.stack(o64), wide(self.norm_weight), None, rms=True)
        return found, normed * F.silu(wide(self.z[first])), [(conv_pool, conv64), (pool, pool64)]

    def decode_step(self) -> Pairs:
        y, expected, pools = self.step(torch.ops.gdn.decode_step)
        return [(y, expected), *pools]

    def decode_step_fp8(self) -> Pairs:
        (values, scales), expected, pools = self.step(torch.ops.gdn.decode_step_fp8)
        y = (wide(values).view(*scales.shape, 128) * wide(scales)[..., None]).view(expected.shape)
        return [(y, expected), (scales, expected.view(*scales.shape, 128).abs().amax(-1) / 448), *pools]

    def linear_attention_with_output(self) -> Pairs:
        state = graphs.LayerState(
            num_k_heads=self.shape.num_k_heads,
            conv_weight=self.weight,
            conv_bias=None,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            conv_state=self.conv_pool.clone(),
            recurrent_state=self.pool.clone(),
        )
        batch = graphs.BatchMetadata(self.slots, cu_seqlens=self.cu_seqlens, has_initial_state=self.has_state)
        out = torch.empty_like(self.z)
        with graphs.forward_context({0: state}, batch):
            torch.ops.gdn.linear_attention_with_output(self.mixed, self.a, self.b, out, 0)
        y64, conv64 = self.conv64(wide(self.mixed), wide(self.weight), wide(self.conv_pool))
        o64, pool64 = torch.zeros_like(self.o64), wide(self.pool)
        for n, (start, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            if end > start:
                initial = pool64[self.SLOTS[n]] * self.HAS_STATE[n]
                at = slice(start, end)
                o64[at], kept = self.delta(y64[at], at, initial)
                pool64[self.SLOTS[n]] = kept[-1]
        return [(out, o64), (state.conv_state, conv64), (state.recurrent_state, pool64)]

    def budget(self, operator: str) -> float:
        """The relative error that rounding explains."""
        if operator == "split_qkvz_ba":
            return 0.0  # moves values, computes nothing
        if operator.endswith("_fp8"):
            return 16 / 448 + 2.0**-8  # half the spacing of e4m3 at 448, to which the largest of a group is scaled
        if self.dtype is torch.float32:
            return 5e-6  # fp32 sums of up to 128 products, over up to 86 dependent steps
        if operator == "gating":
            return 1e-5  # bf16 in, fp32 out
        if operator.startswith(("chunk", "linear_attention")):
            return 2e-2  # operands of matrix products rounded to 16 bits
        if operator == "decode_step":
            return 3 * 2.0**-8  # the outputs of conv, recurrence and norm are rounded to bf16
        return 2.0**-8  # one rounding of the output to bf16
