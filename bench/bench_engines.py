"""Each function that the engines' plugins replace, ours beside the engine's own: ``python bench/bench_engines.py``.

On the same random inputs: the error of both against fp64 and their ratio, on shapes small enough for the oracle; GPU
time (graph replays over rotated buffers, or the profiler's sum of kernels where an engine's function waits for the GPU)
and host time of an eager call, on the shapes of Qwen3-Next. The engines need not be installed: unpacked wheels on the
path do (``tests/engines/run.py --pack``), and what they import beside is stood in for. On a CPU only errors are
compared, the engine's with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "engines"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import engine_cases
import stand_ins
import timing
from cases import DEVICE, ON_GPU
from engine_cases import EngineCase, Inputs, Shapes

from gdn_kernels.integrations import _engines

ENGINES = ("sglang", "vllm")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
#: For the errors: every head size as served, few heads and tokens.
CHECKED = Shapes(2, 4) if ON_GPU else engine_cases.SMALL
CHECKED_ROWS, CHECKED_PROMPTS = (3,), ((300, 65, 1) if ON_GPU else (70, 5, 64),)
TIMED = engine_cases.QWEN3_NEXT
TIMED_ROWS = (1, 8, 32, 128, 256)
TIMED_PROMPTS = ((2048,), (8192,), (1024,) * 8)


def cases(engine: str, shapes: Shapes, rows: tuple[int, ...], prompts: tuple[tuple[int, ...], ...]) -> list[EngineCase]:
    return getattr(engine_cases, f"{engine}_cases")(shapes, rows, prompts)


def bytes_of(arguments: Any) -> int:
    """What the tensors among the arguments hold."""
    if isinstance(arguments, torch.Tensor):
        return arguments.numel() * arguments.element_size()
    values = arguments.values() if isinstance(arguments, dict) else arguments
    return sum(bytes_of(value) for value in values if isinstance(value, torch.Tensor | dict | tuple))


@dataclasses.dataclass
class Row:
    engine: str
    place: str
    case: str
    error: dict[str, float] | None = None
    engines_error: dict[str, float] | None = None
    gpu_us: float | None = None
    engines_gpu_us: float | None = None
    timed_by: str | None = None
    host_us: float | None = None
    engines_host_us: float | None = None
    skipped: str | None = None


def check(row: Row, case: EngineCase, adapter: Callable[..., Any], record: _engines.Record) -> None:
    arguments = case.arguments(Inputs(0, DEVICE, DTYPE))
    exact = engine_cases.oracle(case, adapter, arguments)
    row.error = engine_cases.errors(case, _engines.replacing(record), arguments, exact)
    if ON_GPU or (INTERPRETED and not case.needs_gpu):
        row.engines_error = engine_cases.errors(case, record.original, arguments, exact)


def measure(row: Row, case: EngineCase, record: _engines.Record) -> None:
    first = case.arguments(Inputs(0, DEVICE, DTYPE))
    sets = timing.copies(max(bytes_of(first), 1))
    arguments = [first, *(case.arguments(Inputs(seed, DEVICE, DTYPE)) for seed in range(1, sets))]
    ours, engines = _engines.replacing(record), record.original

    def calls(function: Callable[..., Any]) -> list[Callable[[], Any]]:
        return [functools.partial(function, *args, **kwargs) for args, kwargs in arguments]

    count = max(sets, 16)
    row.timed_by = "kernels" if case.waits else "graph"
    if case.waits:
        row.gpu_us, row.engines_gpu_us = (
            sum(timing.kernels_us(functools.partial(function, *first[0], **first[1])).values())
            for function in (ours, engines)
        )
    else:
        row.gpu_us, row.engines_gpu_us = (timing.graph_us(calls(function), count) for function in (ours, engines))
    row.host_us, row.engines_host_us = timing.hosts_us([calls(function)[0] for function in (ours, engines)])


def run(engine: str, only: str, without: str | None = None) -> list[Row]:
    """Every case of one engine; what fails says why and the next one goes on."""
    # kernels need nothing of it, and with half of its own requirements it does not import
    stand_ins.install(instead=("transformers",))
    plugin = importlib.import_module(f"gdn_kernels.integrations.{engine}").plugin
    if INTERPRETED:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        import settle
        import triton_support

        triton_support.install_bf16()
        settle.settle(engine)
    records, rows = plugin.examine(), []

    def attempt(case: EngineCase, do: Callable[[Row, _engines.Record], None]) -> None:
        if only not in case.id or (without and without in case.id):
            return
        row, record = Row(engine, case.place, case.name), records[case.place]
        rows.append(row)
        if record.state != _engines.REPLACED:
            row.skipped = f"{record.state}: {record.why}"
            return
        try:
            do(row, record)
        except Exception as error:
            row.skipped = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            traceback.print_exc(limit=-3)
        shown = {name: value for name, value in dataclasses.asdict(row).items() if value is not None}
        print(json.dumps(shown), file=sys.stderr, flush=True)

    for case in cases(engine, CHECKED, CHECKED_ROWS, CHECKED_PROMPTS):
        place = records[case.place].place
        adapter = functools.partial(place.adapter, None) if place.takes_original else place.adapter
        attempt(case, lambda row, record, case=case, adapter=adapter: check(row, case, adapter, record))
    if ON_GPU:
        for case in cases(engine, TIMED, TIMED_ROWS, TIMED_PROMPTS):
            attempt(case, lambda row, record, case=case: measure(row, case, record))
    return rows


def ratio(mine: float | None, theirs: float | None) -> str:
    return "" if mine is None or not theirs else f"{mine / theirs:.2f}"


def table(rows: list[Row]) -> str:
    """Errors first, then times; a ratio below 1 is ours smaller."""
    lines = ["| function | case | result | error | engine's | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        for name, error in (row.error or {}).items():
            theirs = (row.engines_error or {}).get(name)
            shown = "not run" if theirs is None else f"{theirs:.2e}"
            place = row.place.rpartition(".")[2]
            lines.append(f"| {place} | {row.case} | {name} | {error:.2e} | {shown} | {ratio(error, theirs)} |")
    timed = [row for row in rows if row.gpu_us is not None]
    if timed:
        lines += ["", "| function | case | GPU us | engine's | ratio | host us | engine's | engine's over ours |"]
        lines.append("|---|---|---|---|---|---|---|---|")
    for row in timed:
        gpu = f"{row.gpu_us:.1f} | {row.engines_gpu_us:.1f} | {ratio(row.gpu_us, row.engines_gpu_us)}"
        host = f"{row.host_us:.1f} | {row.engines_host_us:.1f} | {ratio(row.engines_host_us, row.host_us)}"
        lines.append(f"| {row.place.rpartition('.')[2]} | {row.case} | {gpu} | {host} |")
    lines += [f"skipped {row.place} {row.case}: {row.skipped}" for row in rows if row.skipped]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: those that are there")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose id holds it")
    parser.add_argument("--without", metavar="TEXT", help="nor those whose id holds this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {**timing.versions(), "dtype": str(DTYPE), "shapes": dataclasses.asdict(TIMED), "rows": []}
    failed = False
    for engine in options.engine or ENGINES:
        try:
            version = importlib.metadata.version(engine)
        except importlib.metadata.PackageNotFoundError:
            print(f"{engine}: skipped, it is not on the path")
            continue
        rows = run(engine, options.only, options.without)
        found[engine] = version
        found["rows"] += [dataclasses.asdict(row) for row in rows]
        print(f"{engine} {version}, {found['device']}\n\n{table(rows)}\n")
        failed = failed or any(row.skipped and row.error is None and row.gpu_us is None for row in rows)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
