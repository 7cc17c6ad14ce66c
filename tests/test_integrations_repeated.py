"""The engines' places, repeated with their operator: the pointers, shapes and bits of a call that is prepared anew."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import engine_cases
import replay_support
from engine_cases import QWEN3_NEXT, Inputs, Shapes

from gdn_kernels import launch, replay

ROWS, PROMPTS = (3,), ((70, 5, 64),)
#: What is only views, and what needs the engine's classes or is an operator's own call.
LEFT_OUT = [
    "contiguous",
    "fused_qkv_split_gdn_prefill",
    "extend",
    "chunk_gated_delta_rule",
    "recurrent_gated_delta_rule",
]
if importlib.util.find_spec("vllm") is None:
    LEFT_OUT.append("mamba.ops.causal_conv1d.causal_conv1d_fn")


def cases(shapes: Shapes) -> list[Any]:
    found = []
    for engine in ("sglang", "vllm"):
        for case in getattr(engine_cases, f"{engine}_cases")(shapes, ROWS, PROMPTS):
            if not case.place.endswith(tuple(LEFT_OUT)):
                found.append(pytest.param(engine, case, id=f"{engine}-{case.id}"))
    return found


def adapter(engine: str, case: engine_cases.EngineCase) -> Any:
    plugin = importlib.import_module(f"gdn_kernels.integrations.{engine}").plugin
    (place,) = (place for place in plugin.places if place.path == case.place)
    return place.adapter


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for each in values for tensor in tensors(each)]


class Launches:
    """Stands for kernels and their launcher on a machine without a GPU: the arguments of each launch."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.prepared: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self.repeated: list[tuple[Any, ...]] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.prepared.append((grid, args))
        if replay.current() is not None:
            replay.current().launched(self, grid, args)

    def run(self, *args: Any) -> None:
        self.repeated.append(args)


@pytest.fixture
def launches(monkeypatch):
    """CPU tensors that say they are a GPU's; what they would launch there."""
    found = Launches()
    replay_support.stand_in_for_a_device(monkeypatch)
    replay_support.say_on_gpu(monkeypatch)
    monkeypatch.setattr(replay, "_reasons", {})
    monkeypatch.setattr(launch, "_forced_target", launch.Target("cuda", 90))
    monkeypatch.setattr(launch, "run", found.launch)
    yield found
    replay.forget()


@pytest.mark.parametrize("engine, case", cases(engine_cases.SMALL))
@torch.no_grad()
def test_a_place_is_repeated_with_its_own_pointers(engine, case, launches, monkeypatch):
    call = adapter(engine, case)
    first, second = (case.arguments(Inputs(seed, torch.device("cpu"), torch.bfloat16)) for seed in range(2))
    call(*first[0], **first[1])
    count = len(launches.prepared)
    assert count and not launches.repeated
    repeated = call(*second[0], **second[1])
    assert len(launches.prepared) == count == len(launches.repeated), replay.reasons()
    replay.forget()
    given = {id(tensor) for tensor in tensors(second)}
    made = (tensor for tensor in tensors(repeated) if id(tensor) not in given)

    def empty(like, *shape, **options):
        # what the repeated call has allocated: only its results, in this order
        return next(made).as_strided(shape, torch.empty(shape, device="meta").stride())

    with monkeypatch.context() as patch:
        patch.setattr(launch, "empty", empty)
        prepared = call(*second[0], **second[1])
    assert next(made, None) is None
    assert len(launches.prepared) == 2 * count
    shapes = [[(x.shape, x.stride(), x.dtype) for x in tensors(found)] for found in (repeated, prepared)]
    assert shapes[0] == shapes[1]
    for (grid, arguments), again in zip(launches.prepared[count:], launches.repeated, strict=True):
        pointers = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        assert again[: len(grid)] == grid and again[9:] == tuple(pointers)


@pytest.mark.gpu
@pytest.mark.parametrize("engine, case", cases(QWEN3_NEXT))
@torch.no_grad()
def test_a_place_repeated_has_the_bits_of_its_operator(engine, case):
    call, reasons = adapter(engine, case), replay.reasons()
    for seed in range(3):
        arguments = case.arguments(Inputs(seed, torch.device("cuda"), torch.bfloat16))
        mine, other = engine_cases.copied(arguments), engine_cases.copied(arguments)
        found = case.results(mine, call(*mine[0], **mine[1]))
        with torch.enable_grad():  # the operator by way of the dispatcher
            expected = case.results(other, call(*other[0], **other[1]))
        for name, result in found.items():
            assert result.stride() == expected[name].stride()
            assert torch.equal(result, expected[name]), (seed, name)
    assert replay.reasons() == reasons
