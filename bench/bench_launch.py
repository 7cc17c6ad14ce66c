"""Host time of one eager call, over 5,000 calls into a queue that never runs dry, so that the host never waits.

The same calls as the other benches at sizes where the host is what a user waits for. ``replayed`` in ``extra_info``
says whether the call's launches are replayed (``gdn_kernels.replay``) or take the ordinary path; where FLA is
installed, its gated norm stands beside ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import bench_chunk
import bench_conv
import bench_decode
import bench_gating
import bench_norm
import bench_recurrent
import bench_split
import pytest
import timing
import torch
from cases import DEVICE, DTYPE, Case, Inputs

from gdn_kernels import replay


def smallest() -> list[Case]:
    """For each operator the case that moves the least."""
    found: dict[str, tuple[int, Case]] = {}
    modules = (bench_norm, bench_gating, bench_split, bench_conv, bench_chunk, bench_recurrent, bench_decode)
    for case in (case for module in modules for case in module.CASES):
        size = sum(x.nbytes for x in case.inputs(Inputs(0)).values() if isinstance(x, torch.Tensor))
        if case.operator not in found or size < found[case.operator][0]:
            found[case.operator] = (size, case)
    return [case for _, case in found.values()]


def bench(benchmark: Any, call: Callable[[], Any], **facts: Any) -> None:
    # the result is in extra_info; the benchmark's own clock times the measurement as a whole
    us = benchmark.pedantic(lambda: timing.queued_host_us(call), rounds=1)
    benchmark.extra_info.update({**timing.versions(), "host_us": us, **facts})
    print(f"\n{facts['case']}: {us:.1f} us a call")


@pytest.mark.parametrize("operator", [case.operator for case in smallest()])
def test_host_time(operator: str, benchmark: Any) -> None:
    case = next(case for case in smallest() if case.operator == operator)
    call = case.bind(case.inputs(Inputs(0)))
    with torch.no_grad():
        bench(benchmark, call, case=case.name, operator=operator, replayed=operator not in replay.reasons())


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed")
def test_host_time_of_flas_gated_norm(benchmark: Any) -> None:
    from fla.modules import FusedRMSNormGated

    norm = FusedRMSNormGated(128, device=DEVICE, dtype=DTYPE)
    x, z = (Inputs(seed).normal(32, 128) for seed in (0, 1))
    with torch.no_grad():
        bench(benchmark, lambda: norm(x, z), case="fla-norm-t1")
