"""Calls of the serving engines' own functions, on the shapes of a model: for their tests and for their bench.

A case names a place that a plugin replaces, builds its arguments, and says which results count: rows of padding are not
compared, because engines leave them as they are. The oracle is the plugin's adapter on fp64 copies, which runs the
references; that the engine's function agrees with it as well shows that both mean the same by their arguments.
"""

from __future__ import annotations

import dataclasses
import pkgutil
import types
from collections.abc import Callable
from typing import Any

import torch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Results = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Heads and sizes of one rank."""

    H: int
    HV: int
    K: int = 128
    V: int = 128
    W: int = 4

    @property
    def channels(self) -> int:
        return 2 * self.H * self.K + self.HV * self.V


QWEN3_NEXT = Shapes(16, 32)
SMALL = Shapes(1, 2, 64, 64)


class Inputs:
    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def tensor(self, values: list[Any], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, device=self.device, dtype=dtype)

    def offsets(self, lengths: list[int]) -> torch.Tensor:
        return self.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])

    def gates(self, shapes: Shapes, tokens: int) -> dict[str, torch.Tensor]:
        """a and b as columns of one projection, A_log and dt_bias."""
        ba = self.normal(tokens, 2 * shapes.HV)
        return {
            "a": ba[:, shapes.HV :],
            "b": ba[:, : shapes.HV],
            "A_log": self.normal(shapes.HV, dtype=torch.float32) * 0.5,
            "dt_bias": self.normal(shapes.HV, dtype=torch.float32) * 0.5,
        }

    def qkv(self, shapes: Shapes, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.normal(1, tokens, shapes.channels).split(
            [shapes.H * shapes.K, shapes.H * shapes.K, shapes.HV * shapes.V], dim=-1
        )
        return (
            q.unflatten(-1, (shapes.H, shapes.K)),
            k.unflatten(-1, (shapes.H, shapes.K)),
            v.unflatten(-1, (shapes.HV, shapes.V)),
        )

    def pool(self, shapes: Shapes, slots: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.normal(slots, shapes.HV, shapes.V, shapes.K, dtype=dtype) * 0.1

    def windows(self, shapes: Shapes, slots: int, columns: int) -> torch.Tensor:
        return self.normal(slots, columns, shapes.channels).transpose(1, 2)


@dataclasses.dataclass(frozen=True)
class EngineCase:
    """place: the dotted path. arguments: of one call. results: what counts of the arguments and what came back."""

    place: str
    name: str
    arguments: Callable[[Inputs], Arguments]
    results: Callable[[Arguments, Any], Results]
    needs_gpu: bool = False
    exact: bool = False  # a split: nothing is computed
    waits: bool = False  # the engine's function waits for the GPU, so it cannot be captured

    @property
    def id(self) -> str:
        return f"{self.place.rpartition('.')[2]}-{self.name}"


def copied(value: Any, like: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Any:
    """The same arguments in memory of their own, tensors with their strides, after ``like``."""
    if isinstance(value, torch.Tensor):
        if value.dim() == 0:
            return like(value).clone()
        size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True) if n > 1)
        new = like(torch.empty(max(size, 1), dtype=value.dtype, device=value.device))
        return new.as_strided(value.shape, value.stride()).copy_(like(value))
    if isinstance(value, tuple | list):
        return type(value)(copied(item, like) for item in value)
    if isinstance(value, dict):
        return {name: copied(item, like) for name, item in value.items()}
    return value


def to_oracle(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().cpu() if tensor.is_floating_point() else tensor.cpu()


def relative_error(result: torch.Tensor, oracle: torch.Tensor) -> float:
    """``‖result - oracle‖ / ‖oracle‖`` in fp64."""
    norm = oracle.norm().item()
    return (result.detach().double().cpu() - oracle).norm().item() / (norm or 1.0)


def errors(case: EngineCase, call: Callable[..., Any], arguments: Arguments, oracle: Results) -> dict[str, float]:
    """Each result's error of ``call`` on a copy of ``arguments``."""
    mine = copied(arguments)
    results = case.results(mine, call(*mine[0], **mine[1]))
    return {name: relative_error(result, oracle[name]) for name, result in results.items()}


