"""A stack of layers in and out of CUDA graphs: ``python bench/bench_layer.py``.

GatedDeltaNet, norms and an MLP at the shapes of one rank of Qwen3-Next, run in four ways: ``mixer-split``, the whole
mixer behind one split operator and eager inside, as engines had it; ``core-split``, the split point at the core;
``whole-graph``, the core captured too; ``eager``. Timed are prefill batches, decode batches, and a load of requests of
mixed lengths as in question answering; counted is what capture takes: seconds, Dynamo's graphs, builds, memory.
Beside it stands ``naive-norm``, ``core-split`` with a gated norm whose tile follows the number of rows. Each way's
outputs are compared with eager's before anything is timed. ``--plot`` draws a JSON file, and needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import timing
from cases import DEVICE, DTYPE, MODELS, ON_GPU, pick

from gdn_kernels import demo, graphs, launch, nn
from gdn_kernels.launch import ModelShapes

WAYS = ("eager", "mixer-split", "core-split", "whole-graph")
NAIVE = "naive-norm"
LAYERS = 4 if ON_GPU else 2
HIDDEN = 2048 if ON_GPU else 64
# Of Qwen3-Next's experts a token passes 10 and the shared one, 512 wide each, sliced over the ranks.
MLP = 11 * 512 if ON_GPU else 64
RANKS = {4: MODELS["qwen3-next-tp4"], 1: MODELS["qwen3-next-tp1"]} if ON_GPU else {1: ModelShapes(1, 2, 64, 64)}

SIZES = pick([1, 2, 4, 8, *range(16, 256, 16), *range(256, 1024, 64), *range(1024, 8193, 224)], [1, 4, 16, 32])
assert not ON_GPU or len(SIZES) == 64 and SIZES[::3][-1] == 8192
PREFILL_TOKENS = pick([64, 128, 256, 512, 1024, 2048, 4096, 8192], [16, 32])
DECODE_ROWS = pick([1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256], [1, 8])
SEQUENCES = DECODE_ROWS[-1]
PROMPT = 512 if ON_GPU else 8  # tokens of each sequence of a prefill batch, at most
REQUESTS, CONCURRENCY = (256, 64) if ON_GPU else (6, 8)
ERROR = 3e-2 if ON_GPU else 1e-4  # of one way's outputs against another's, relative: roundings of fused bf16 operations
MULTIPROCESSORS = 132

Call = Callable[[torch.Tensor], torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------
# The model, as four ways need it
# ---------------------------------------------------------------------------------------------------------------


class NaiveNorm(torch.nn.Module):
    """The gated norm with a heuristic on the number of rows in traced code: what not to do."""

    def __init__(self, norm: nn.RMSNormGated) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        rows, block = x.shape[0] * x.shape[1], 1
        while block < 4 and block * 2 * MULTIPROCESSORS < rows:
            block *= 2
        return torch.ops.gdn_bench.naive_norm(x, self.weight, z, self.eps, block)


class SplitMixer(torch.nn.Module):
    """A mixer behind an operator of its own, all of it eager."""

    def __init__(self, mixer: nn.GatedDeltaNet) -> None:
        super().__init__()
        self.index = len(_mixers)
        _mixers.append(mixer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops.gdn_bench.mixer(x, out, self.index)
        return out


_mixers: list[nn.GatedDeltaNet] = []
_library = torch.library.Library("gdn_bench", "DEF")
_library.define("mixer(Tensor x, Tensor(a!) out, int index) -> ()")
_library.define("naive_norm(Tensor x, Tensor weight, Tensor z, float eps, int block) -> Tensor")


def _mixer(x: torch.Tensor, out: torch.Tensor, index: int) -> None:
    out.copy_(_mixers[index](x))


def _naive_norm(x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor, eps: float, block: int) -> torch.Tensor:
    tile = dataclasses.replace(launch.norm_config(x.shape[-1]), block_rows=block, num_warps=1)
    with launch.pinned("layer_norm_gated", tile):
        return torch.ops.gdn.layer_norm_gated(x, weight, None, z, norm_before_gate=True, eps=eps)


for _name, _call in (("mixer", _mixer), ("naive_norm", _naive_norm)):
    _library.impl(_name, _call, "CUDA")
    _library.impl(_name, _call, "CPU")
torch.library.register_fake("gdn_bench::mixer", lambda x, out, index: None, lib=_library)
torch.library.register_fake("gdn_bench::naive_norm", lambda x, *args: x.new_empty(x.shape), lib=_library)


class Block(torch.nn.Module):
    def __init__(self, shapes: ModelShapes, ranks: int, layer_id: int) -> None:
        super().__init__()
        factory = {"device": DEVICE, "dtype": DTYPE}
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(HIDDEN, eps=1e-6, **factory) for _ in range(2))
        heads = shapes.num_k_heads, shapes.num_v_heads, shapes.head_k_dim, shapes.head_v_dim
        self.mixer: torch.nn.Module = nn.GatedDeltaNet(HIDDEN, *heads, layer_id=layer_id, **factory)
        self.up = torch.nn.Linear(HIDDEN, 2 * MLP // ranks, bias=False, **factory)
        self.down = torch.nn.Linear(MLP // ranks, HIDDEN, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norms[0](x))
        gate, up = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(torch.nn.functional.silu(gate) * up)


class Stack(torch.nn.Module):
    def __init__(self, shapes: ModelShapes, ranks: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block(shapes, ranks, i) for i in range(layers))
        self.mixers = [block.mixer for block in self.blocks]
        self.gated_norms = [mixer.norm for mixer in self.mixers]
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def arrange(self, way: str) -> None:
        """Make the mixers what ``way`` needs, over the same weights."""
        for block, mixer, norm in zip(self.blocks, self.mixers, self.gated_norms, strict=True):
            mixer.norm = NaiveNorm(norm) if way == NAIVE else norm
            block.mixer = SplitMixer(mixer) if way == "mixer-split" else mixer

    def states(self) -> dict[int, graphs.LayerState]:
        return {i: mixer.allocate_states(SEQUENCES) for i, mixer in enumerate(self.mixers)}


# ---------------------------------------------------------------------------------------------------------------
# A way of running it
# ---------------------------------------------------------------------------------------------------------------


class Way:
    """The stack, its states and a plan; ``serve`` runs the plan's batch on the first rows of an input."""

    def __init__(self, name: str, stack: Stack, sizes: list[int]) -> None:
        self.name, self.stack, self.facts = name, stack, {}
        stack.arrange(name)
        self.layers = stack.states()
        self.plan = graphs.BatchPlan(SEQUENCES, SIZES[-1], device=DEVICE)
        inner = "inductor" if ON_GPU else "eager"
        self.runner: Any = None
        self.counter = demo.CountingBackend(inner)
        if name == "whole-graph":
            call = torch.compile(stack, backend=self.counter, fullgraph=True)
            rows = [rows for rows in DECODE_ROWS if rows <= sizes[-1]]
            self.runner = graphs.WholeRunner(call, self.plan, sizes, prefill_rows=CONCURRENCY, decode_rows=rows)
        elif name != "eager":
            names = ("gdn_bench::mixer",) if name == "mixer-split" else graphs.SPLIT_OPERATORS
            self.runner = graphs.PiecewiseRunner(stack, sizes, names=names, inner=inner)
        if name == NAIVE:
            backend = graphs.piecewise_backend(self.runner, inner=inner)
            compiled = torch.compile(stack, backend=backend, fullgraph=True)

            def call(x: torch.Tensor) -> torch.Tensor:
                x = x.view_as(x)  # no longer marked unbacked: a branch on such a dimension makes no graph at all
                torch._dynamo.maybe_mark_dynamic(x, 0)
                return compiled(x)

            self.runner.call = call
        if self.runner is not None:
            self._capture()

    def _graphs(self) -> int:
        return self.counter.graphs + getattr(self.runner, "graphs", 0)

    def _capture(self) -> None:
        """Compile, then capture, and note what each took."""
        x = torch.zeros(SIZES[-1], HIDDEN, device=DEVICE, dtype=DTYPE)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        start = time.perf_counter()
        with launch.capture_mode(), graphs.forward_context(self.layers, self.plan.batch()), torch.no_grad():
            self.runner.call(x)
        timing.synchronize()
        self.facts["compile_s"] = time.perf_counter() - start
        built, compiled, reserved, free = launch.binaries(), self._graphs(), *memory()
        start = time.perf_counter()
        self.runner.capture(self.layers, x)
        timing.synchronize()
        self.facts["capture_s"] = time.perf_counter() - start
        after = memory()
        self.facts |= {
            "sizes": len(self.runner.captured),
            "pieces": sum(self.runner.captured.values()),
            "seconds": list(self.runner.seconds.values()),
            "dynamo_graphs": self._graphs(),
            "recompiles_in_capture": self._graphs() - compiled,
            "triton_builds_in_capture": launch.binaries() - built,
            "pool_bytes": after[0] - reserved,
            "device_bytes": free - after[1],
        }

    def serve(self, x: torch.Tensor) -> torch.Tensor:
        plan = self.plan
        if isinstance(self.runner, graphs.WholeRunner):
            return self.runner(x)
        with torch.no_grad(), graphs.forward_context(self.layers, plan.batch(plan.count, kind=plan.kind)):
            return (self.runner or self.stack)(x)


