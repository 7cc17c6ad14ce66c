"""Host time of one eager call, over 5,000 calls into a queue that never runs dry, so that the host never waits.

The same calls as the other benches at sizes where the host is what a user waits for. ``replayed`` in ``extra_info``
says whether the call's launches are replayed (``gdn_kernels.replay``) or take the ordinary path; where FLA is
installed, its gated norm stands beside ours.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import bench_split_point
import check
import pytest
import timing
import torch
from cases import DEVICE, DTYPE, MODELS, ON_GPU, Case, Inputs

from gdn_kernels import graphs, launch, replay
from gdn_kernels.nn import GatedDeltaNet


def smallest() -> list[Case]:
    """For each operator the case that moves the least."""
    found: dict[str, tuple[int, Case]] = {}
    modules = (module for module in check.BENCHES if module is not bench_split_point)
    for case in (case for module in modules for case in module.CASES):
        size = sum(x.nbytes for x in case.inputs(Inputs(0)).values() if isinstance(x, torch.Tensor))
        if case.operator not in found or size < found[case.operator][0]:
            found[case.operator] = (size, case)
    return [case for _, case in found.values()]


SMALLEST = smallest()


def bench(benchmark: Any, call: Callable[[], Any], **facts: Any) -> None:
    # the result is in extra_info; the benchmark's own clock times the measurement as a whole
    us = benchmark.pedantic(lambda: timing.queued_host_us(call), rounds=1)
    benchmark.extra_info.update({**timing.versions(), "host_us": us, **facts})
    print(f"\n{facts['case']}: {us:.1f} us a call")


@pytest.mark.parametrize("case", SMALLEST, ids=lambda case: case.operator)
def test_host_time(case: Case, benchmark: Any) -> None:
    call = case.bind(case.inputs(Inputs(0)))
    with torch.no_grad():
        bench(benchmark, call, case=case.name, operator=case.operator, replayed=case.operator not in replay.reasons())


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed")
def test_host_time_of_flas_gated_norm(benchmark: Any) -> None:
    from fla.modules import FusedRMSNormGated

    norm = FusedRMSNormGated(128, device=DEVICE, dtype=DTYPE)
    x, z = (Inputs(seed).normal(32, 128) for seed in (0, 1))
    with torch.no_grad():
        bench(benchmark, lambda: norm(x, z), case="fla-norm-t1")


# 64 token counts from 1 to 8,192, close together where they are small, as engines capture.
TOKEN_COUNTS = [1, 2, 4, 8, *range(16, 256, 16), *range(256, 1024, 64), *range(1024, 8193, 224)]


@pytest.mark.skipif(not ON_GPU, reason="captures CUDA graphs: needs a GPU")
@pytest.mark.parametrize("what", ["norm", "layer"])
def test_capture_of_64_token_counts(what: str, benchmark: Any) -> None:
    """Seconds to capture a graph for each of 64 token counts after warm-up; nothing may be compiled meanwhile."""
    shapes = MODELS["qwen3-next-tp4"]
    layer = GatedDeltaNet(2048, shapes.num_k_heads, shapes.num_v_heads, layer_id=0, device=DEVICE, dtype=DTYPE)
    states = {0: layer.allocate_states(4)}
    one = torch.tensor([1], dtype=torch.int32, device=DEVICE)

    def call(tokens: int) -> Callable[[], Any]:
        if what == "norm":
            x = torch.zeros(tokens, shapes.num_v_heads, shapes.head_v_dim, device=DEVICE, dtype=DTYPE)
            return lambda: torch.ops.gdn.layer_norm_gated(x, layer.norm.weight, None, x, norm_before_gate=True)
        x = torch.zeros(tokens, 2048, device=DEVICE, dtype=DTYPE)
        offsets = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)

        def run() -> torch.Tensor:
            with graphs.forward_context(states, graphs.BatchMetadata(one, offsets)):
                return layer(x)

        return run

    def capture_all() -> int:
        kept, pool = [], torch.cuda.graph_pool_handle()
        for tokens in reversed(TOKEN_COUNTS):
            run, graph = call(tokens), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                kept.append((run(), graph))
        torch.cuda.synchronize()
        return len(kept)

    with torch.no_grad():
        warm = launch.warmup(shapes, DEVICE)
        call(16)()  # cuBLAS
        before, start = launch.binaries(), time.perf_counter()
        assert benchmark.pedantic(capture_all, rounds=1) == 64
        seconds = time.perf_counter() - start
    assert launch.binaries() == before
    benchmark.extra_info.update({**timing.versions(), "capture_s": seconds, "warmup": str(warm)})
    print(f"\n{what}: 64 graphs in {seconds:.2f} s; warm-up: {warm}")