def oracle(case: EngineCase, adapter: Callable[..., Any], arguments: Arguments) -> Results:
    """What the adapter gives in fp64."""
    exact = copied(arguments, to_oracle)
    returned = adapter(*exact[0], **exact[1])
    if isinstance(returned, str):
        raise RuntimeError(f"{case.id}: left to the engine: {returned}")
    return case.results(exact, returned)


def first_result(arguments: Arguments, returned: Any) -> Results:
    return {"y": returned[0] if isinstance(returned, tuple) else returned}


def named(*names: str) -> Callable[[Arguments, Any], Results]:
    return lambda arguments, returned: dict(zip(names, returned, strict=True))


def with_state(name: str, slots: list[int], rows: slice | None = None) -> Callable[[Arguments, Any], Results]:
    """The output, and of the state argument ``name`` the slots of real rows."""

    def results(arguments: Arguments, returned: Any) -> Results:
        y = returned[0] if isinstance(returned, tuple) else returned
        return {"y": y if rows is None else y[rows], "state": arguments[1][name][slots]}

    return results


# ---------------------------------------------------------------------------------------------------------------
# Cases that both engines have
# ---------------------------------------------------------------------------------------------------------------


def norm_rows(shapes: Shapes, tokens: int) -> Callable[[Inputs], Arguments]:
    def arguments(inputs: Inputs) -> Arguments:
        x, z = inputs.normal(tokens * shapes.HV, shapes.V), inputs.normal(tokens * shapes.HV, shapes.V)
        weight = 1 + 0.1 * inputs.normal(shapes.V)
        return (x, weight, None, 1e-6), {"z": z, "is_rms_norm": True, "norm_before_gate": True}

    return arguments


def packed_decode(shapes: Shapes, slots: list[int], padding: int, state: torch.dtype) -> Callable[[Inputs], Arguments]:
    def arguments(inputs: Inputs) -> Arguments:
        indices = [*slots, padding]
        rows = len(indices)
        return (), {
            "mixed_qkv": inputs.normal(rows, shapes.channels),
            **inputs.gates(shapes, rows),
            "scale": shapes.K**-0.5,
            "initial_state": inputs.pool(shapes, 2 * rows + 2, state),
            "out": inputs.normal(rows, 1, shapes.HV, shapes.V),
            "ssm_state_indices": inputs.tensor(indices),
            "use_qk_l2norm_in_kernel": True,
        }

    return arguments


