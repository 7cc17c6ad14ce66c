"""What a bench runs: one call of an operator on the shapes of a model, and its check against the reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from gdn_kernels.launch import ModelShapes
from gdn_kernels.ops import OPERATORS
from gdn_kernels.reference import chunk, conv, decode, gating, norm, recurrent, split, step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# As engines serve; on a CPU bf16 would only be slower.
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

#: What one rank holds of a model: key heads / value heads, head size 128, conv width 4.
MODELS = {
    "qwen3-next-tp1": ModelShapes(16, 32),  # Qwen3-Next-80B-A3B
    "qwen3-next-tp4": ModelShapes(4, 8),
    "qwen3-next-tp8": ModelShapes(2, 4),
    "qwen3.5-tp1": ModelShapes(16, 64),
    "qwen3.5-tp4": ModelShapes(4, 16),
    "qwen3.5-tp8": ModelShapes(2, 8),
}

Tensors = dict[str, Any]  # an operator's arguments, or its results, by their name in the schema
Part = Callable[[Any], Any]

# Largest ‖result - reference‖ / ‖reference‖ by the result's dtype: one rounding to it (at most half a unit in the last
# place), or fp32 sums of some hundred products.
BUDGETS = {torch.float32: 2e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Matrix products of operands rounded to 16 bits.
CHUNK_BUDGETS = dict.fromkeys(BUDGETS, 1e-2) if ON_GPU else BUDGETS

REFERENCES = {
    name: getattr(module, name)
    for module in (chunk, conv, decode, gating, norm, recurrent, split, step)
    for name in OPERATORS
    if hasattr(module, name)
}


def pick(on_gpu: Iterable[Any], on_cpu: Iterable[Any]) -> list[Any]:
    """Real shapes on a GPU, small ones on a CPU."""
    return list(on_gpu if ON_GPU else on_cpu)


def lengths(sequences: str) -> list[int]:
    """``8192`` is one sequence, ``8x1024`` eight of 1,024 tokens, ``mixed64`` 64 of 37 to 769 tokens, ``+`` joins."""
    if "+" in sequences:
        return [length for part in sequences.split("+") for length in lengths(part)]
    if sequences == "mixed64":
        return [37 + 61 * (i % 13) for i in range(64)]
    count, _, tokens = sequences.rpartition("x")
    return [int(tokens)] * int(count or 1)


# ---------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------


class Inputs:
    """Random inputs on the bench's device; another seed is another set of buffers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE, dtype=dtype)

    def unwritten(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """NaN, so that what an operator leaves unwritten fails its check."""
        return torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)

    def slots(self, count: int) -> torch.Tensor:
        """``count`` distinct slots, in random order, of a pool of twice as many."""
        return torch.randperm(2 * count, generator=self.generator, device=DEVICE)[:count].int()

    def offsets(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(tokens)], dtype=torch.int32, device=DEVICE)

    def conv_pool(self, shape: ModelShapes, slots: int, columns: int | None = None) -> torch.Tensor:
        """``[S, D, W - 1]``, channel last."""
        return self.normal(slots, columns or shape.conv_width - 1, shape.conv_channels).transpose(1, 2)

    def pool(self, shape: ModelShapes, *lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``[S, HV, V, K]``."""
        return self.normal(*lead, shape.num_v_heads, shape.head_v_dim, shape.head_k_dim, dtype=dtype)

    def gate_parameters(self, shape: ModelShapes) -> Tensors:
        return {name: 0.5 * self.normal(shape.num_v_heads, dtype=torch.float32) for name in ("A_log", "dt_bias")}

    def delta(self, shape: ModelShapes, batch: int, tokens: int, *, raw: bool = True) -> Tensors:
        """q, k, v as column views of one tensor, and the gates.

        ``raw``: as a layer calls, gates and l2norm inside. Else q and k are normalised beforehand, g is
        logsigmoid(normal) / 16 and beta sigmoid(normal), in fp32.
        """
        keys, heads = shape.num_k_heads * shape.head_k_dim, (shape.num_v_heads,)
        mixed = self.normal(batch, tokens, shape.conv_channels)
        if not raw:
            rows = mixed[..., : 2 * keys].unflatten(-1, (-1, shape.head_k_dim))
            rows.copy_(torch.nn.functional.normalize(rows.float(), dim=-1))
        q, k, v = mixed.split((keys, keys, shape.conv_channels - 2 * keys), dim=-1)
        tensors = {
            "q": q.unflatten(-1, (shape.num_k_heads, shape.head_k_dim)),
            "k": k.unflatten(-1, (shape.num_k_heads, shape.head_k_dim)),
            "v": v.unflatten(-1, (shape.num_v_heads, shape.head_v_dim)),
        }
        if raw:
            gates = {"g": self.normal(batch, tokens, *heads), "beta": self.normal(batch, tokens, *heads)}
            return {**tensors, **gates, "use_qk_l2norm": True, **self.gate_parameters(shape)}
        wide = functools.partial(self.normal, batch, tokens, *heads, dtype=torch.float32)
        return {**tensors, "g": torch.nn.functional.logsigmoid(wide()) / 16, "beta": torch.sigmoid(wide())}


# ---------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of ``torch.ops.gdn.<operator>``.

    Args:
        name: the id, ``<model>-<what>-<size>``.
        inputs: makes the arguments, by their names in the schema.
        traffic: how often each argument's bytes must move, where that is not once: ``2 N / S`` for N slots of a pool of
            S that are read and written.
        parts: for large shapes, the part of each argument and result that the check compares; ``checked`` says which.
        budgets: the largest relative error by the result's dtype.
        peers: GPU time in us of other packages on this shape, where known.
    """

    operator: str
    name: str
    inputs: Callable[[Inputs], Tensors]
    traffic: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    checked: str = "everything"
    budgets: Mapping[torch.dtype, float] = dataclasses.field(default_factory=lambda: BUDGETS)
    peers: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def schema(self) -> torch._C.FunctionSchema:
        return getattr(torch.ops.gdn, self.operator).default._schema

    def positional(self, call: Callable[..., Any], tensors: Tensors) -> Callable[[], Any]:
        """The call with its arguments bound as the schema has them: positional ones first, defaults left out."""
        arguments = self.schema.arguments
        args = [tensors[argument.name] for argument in arguments if not argument.kwarg_only]
        names = [argument.name for argument in arguments if argument.kwarg_only and argument.name in tensors]
        return functools.partial(call, *args, **{name: tensors[name] for name in names})

    def bind(self, tensors: Tensors) -> Callable[[], Any]:
        """The operator's call, as an engine makes it."""
        return self.positional(getattr(torch.ops.gdn, self.operator), tensors)

    def reference(self, tensors: Tensors) -> Any:
        """The same on CPU tensors by the reference implementation."""
        return self.positional(REFERENCES[self.operator], tensors)()

    @property
    def written(self) -> list[str]:
        """The arguments that the call writes."""
        return [x.name for x in self.schema.arguments if x.alias_info is not None and x.alias_info.is_write]

    def results(self, tensors: Tensors, returned: Any) -> Tensors:
        """What a call returned (a single result is named ``return``) and what it wrote."""
        values = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        named = {x.name or "return": value for x, value in zip(self.schema.returns, values, strict=True)}
        return {**named, **{name: tensors[name] for name in self.written}}


def moved_bytes(case: Case, tensors: Tensors, results: Tensors) -> int:
    """The fewest bytes the call can move: each input read once, each result written once, slots as touched."""
    each = {**tensors, **results}
    total = sum(x.nbytes * case.traffic.get(name, 1) for name, x in each.items() if isinstance(x, torch.Tensor))
    return round(total)


# ---------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------


def wide(value: Any) -> Any:
    """A copy on the CPU, floating point in fp64."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def check(case: Case, tensors: Tensors) -> tuple[Tensors, float]:
    """Run the call once and compare with the fp64 reference; the results, and the worst relative error.

    Raises:
        AssertionError: a result has another shape, is not finite anywhere, or is further off than its budget.
    """

    def part(name: str, value: Any) -> Any:
        return wide(case.parts[name](value) if name in case.parts else value)

    given = {name: part(name, value) for name, value in tensors.items()}  # before the call writes its states
    results = case.results(tensors, case.bind(tensors)())
    expected = case.results(given, case.reference(given))
    worst = 0.0
    for name, result in results.items():
        actual, wanted = part(name, result), wide(expected[name])
        assert actual.shape == wanted.shape, f"{name} must be {tuple(wanted.shape)}, got {tuple(actual.shape)}"
        seen = result.float() if result.element_size() == 1 else result  # fp8 has no isfinite
        assert torch.isfinite(seen).all(), f"{name} must be finite"
        difference, size = float((actual - wanted).norm()), float(wanted.norm())
        error = difference / size if size else (math.inf if difference else 0.0)
        budget = case.budgets[result.dtype]
        assert error <= budget, f"{name} is off by {error:.2e} of its norm, budget {budget:.2e}"
        worst = max(worst, error)
    return results, worst


def some_rows(count: int, *names: str, limit: int = 1024) -> dict[str, Any]:
    """``parts`` and ``checked``: at most ``limit`` rows of the first dimension, the first and the last among them."""
    if count <= limit:
        return {}
    index = torch.linspace(0, count - 1, limit, dtype=torch.float64).long().to(DEVICE)
    return {"parts": {name: lambda x: x[index] for name in names}, "checked": f"{limit} of {count} rows, evenly spaced"}


def some_channels(shape: ModelShapes, each: int = 128) -> dict[str, Any]:
    """``parts`` and ``checked`` of the convolutions: the first and the last ``each`` channels of every token."""
    channels = shape.conv_channels
    index = torch.arange(channels, device=DEVICE)
    if channels > 2 * each and ON_GPU:
        index = index[(index < each) | (index >= channels - each)]
    parts: dict[str, Part] = {
        "x": lambda x: x[..., index],
        "return": lambda x: x[..., index],
        "weight": lambda x: x[index],
        "conv_state": lambda x: x[:, index],
        "intermediate_windows": lambda x: x[:, :, index],
    }
    return {"parts": parts, "checked": f"{len(index)} of {channels} channels, every token and slot"}


def some_heads(shape: ModelShapes) -> dict[str, Any]:
    """``parts`` and ``checked`` of the delta rule: the first and the last key head with their value heads."""
    H, HV, K, V = shape.num_k_heads, shape.num_v_heads, shape.head_k_dim, shape.head_v_dim
    kept = sorted({0, H - 1})
    grid = functools.partial(torch.arange, device=DEVICE)
    keys = torch.tensor(kept, device=DEVICE)
    values = grid(HV).view(H, HV // H)[keys].flatten()
    columns = torch.cat(
        [
            grid(H * K).view(H, K)[keys].flatten(),
            H * K + grid(H * K).view(H, K)[keys].flatten(),
            2 * H * K + grid(HV * V).view(HV, V)[values].flatten(),
        ]
    )
    parts: dict[str, Part] = {"num_k_heads": lambda _: len(kept), "mixed_qkv": lambda x: x[..., columns]}
    parts |= dict.fromkeys(("q", "k"), lambda x: x[..., keys, :])
    parts |= dict.fromkeys(("v", "o", "out", "output", "return"), lambda x: x[..., values, :])
    parts |= dict.fromkeys(("g", "beta", "a", "b", "A_log", "dt_bias"), lambda x: x[..., values])
    states = ("initial_state", "final_state", "state", "intermediate_states", "checkpoints", "recurrent_state")
    parts |= dict.fromkeys(states, lambda x: x[..., values, :, :])
    parts |= {"conv_weight": lambda x: x[columns], "conv_state": lambda x: x[:, columns]}
    return {"parts": parts, "checked": f"key heads {kept} of {H} with their value heads, every token and slot"}
