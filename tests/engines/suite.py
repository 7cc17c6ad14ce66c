"""What the tests of both engines share."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
import types
from collections.abc import Callable
from typing import Any

import engine_cases
import pytest
import settle
import stand_ins
import torch

#: Of one result: rounding to its dtype, and what a chunked prefill adds. The engines' own tests allow more.
LIMITS = {torch.float16: 1e-3, torch.float32: 1e-4}
#: A result may be this much further from the oracle than the engine's, of errors that differ by chance.
CHANCE = 1.02
#: Of an fp32 result whose error is below a step of fp32, chance alone decides: processors sum in other orders.
STEP = 2.0**-23


def load(engine: str, interpreted: bool) -> Any:
    """The plugin, with the engine's modules importable; skips the module where the engine is not there."""
    try:
        importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {engine}: python tests/engines/run.py {engine}", allow_module_level=True)
    stand_ins.install()
    plugin = importlib.import_module(f"gdn_kernels.integrations.{engine}").plugin
    if interpreted:
        settle.settle(engine)
    return plugin


def function(plugin: Any, case: engine_cases.EngineCase) -> Callable[..., Any]:
    """The engine's own, which nothing replaces in this process."""
    return plugin.examine()[case.place].original


def adapter(plugin: Any, case: engine_cases.EngineCase) -> Callable[..., Any]:
    (place,) = (place for place in plugin.places if place.path == case.place)
    return functools.partial(place.adapter, None) if place.takes_original else place.adapter


def compare(plugin: Any, case: engine_cases.EngineCase, dtype: torch.dtype, runs: bool = True) -> None:
    """Ours within the limit of the oracle and no further from it than the engine's, where that one ``runs`` here."""
    ours = adapter(plugin, case)
    arguments = case.arguments(engine_cases.Inputs(0, torch.device("cpu"), dtype))
    exact = engine_cases.oracle(case, ours, arguments)
    mine = engine_cases.errors(case, ours, arguments, exact)
    # A state may be kept in a dtype of its own.
    states = [value.dtype for value in arguments[1].values() if isinstance(value, torch.Tensor) and value.dim() == 4]
    limit = 2.0**-8 if torch.bfloat16 in states else LIMITS[dtype]
    print(case.id, "ours", mine)
    assert all(error <= limit for error in mine.values())
    if runs:
        theirs = engine_cases.errors(case, function(plugin, case), arguments, exact)
        ratios = {name: mine[name] / theirs[name] if theirs[name] else float(mine[name] > 0) for name in mine}
        print(case.id, "the engine's", theirs, "ratios", ratios)
        assert all(error <= limit for error in theirs.values()), "the engine means something else by its arguments"
        assert all(ratio <= CHANCE or mine[name] < STEP for name, ratio in ratios.items())


def functions(plugin: Any) -> dict[str, int]:
    """Every place, and every import of what stands there, by identity."""
    found = {}
    for place, record in plugin.examine().items():
        owner, _, name = record.path.rpartition(".")
        found[place] = id(inspect.getattr_static(pkgutil.resolve_name(owner), name))
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] == plugin.package:
            for name, value in list(vars(module).items()):
                if isinstance(value, types.FunctionType):
                    found[f"{module.__name__}:{name}"] = id(value)
    return found


def unchanged(plugin: Any, before: dict[str, int]) -> None:
    """Every function is the one that it was; what an import has added since does not count."""
    after = functions(plugin)
    assert [name for name, found in before.items() if after.get(name) != found] == []


def entry_point(plugin: Any, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin as an installed package, beside another one."""
    points = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, value, group)
        for name, value in (
            ("gdn_kernels", f"gdn_kernels.integrations.{plugin.package}:register"),
            ("another", "builtins:dict"),
        )
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", points.select)
