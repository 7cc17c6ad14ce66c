"""Check every operator, time it, print a table: ``python bench/check.py [--quick] [--json FILE]``.

Checks each case of the benches against the reference, then times it; one that fails is not timed, and the exit status
is then 1. On a GPU ``--scan KERNEL`` times the configurations of a kernel instead, each through ``launch.pinned``,
and compares its bits with those of the ladder's configuration.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import bench_chunk
import bench_conv
import bench_decode
import bench_gating
import bench_norm
import bench_recurrent
import bench_split
import bench_split_point
import bench_step
import cases
import timing

from gdn_kernels import launch
from gdn_kernels.ops import OPERATORS

Row = dict[str, Any]

BENCHES = (
    bench_norm,
    bench_gating,
    bench_split,
    bench_conv,
    bench_chunk,
    bench_recurrent,
    bench_decode,
    bench_split_point,
    bench_step,
)

# Kernel -> configurations to time, cases to time them on. The cases of a kernel share their binaries.
SCANS = {
    "chunk_scan": (
        [launch.ScanConfig(*each) for each in itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3))],
        ("qwen3-next-tp4-prefill-8192", "qwen3-next-tp1-prefill-8192", "qwen3-next-tp1-prefill-32x256"),
    ),
    "chunk_prep": (
        [launch.PrepConfig(*each) for each in itertools.product((1, 2, 4), (1, 2, 4), (4, 8))],
        ("qwen3-next-tp1-prefill-8192", "qwen3-next-tp1-prefill-paged-8192"),
    ),
    "recurrent": (
        [launch.RecurrentConfig(*each) for each in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8))],
        ("qwen3-next-tp1-decode-n1", "qwen3-next-tp1-decode-n64", "qwen3-next-tp1-decode-n128-bfloat16-state"),
    ),
    "decode_step": (
        [
            launch.StepConfig(*each)
            for each in (
                *itertools.product((128,), (1, 2), (8, 16)),
                *itertools.product((64,), (1,), (4, 8, 16)),
                (32, 1, 4),
            )
        ],
        tuple(f"qwen3-next-tp1-step-n{rows}{kind}" for rows in (1, 8, 32, 128) for kind in ("", "-bfloat16-state")),
    ),
}

COLUMNS = {
    "case": ("case", None),
    "gpu us": ("gpu_us", ".1f"),
    "floor us": ("floor_us", ".1f"),
    "ratio": ("ratio", ".2f"),
    "one buffer us": ("gpu_us_one_buffer", ".1f"),
    "best peer us": ("best_peer_us", ".1f"),
    "host us": ("host_us", ".1f"),
    "error": ("relative_error", ".1e"),
}
SCAN_COLUMNS = {
    "case": ("case", None),
    "configuration": ("configuration", None),
    "gpu us": ("gpu_us", ".1f"),
    "same bits": ("same_bits", None),
    "kernels us": ("kernels", None),
}


def table(rows: Sequence[Row], columns: dict[str, tuple[str, str | None]]) -> str:
    """Rows under their headings, numbers to the right; what a row lacks is left out."""

    def cell(row: Row, key: str, form: str | None) -> str:
        value = row.get(key)
        return "-" if value is None else str(value) if form is None else format(value, form)

    cells = [list(columns), *([cell(row, *column) for column in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [form is not None for _, form in columns.values()]
    lines = (
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def all_cases() -> list[cases.Case]:
    """The cases of every bench. RuntimeError where an operator has none."""
    found = [case for bench in BENCHES for case in bench.CASES]
    missing = sorted(set(OPERATORS) - {case.operator for case in found})
    if missing:
        raise RuntimeError(f"every operator must have a bench, got none of {', '.join(missing)}")
    return found


def chosen(quick: bool, only: str) -> list[cases.Case]:
    """The cases whose name holds ``only``; with ``quick`` the middle one of each operator's."""
    found: dict[str, list[cases.Case]] = {}
    for case in all_cases():
        if only in case.name:
            found.setdefault(case.operator, []).append(case)
    return [case for each in found.values() for case in ([each[len(each) // 2]] if quick else each)]


def timed(case: cases.Case, kernels: bool) -> Row:
    """One row: the figures of a case, or what failed."""
    try:
        call, row = timing.prepare(case)
        row["host_us"] = timing.host_us(call)
        row["best_peer_us"] = min(case.peers.values(), default=None)
        if kernels and cases.ON_GPU:
            row["kernels_us"] = timing.kernels_us(call)
    except Exception as error:  # whatever it was, the other cases are still worth their time
        return {"case": case.name, "operator": case.operator, "failed": f"{case}: {type(error).__name__}: {error}"}
    return row


def scan(kernel: str) -> list[Row]:
    """Rows of a kernel's configurations on its cases; the first of each case is the ladder's own."""
    configurations, names = SCANS[kernel]
    return [
        row for case in all_cases() if case.name in names for row in scan_case(kernel, case, [None, *configurations])
    ]


def scan_case(kernel: str, case: cases.Case, configurations: Sequence[Any]) -> list[Row]:
    tensors = case.inputs(cases.Inputs(0))
    before = {name: tensors[name].clone() for name in case.written}
    results, _ = cases.check(case, tensors)
    floor = timing.floor_us(cases.moved_bytes(case, tensors, results))
    count = max(5, math.ceil(timing.GRAPH_US / floor))
    call = case.bind(tensors)

    def fresh() -> cases.Tensors:
        for name, tensor in before.items():
            tensors[name].copy_(tensor)
        return {name: x.clone() for name, x in case.results(tensors, call()).items()}

    def row(configuration: Any, expected: cases.Tensors) -> Row:
        text = "ladder" if configuration is None else str(configuration)
        found: Row = {"case": case.name, "configuration": text}
        try:
            actual = fresh()
            same = all(torch.equal(actual[name], expected[name]) for name in expected)
            found |= {"same_bits": same, "gpu_us": timing.graph_us([call], count)}
            found["kernels_us"] = timing.kernels_us(call)
            found["kernels"] = ", ".join(f"{name} {us:.1f}" for name, us in found["kernels_us"].items())
        except Exception as error:  # a configuration that does not fit the GPU is a result, not an end
            found["kernels"] = found["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        return found

    expected, rows = fresh(), []
    for configuration in configurations:
        if configuration is None:
            rows.append(row(None, expected))
            continue
        with launch.pinned(kernel, configuration):
            rows.append(row(configuration, expected))
        print(f"{rows[-1]['case']} {rows[-1]['configuration']}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case of each operator")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose name holds TEXT")
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel, by the profiler")
    parser.add_argument("--scan", choices=SCANS, help="time the configurations of a kernel instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    if options.scan and not cases.ON_GPU:
        parser.error("--scan needs a GPU, and torch sees none")

    start = time.perf_counter()
    rows: list[Row] = []
    if options.scan:
        rows = scan(options.scan)
    else:
        for case in chosen(options.quick, options.only):
            rows.append(timed(case, options.kernels))
            seconds = time.perf_counter() - start
            print(f"{seconds:6.1f} s  {case.name}  {rows[-1].get('failed', '')}", file=sys.stderr, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({**timing.versions(), "rows": rows}, indent=1) + "\n", encoding="utf-8")

    for row in rows:
        if "kernels_us" in row and not options.scan:
            print(row["case"], {name: round(us, 1) for name, us in row["kernels_us"].items()})
    failed = [row for row in rows if "failed" in row and not options.scan]
    for row in failed:
        print(f"FAILED {row['failed'][:300]}")
    found, seconds = timing.versions(), time.perf_counter() - start
    print(f"{found['device']}, torch {found['torch']}, triton {found['triton']}; {len(rows)} rows in {seconds:.0f} s")
    if not cases.ON_GPU:
        print("without a GPU: small shapes, and host us is the whole call")
    print(table([row for row in rows if row not in failed], SCAN_COLUMNS if options.scan else COLUMNS))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