def decode_slots(count: int) -> list[int]:
    """Every other slot from 1 on, in no order."""
    return [1 + 2 * ((7 * i) % count if count % 7 else i) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------
# SGLang
# ---------------------------------------------------------------------------------------------------------------

_SGLANG_FLA = "sglang.kernels.ops.attention.fla"
_SGLANG_LINEAR = "sglang.kernels.ops.attention.linear"
_SGLANG_SPLIT = "sglang.kernels.ops.attention.triton_gdn_fused_proj"
_SGLANG_CONV = "sglang.kernels.ops.mamba.causal_conv1d_triton"
_SGLANG_KERNEL = "sglang.srt.layers.attention.linear.kernels.gdn_triton.TritonGDNKernel"


def sglang_cases(shapes: Shapes, rows: tuple[int, ...], prompts: tuple[tuple[int, ...], ...]) -> list[EngineCase]:
    """The places of the SGLang plugin: ``rows`` of a decode step, ``prompts`` as lists of lengths."""
    found = []
    for count in rows:
        found += _sglang_rows(shapes, count)
    for lengths in prompts:
        found += _sglang_prompts(shapes, list(lengths))
    return found


def _sglang_rows(shapes: Shapes, count: int) -> list[EngineCase]:
    slots, drafts = decode_slots(count), 4
    keys, values = shapes.H * shapes.K, shapes.HV * shapes.V

    def fused_norm(inputs: Inputs) -> Arguments:
        wide = inputs.normal(count, values + 64)
        g = wide[:, 64:].unflatten(1, (shapes.HV, shapes.V))
        x = inputs.normal(count * shapes.HV, shapes.V)
        return (x, g, 1 + 0.1 * inputs.normal(shapes.V), None), {"activation": "silu"}

    def interleaved(inputs: Inputs) -> Arguments:
        qkvz = inputs.normal(count, 2 * keys + 2 * values)
        return (qkvz, inputs.normal(count, 2 * shapes.HV), shapes.H, shapes.HV, shapes.K, shapes.V), {}

    def conv_update(inputs: Inputs) -> Arguments:
        return (), {
            "x": inputs.normal(count, shapes.channels),
            "conv_state": inputs.windows(shapes, 2 * count + 2, shapes.W - 1),
            "weight": inputs.normal(shapes.channels, shapes.W) * 0.5,
            "activation": "silu",
            "conv_state_indices": inputs.tensor(slots),
        }

    def conv_drafts(inputs: Inputs) -> Arguments:
        windows = inputs.normal(count, drafts, shapes.W - 1, shapes.channels).transpose(2, 3)
        return (), {
            "x": inputs.normal(count, drafts, shapes.channels).transpose(1, 2),
            "conv_state": inputs.windows(shapes, 2 * count + 2, shapes.W - 1),
            "weight": inputs.normal(shapes.channels, shapes.W) * 0.5,
            "activation": "silu",
            "conv_state_indices": inputs.tensor(slots),
            "intermediate_conv_window": windows,
            "intermediate_state_indices": inputs.tensor(list(range(count))),
        }

    def projected(inputs: Inputs) -> Arguments:
        return (), {
            "mixed_qkvz": inputs.normal(count, shapes.channels + values),
            "mixed_ba": inputs.normal(count, 2 * shapes.HV),
            "conv_state": inputs.windows(shapes, 2 * count + 2, shapes.W - 1),
            "conv_weight": inputs.normal(shapes.channels, shapes.W) * 0.5,
            "conv_bias": None,
            "conv_state_indices": inputs.tensor(slots),
            "qkv_dim": shapes.channels,
            "v_dim": values,
            "num_v_heads": shapes.HV,
            "head_v_dim": shapes.V,
            "activation": "silu",
        }

    def sigmoid(inputs: Inputs, tokens: int, **more: Any) -> Arguments:
        q, k, v = inputs.qkv(shapes, count * tokens)
        return (), {
            **inputs.gates(shapes, count * tokens),
            "softplus_beta": 1.0,
            "softplus_threshold": 20.0,
            "q": q,
            "k": k,
            "v": v,
            "initial_state_source": inputs.pool(shapes, 2 * count + 2),
            "initial_state_indices": inputs.tensor(slots),
            "use_qk_l2norm_in_kernel": True,
            "cu_seqlens": inputs.offsets([tokens] * count),
            **more,
        }

    def verify(tree: bool) -> Callable[[Inputs], Arguments]:
        def arguments(inputs: Inputs) -> Arguments:
            parents = inputs.tensor([[0, 0, 0, 1]] * count) if tree else None
            return sigmoid(
                inputs,
                drafts,
                disable_state_update=True,
                intermediate_states_buffer=inputs.normal(
                    count, drafts, shapes.HV, shapes.V, shapes.K, dtype=torch.float32
                ),
                intermediate_state_indices=inputs.tensor(list(range(count))),
                cache_steps=drafts,
                retrieve_parent_token=parents,
            )

        return arguments

    def buffer(name: str) -> Callable[[Arguments, Any], Results]:
        return lambda arguments, y: {"y": y, "kept": arguments[1][name]}

    sigmoid_place = f"{_SGLANG_LINEAR}.fused_sigmoid_gating_recurrent.fused_sigmoid_gating_delta_rule_update"
    return [
        EngineCase(
            f"{_SGLANG_FLA}.layernorm_gated._layer_norm_fwd", f"{count}", norm_rows(shapes, count), first_result
        ),
        EngineCase(f"{_SGLANG_FLA}.fused_norm_gate.rms_norm_gated", f"{count}", fused_norm, first_result),
        EngineCase(
            f"{_SGLANG_SPLIT}.fused_qkvzba_split_reshape_cat",
            f"{count}",
            interleaved,
            named("mixed_qkv", "z", "b", "a"),
            exact=True,
        ),
        EngineCase(
            f"{_SGLANG_SPLIT}.fused_qkvzba_split_reshape_cat_contiguous",
            f"{count}",
            interleaved,
            named("mixed_qkv", "z", "b", "a"),
            exact=True,
        ),
        EngineCase(f"{_SGLANG_CONV}.causal_conv1d_update", f"{count}", conv_update, with_state("conv_state", slots)),
        EngineCase(
            f"{_SGLANG_CONV}.causal_conv1d_update", f"{count}x{drafts}", conv_drafts, buffer("intermediate_conv_window")
        ),
        EngineCase(
            f"{_SGLANG_SPLIT}.fused_qkvzba_causal_conv1d_update_contiguous",
            f"{count}",
            projected,
            with_state("conv_state", slots),
            needs_gpu=True,
        ),
        *(
            EngineCase(
                f"{_SGLANG_FLA}.fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode",
                f"{count}-{str(state).removeprefix('torch.')}",
                packed_decode(shapes, slots, -1, state),
                with_state("initial_state", slots),
            )
            for state in (torch.float32, torch.bfloat16)
        ),
        EngineCase(
            sigmoid_place, f"{count}", lambda inputs: sigmoid(inputs, 1), with_state("initial_state_source", slots)
        ),
        EngineCase(sigmoid_place, f"{count}x{drafts}", verify(False), buffer("intermediate_states_buffer")),
        EngineCase(sigmoid_place, f"{count}x{drafts}-tree", verify(True), buffer("intermediate_states_buffer")),
    ]


def _sglang_prompts(shapes: Shapes, lengths: list[int]) -> list[EngineCase]:
    tokens, count, name = sum(lengths), len(lengths), "+".join(map(str, lengths))
    slots = decode_slots(count)

    def gating(inputs: Inputs) -> Arguments:
        gates = inputs.gates(shapes, tokens)
        return (gates["A_log"], gates["a"], gates["b"], gates["dt_bias"]), {}

    def split(inputs: Inputs) -> Arguments:
        sizes = (shapes.H, shapes.H, shapes.HV, shapes.K, shapes.K, shapes.V)
        return (inputs.normal(tokens, shapes.channels), *sizes), {}

    def conv(inputs: Inputs) -> Arguments:
        fresh = [bool(i % 2) for i in range(count)]
        return (), {
            "x": inputs.normal(tokens, shapes.channels + 8)[:, :-8].transpose(0, 1),
            "weight": inputs.normal(shapes.channels, shapes.W) * 0.5,
            "bias": None,
            "conv_states": inputs.windows(shapes, 2 * count + 2, shapes.W - 1),
            "query_start_loc": inputs.offsets(lengths),
            "seq_lens_cpu": lengths,
            "cache_indices": inputs.tensor(slots),
            "has_initial_state": inputs.tensor(fresh, torch.bool),
        }

    def recurrent(inputs: Inputs) -> Arguments:
        q, k, v = (x.contiguous() for x in inputs.qkv(shapes, tokens))
        return (), {
            "q": q,
            "k": k,
            "v": v,
            "g": -inputs.normal(1, tokens, shapes.HV, dtype=torch.float32).abs(),
            "beta": inputs.normal(1, tokens, shapes.HV, dtype=torch.float32).sigmoid(),
            "initial_state": inputs.pool(shapes, count),
            "output_final_state": True,
            "cu_seqlens": inputs.offsets(lengths),
            "use_qk_l2norm_in_kernel": True,
        }

    def extend(inputs: Inputs) -> Arguments:
        q, k, v = (x.contiguous() for x in inputs.qkv(shapes, tokens))
        kernel = object.__new__(pkgutil.resolve_name(_SGLANG_KERNEL))
        return (kernel, q, k, v), {
            "g": -inputs.normal(1, tokens, shapes.HV, dtype=torch.float32).abs() * 0.2,
            "beta": inputs.normal(1, tokens, shapes.HV, dtype=torch.float32).sigmoid(),
            "ssm_states": inputs.pool(shapes, 2 * count + 2),
            "cache_indices": inputs.tensor(slots),
            "query_start_loc": inputs.offsets(lengths),
        }

    found = [
        EngineCase(f"{_SGLANG_LINEAR}.fused_gdn_gating.fused_gdn_gating", name, gating, named("g", "beta")),
        EngineCase(f"{_SGLANG_SPLIT}.fused_qkv_split_gdn_prefill", name, split, named("q", "k", "v"), exact=True),
        EngineCase(f"{_SGLANG_CONV}.causal_conv1d_fn", name, conv, with_state("conv_states", slots)),
        EngineCase(f"{_SGLANG_KERNEL}.extend", name, extend, with_state("ssm_states", slots), waits=True),
    ]
    if tokens <= 1024:
        found.append(
            EngineCase(
                f"{_SGLANG_FLA}.fused_recurrent.fused_recurrent_gated_delta_rule",
                name,
                recurrent,
                named("y", "state"),
            )
        )
    return found


# ---------------------------------------------------------------------------------------------------------------
# vLLM
# ---------------------------------------------------------------------------------------------------------------

_VLLM_FLA = "vllm.third_party.flash_linear_attention.ops"
_VLLM_CONV = "vllm.model_executor.layers.mamba.ops.causal_conv1d"


def vllm_cases(shapes: Shapes, rows: tuple[int, ...], prompts: tuple[tuple[int, ...], ...]) -> list[EngineCase]:
    """The places of the vLLM plugin: ``rows`` of a decode step, ``prompts`` as lists of lengths."""
    found = []
    for count in rows:
        found += _vllm_rows(shapes, count)
    for lengths in prompts:
        found += _vllm_prompts(shapes, list(lengths))
    return found


def _vllm_rows(shapes: Shapes, count: int) -> list[EngineCase]:
    slots, drafts = decode_slots(count), 4
    table = [[1 + drafts * n + i for i in range(drafts)] for n in range(count)]
    accepted = [1 + n % drafts for n in range(count)]

    def conv_update(inputs: Inputs) -> Arguments:
        return (), {
            "x": inputs.normal(count, shapes.channels),
            "conv_state": inputs.windows(shapes, 2 * count + 2, shapes.W - 1),
            "weight": inputs.normal(shapes.channels, shapes.W) * 0.5,
            "activation": "silu",
            "conv_state_indices": inputs.tensor(slots),
        }

    def conv_drafts(inputs: Inputs) -> Arguments:
        return (), {
            "x": inputs.normal(count * drafts, shapes.channels),
            "conv_state": inputs.windows(shapes, drafts * count + 2, shapes.W - 2 + drafts),
            "weight": inputs.normal(shapes.channels, shapes.W) * 0.5,
            "activation": "silu",
            "conv_state_indices": inputs.tensor(table)[:, 0],
            "num_accepted_tokens": inputs.tensor(accepted),
            "query_start_loc": inputs.offsets([drafts] * count),
            "max_query_len": drafts,
        }

    def sigmoid(inputs: Inputs, tokens: int, **more: Any) -> Arguments:
        q, k, v = (x.contiguous() for x in inputs.qkv(shapes, count * tokens))
        return (), {
            **{name: x.contiguous() for name, x in inputs.gates(shapes, count * tokens).items()},
            "q": q,
            "k": k,
            "v": v,
            "initial_state": inputs.pool(shapes, drafts * count + 2),
            "cu_seqlens": inputs.offsets([tokens] * count),
            "use_qk_l2norm_in_kernel": True,
            **more,
        }

    place = f"{_VLLM_FLA}.fused_sigmoid_gating.fused_sigmoid_gating_delta_rule_update"
    written = [slot for row in table for slot in row]
    return [
        EngineCase(f"{_VLLM_FLA}.layernorm_guard.layer_norm_fwd", f"{count}", norm_rows(shapes, count), first_result),
        EngineCase(f"{_VLLM_CONV}.causal_conv1d_update", f"{count}", conv_update, with_state("conv_state", slots)),
        EngineCase(
            f"{_VLLM_CONV}.causal_conv1d_update",
            f"{count}x{drafts}",
            conv_drafts,
            with_state("conv_state", [row[0] for row in table]),
        ),
        *(
            EngineCase(
                f"{_VLLM_FLA}.fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode",
                f"{count}-{str(state).removeprefix('torch.')}",
                packed_decode(shapes, slots, 0, state),
                with_state("initial_state", slots),
            )
            for state in (torch.float32, torch.bfloat16)
        ),
        EngineCase(
            place,
            f"{count}",
            lambda inputs: sigmoid(inputs, 1, ssm_state_indices=inputs.tensor(slots)),
            with_state("initial_state", slots),
        ),
        EngineCase(
            place,
            f"{count}x{drafts}",
            lambda inputs: sigmoid(
                inputs,
                drafts,
                ssm_state_indices=inputs.tensor(table),
                num_accepted_tokens=inputs.tensor(accepted),
            ),
            with_state("initial_state", written),
        ),
    ]


def _vllm_prompts(shapes: Shapes, lengths: list[int]) -> list[EngineCase]:
    tokens, count, name = sum(lengths), len(lengths), "+".join(map(str, lengths))
    slots, counts = decode_slots(count), [-(-length // 64) for length in lengths]

    def metadata(inputs: Inputs, offsets: torch.Tensor) -> Any:
        """What vLLM's scheduler gives the conv, so that it need not ask the GPU."""
        from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

        names = "nums_dict", "batch_ptr", "token_chunk_offset_ptr"
        found = compute_causal_conv1d_metadata(offsets.cpu(), device=inputs.device)
        return types.SimpleNamespace(**dict(zip(names, found, strict=True)))

    def conv(inputs: Inputs) -> Arguments:
        offsets = inputs.offsets(lengths)
        return (), {
            "x": inputs.normal(tokens, shapes.channels + 8)[:, :-8].transpose(0, 1),
            "weight": inputs.normal(shapes.channels, shapes.W) * 0.5,
            "bias": None,
            "conv_states": inputs.windows(shapes, 2 * count + 2, shapes.W - 1),
            "query_start_loc": offsets,
            "cache_indices": inputs.tensor(slots),
            "has_initial_state": inputs.tensor([bool(i % 2) for i in range(count)], torch.bool),
            "metadata": metadata(inputs, offsets),
        }

    def chunk(inputs: Inputs) -> Arguments:
        q, k, v = (x.contiguous() for x in inputs.qkv(shapes, tokens))
        q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k))
        return (), {
            "q": q,
            "k": k,
            "v": v,
            "g": -inputs.normal(1, tokens, shapes.HV, dtype=torch.float32).abs() * 0.2,
            "beta": inputs.normal(1, tokens, shapes.HV, dtype=torch.float32).sigmoid(),
            "initial_state": inputs.pool(shapes, count),
            "output_final_state": True,
            "cu_seqlens": inputs.offsets(lengths),
            "chunk_indices": inputs.tensor([[n, i] for n, chunks in enumerate(counts) for i in range(chunks)]),
            "chunk_offsets": inputs.offsets(counts),
        }

    return [
        EngineCase(f"{_VLLM_CONV}.causal_conv1d_fn", name, conv, with_state("conv_states", slots)),
        EngineCase(f"{_VLLM_FLA}.chunk.chunk_gated_delta_rule", name, chunk, named("y", "state")),
    ]
