"""How a case is timed: GPU time by graph replay over rotated buffers, host time of one eager call."""

from __future__ import annotations

import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import cases
import torch
from cases import ON_GPU, Case

BANDWIDTH = 3.0e12  # bytes/s: a device-to-device copy on an H100 SXM reads and writes this much (measured 2026-11-13)
ROTATED_BYTES = 160 * 2**20  # the buffers of one round: three times an H100's 50 MB L2
MAX_COPIES = 64
REPLAYS = 20
GRAPH_US = 200.0  # least floor time of a graph: the host then stays ahead of the GPU from replay to replay
HOST_ROUNDS = 200 if ON_GPU else 5  # some 20 ms: a busy host is slow for milliseconds at a time

Call = Callable[[], Any]

if not ON_GPU:
    torch.set_num_threads(1)  # small shapes: threads that wait for each other would be most of the time


def versions() -> dict[str, str | None]:
    """The device and the packages that a figure depends on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    return {"device": device, "torch": torch.__version__, "triton": triton}


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def graph_us(calls: list[Call], count: int) -> float:
    """GPU time of one call in us: a graph of ``count`` calls, taken in turn from ``calls``; median of the replays."""
    turns = [calls[i % len(calls)] for i in range(count)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # builds and loads what a capture must not
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in turns]  # kept alive, so that results have buffers of their own too
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for _ in range(3):
        graph.replay()
    for start, end in events:  # queued without a wait: no launch latency between the two events
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del graph, kept
    torch.cuda.empty_cache()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3 / count


def hosts_us(calls: Sequence[Call], rounds: int = HOST_ROUNDS) -> list[float]:
    """Median wall time in us of one eager call, of each of ``calls``, which take turns: a slow spell of the host meets
    all of them. On a GPU the queue is empty before each: the launch alone is timed."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(rounds + 3):
        for call, found in zip(calls, times, strict=True):
            synchronize()
            start = time.perf_counter()
            call()
            if i >= 3:
                found.append(time.perf_counter() - start)
    synchronize()
    return [statistics.median(found) * 1e6 for found in times]


def host_us(call: Call, rounds: int = HOST_ROUNDS) -> float:
    """:func:`hosts_us` of one."""
    return hosts_us([call], rounds)[0]


def queued_host_us(call: Call, calls: int = 250 if ON_GPU else 5, rounds: int = 20 if ON_GPU else 2) -> float:
    """Host time of one eager call in us: the median of ``rounds`` of ``calls`` calls each.

    On a GPU a kernel that sleeps comes first, so that the queue never runs dry and the host never waits; it holds 1,024
    launches, so ``calls`` of up to four launches do not fill it.
    """
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        synchronize()
        if ON_GPU:
            torch.cuda._sleep(60_000_000)  # about 35 ms
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    synchronize()
    return statistics.median(times) * 1e6


def kernels_us(call: Call, repeats: int = 10) -> dict[str, float]:
    """GPU time of each kernel of one eager call in us, by the profiler, over the same buffers every time."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / repeats
    return found


def copies(moved: int) -> int:
    """Sets of buffers to rotate for a call that moves so many bytes."""
    return min(MAX_COPIES, math.ceil(ROTATED_BYTES / moved))


def floor_us(moved: int) -> float:
    """The least time in us for so many bytes of device memory traffic."""
    return moved / BANDWIDTH * 1e6


def prepare(case: Case) -> tuple[Call, dict[str, Any]]:
    """Build a case, check it, time it on a GPU: its call, for the host's time, and what is known of it.

    Raises AssertionError where the check fails; nothing is timed then.
    """
    tensors = case.inputs(cases.Inputs(0))
    results, error = cases.check(case, tensors)
    moved = cases.moved_bytes(case, tensors, results)
    del results
    call = case.bind(tensors)
    facts = {"case": case.name, "operator": case.operator, **versions(), "bytes": moved}
    facts |= {"checked": case.checked, "relative_error": error}
    if not ON_GPU:
        return call, facts | {"time": "whole call on a CPU, small shapes"}
    floor, sets = floor_us(moved), copies(moved)
    count = max(5, sets, min(MAX_COPIES, math.ceil(GRAPH_US / floor)))
    calls = [call, *(case.bind(case.inputs(cases.Inputs(seed))) for seed in range(1, sets))]
    measured = graph_us(calls, count)
    facts |= {"time": "host time of one eager call into an empty queue", "copies": sets, "calls": count}
    facts |= {"gpu_us": measured, "floor_us": floor, "ratio": measured / floor}
    if sets > 1:
        facts["gpu_us_one_buffer"] = graph_us(calls[:1], count)
    return call, facts | {"peers_us": dict(case.peers)}