def memory() -> tuple[int, int]:
    """Bytes that torch has reserved, and that the device has left."""
    if not ON_GPU:
        return 0, 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]


# ---------------------------------------------------------------------------------------------------------------
# What is timed
# ---------------------------------------------------------------------------------------------------------------


def prompts(tokens: int) -> list[int]:
    """Lengths that add up to ``tokens``: of one batch, none over PROMPT, uneven."""
    lengths, left, turn = [], tokens, 0
    while left:
        lengths.append(min(left, PROMPT, max(1, PROMPT * (3, 8, 5, 2)[turn % 4] // 8)))
        left, turn = left - lengths[-1], turn + 1
    return lengths


def fill(plan: graphs.BatchPlan, kind: str, size: int) -> None:
    lengths = [1] * size if kind == "decode" else prompts(size)
    plan.fill(lengths, range(len(lengths)), has_initial_state=[kind == "decode"] * len(lengths))


def seconds_a_batch(way: Way, x: torch.Tensor, kind: str, size: int, least: float) -> float:
    """Wall time of filling the plan and running a batch, batches queued one behind the other; median of 3 rounds."""

    def batches(count: int) -> float:
        timing.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            fill(way.plan, kind, size)
            way.serve(x[:size])
        timing.synchronize()
        return (time.perf_counter() - start) / count

    count = max(2, int(least / max(batches(2), 1e-5)))
    return statistics.median(batches(count) for _ in range(3))


@dataclasses.dataclass(frozen=True)
class Step:
    """A batch of the load: its lengths, slots and known states, the requests that get their first token by it."""

    lengths: list[int]
    slots: list[int]
    known: list[bool]
    admitted: list[int]
    first: list[int]


def schedule(requests: int, concurrency: int, budget: int) -> tuple[list[Step], int, int]:
    """The batches of a load, its prompt tokens and its generated ones: a fixed number of requests in flight, a new one
    where one is done; decodes first, prompts with what tokens are left, in pieces if need be."""
    draw = random.Random(0)
    scale, longest, most = (1, 2048, 256) if ON_GPU else (32, 20, 6)
    waiting = [
        (
            min(longest, max(1, int(draw.lognormvariate(5.8, 0.8)) // scale)),
            min(most, max(2, int(draw.lognormvariate(4.3, 0.6)) // scale)),
        )
        for _ in range(requests)
    ]
    totals = sum(prompt for prompt, _ in waiting), sum(answer for _, answer in waiting)
    steps, running, next_request, free = [], {}, 0, list(range(concurrency))
    while running or next_request < requests:
        admitted = []
        while free and next_request < requests:
            running[next_request] = [free.pop(0), *waiting[next_request], 0]  # slot, prompt left, answer left, seen
            admitted.append(next_request)
            next_request += 1
        batch, left = [], budget
        for number, request in sorted(running.items(), key=lambda item: item[1][1] > 0):
            length = min(left, max(1, request[1]))
            if length:
                batch.append((number, request, length))
                left -= length
        first = []
        for number, request, length in batch:
            was_prompt = request[1] > 0
            request[1] = max(0, request[1] - length)
            if was_prompt and request[1] == 0:
                first.append(number)
            if request[1] == 0:
                request[2] -= 1
        steps.append(
            Step(
                [length for *_, length in batch],
                [request[0] for _, request, _ in batch],
                [request[3] > 0 for _, request, _ in batch],
                admitted,
                first,
            )
        )
        for number, request, length in batch:
            request[3] += length
            if request[1] == 0 and request[2] == 0:
                free.append(request[0])
                del running[number]
    return steps, *totals


def run_load(way: Way, x: torch.Tensor, steps: list[Step]) -> tuple[float, list[float]]:
    """Seconds, and each request's time to its first token; a value of every batch is read back, as tokens are."""
    began, first = {}, {}
    timing.synchronize()
    start = time.perf_counter()
    for step in steps:
        began.update(dict.fromkeys(step.admitted, time.perf_counter()))
        way.plan.fill(step.lengths, step.slots, has_initial_state=step.known)
        way.serve(x[: sum(step.lengths)])[-1, -1].item()
        first.update(dict.fromkeys(step.first, time.perf_counter()))
    seconds = time.perf_counter() - start
    return seconds, [first[request] - began[request] for request in first]


def load_facts(way: Way, x: torch.Tensor, requests: int) -> dict[str, Any]:
    steps, asked, answered = schedule(requests, CONCURRENCY, SIZES[-1])
    run_load(way, x, steps[: len(steps) // 4])
    seconds, first = run_load(way, x, steps)
    return {
        "requests": requests,
        "concurrency": CONCURRENCY,
        "batches": len(steps),
        "tokens": asked + answered,
        "tokens_per_s": (asked + answered) / seconds,
        "first_token_ms_median": statistics.median(first) * 1e3,
        "first_token_ms_p90": sorted(first)[int(0.9 * len(first))] * 1e3,
    }


def check(way: Way, x: torch.Tensor, wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error of the way's outputs against ``wanted``, which the first way fills; AssertionError
    past ERROR."""
    worst = 0.0
    for kind, size in (("prefill", PREFILL_TOKENS[-2]), ("decode", DECODE_ROWS[-2])):
        fill(way.plan, kind, size)
        found = way.serve(x[:size]).double()
        expected = wanted.setdefault(kind, found)
        worst = max(worst, ((found - expected).norm() / expected.norm()).item())
        assert torch.isfinite(found).all() and worst <= ERROR, f"{way.name}, {kind}: off by {worst:.1e}"
    return worst


def measure(name: str, stack: Stack, quick: bool) -> dict[str, Any]:
    """All figures of one way, of ``naive-norm`` those of its capture; what the way holds is given back."""
    torch._dynamo.reset()
    x = torch.randn(SIZES[-1], HIDDEN, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE, dtype=DTYPE)
    wanted: dict[str, torch.Tensor] = {}
    check(Way("eager", stack, []), x, wanted)
    way = Way(name, stack, SIZES[:: 3 if quick and ON_GPU else 1])
    facts: dict[str, Any] = {"way": name, "capture": way.facts, "error": check(way, x, wanted)}
    if name != NAIVE:
        least = 0.03 if quick else 0.06
        for kind, sizes in (("prefill", PREFILL_TOKENS), ("decode", DECODE_ROWS)):
            picked = sizes[:: 2 if quick else 1]
            facts[kind] = {size: size / seconds_a_batch(way, x, kind, size, least) for size in picked}
        facts["load"] = load_facts(way, x, REQUESTS // (2 if quick and ON_GPU else 1))
    stack.arrange("eager")
    _mixers.clear()
    del way
    gc.collect()
    memory()
    return facts


def bench(ranks: list[int], ways: list[str], layers: int, quick: bool) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        print(f"\ntensor parallel {rank}, {layers} layers", flush=True)
        stack = Stack(RANKS[rank], rank, layers)
        if ON_GPU:
            print(launch.warmup(RANKS[rank], DEVICE), flush=True)
        for name in ways:
            if name == NAIVE and rank != ranks[0]:
                continue  # its compilations take longest, and say the same again
            start = time.perf_counter()
            row = {"ranks": rank, **measure(name, stack, quick)}
            rows.append(row | {"wall_s": time.perf_counter() - start})
            print(line(rows[-1]), flush=True)
        print(ratios([row for row in rows if row["ranks"] == rank]), flush=True)
    return {**timing.versions(), "layers": layers, "hidden": HIDDEN, "quick": quick, "rows": rows}


def line(row: dict[str, Any]) -> str:
    capture, load = row["capture"], row.get("load")
    text = f"{row['way']:<12} {row['wall_s']:5.1f} s in all"
    if capture:
        text += (
            f"; compiled {capture['compile_s']:.1f} s, {capture['sizes']} sizes captured {capture['capture_s']:.1f} s, "
            f"graphs {capture['dynamo_graphs']} (+{capture['recompiles_in_capture']}), builds "
            f"{capture['triton_builds_in_capture']}, {capture['pool_bytes'] / 2**20:.0f} MiB of pool, "
            f"{capture['device_bytes'] / 2**20:.0f} of the device"
        )
    if load:
        text += (
            f"; load {load['tokens_per_s']:,.0f} tokens/s, first token {load['first_token_ms_median']:.1f} ms, "
            f"p90 {load['first_token_ms_p90']:.1f}"
        )
        for kind in ("prefill", "decode"):
            text += f"\n    {kind}: " + ", ".join(f"{size} {rate:,.0f}" for size, rate in row[kind].items())
    return text


def ratios(rows: list[dict[str, Any]]) -> str:
    load = {row["way"]: row["load"]["tokens_per_s"] for row in rows if "load" in row}
    pairs = (("core-split", "mixer-split"), ("whole-graph", "core-split"), ("core-split", "eager"))
    found = (f"{a} over {b} {100 * (load[a] / load[b] - 1):+.1f} %" for a, b in pairs if a in load and b in load)
    return "load: " + ", ".join(found)


# ---------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------


def plot(path: Path, folder: Path) -> list[Path]:
    """Throughput, capture and load of a JSON file, each as PNG and SVG in ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    data = json.loads(path.read_text(encoding="utf-8"))
    rows, ranks = data["rows"], sorted({row["ranks"] for row in data["rows"]}, reverse=True)
    source = f"{data['device']}, torch {data['torch']}, triton {data['triton']}, {data['layers']} layers"
    written: list[Path] = []

    def panels(height: int, width: int) -> tuple[Any, Any]:
        figure, axes = plt.subplots(height, width, figsize=(5.2 * width, 3.8 * height), squeeze=False)
        figure.suptitle(source, fontsize=9)
        return figure, axes

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        for kind in ("png", "svg"):
            written.append(folder / f"{path.stem}-{name}.{kind}")
            figure.savefig(written[-1], dpi=150)
        plt.close(figure)

    figure, axes = panels(len(ranks), 2)
    for i, rank in enumerate(ranks):
        for j, kind in enumerate(("prefill", "decode")):
            ax = axes[i][j]
            ticks: set[int] = set()
            for row in (row for row in rows if row["ranks"] == rank and kind in row):
                sizes = [int(size) for size in row[kind]]
                ax.plot(sizes, list(row[kind].values()), marker="o", ms=3, label=row["way"])
                ticks.update(sizes)
            ax.set(xscale="log", yscale="log", title=f"{kind}, tensor parallel {rank}", ylabel="tokens/s")
            ax.set_xticks(sorted(ticks), map(str, sorted(ticks)), fontsize=7)
            ax.set_xticks([], minor=True)
            ax.set_xlabel("tokens a batch" if kind == "prefill" else "sequences")
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
    save(figure, "throughput")

    figure, axes = panels(1, len(ranks))
    for ax, rank in zip(axes[0], ranks, strict=True):
        for row in (row for row in rows if row["ranks"] == rank and row["capture"]):
            capture, total, sums = row["capture"], row["capture"]["compile_s"], []
            for seconds in capture["seconds"]:
                total += seconds
                sums.append(total)
            label = f"{row['way']}: {capture['dynamo_graphs']} graphs, {capture['triton_builds_in_capture']} builds"
            ax.plot(range(len(sums) + 1), [capture["compile_s"], *sums], label=label)
        ax.set(
            title=f"tensor parallel {rank}", xlabel="sizes captured", ylabel="seconds, with compilation", ylim=(0, None)
        )
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    save(figure, "capture")

    figure, axes = panels(len(ranks), 2)
    for i, rank in enumerate(ranks):
        found = [row for row in rows if row["ranks"] == rank and "load" in row]
        for ax, key, label in (
            (axes[i][0], "tokens_per_s", "tokens/s"),
            (axes[i][1], "first_token_ms_median", "ms to the first token, median"),
        ):
            bars = ax.bar([row["way"] for row in found], [row["load"][key] for row in found], color="tab:blue")
            ax.bar_label(bars, fmt="%.4g", fontsize=8)
            ax.set(title=f"mixed load, tensor parallel {rank}", ylabel=label)
            ax.tick_params(axis="x", labelsize=8)
    save(figure, "load")
    return written


# ---------------------------------------------------------------------------------------------------------------
# Under pytest, and as a command
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_mixed_load(way: str, benchmark: Any) -> None:
    """The load alone, of a few requests and captured sizes."""
    rank = max(RANKS)
    stack = Stack(RANKS[rank], rank, LAYERS)
    if ON_GPU:
        launch.warmup(RANKS[rank], DEVICE)
    facts = benchmark.pedantic(lambda: measure(way, stack, True), rounds=1)
    benchmark.extra_info.update({**timing.versions(), "case": f"tp{rank}-layer-{way}", **facts})
    print("\n" + line(facts | {"wall_s": benchmark.stats.stats.total}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one rank, no naive norm, every third size, half the load")
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS, help="tensor-parallel ranks; default all")
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, NAIVE), help="default all")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw this file of rows instead, beside it")
    options = parser.parse_args()
    if options.plot is not None:
        print("\n".join(map(str, plot(options.plot, options.plot.parent))))
        return 0
    start = time.perf_counter()
    ranks = options.ranks or list(RANKS)[: 1 if options.quick else None]
    ways = options.ways or [*WAYS, *([] if options.quick else [NAIVE])]
    found = bench(ranks, ways, options.layers, options.quick)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{found['device']}, torch {found['torch']}, triton {found['triton']}; {time.perf_counter() - start:.0f} s")
    if not ON_GPU:
        print("without a GPU: small shapes, nothing is captured or compiled; the figures mean nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
