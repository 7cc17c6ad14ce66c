"""The fixture of every bench: check a case, time it, hand the figures to pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timing
from cases import Case


def pytest_report_header(config: pytest.Config) -> str:
    found = timing.versions()
    return f"bench: {found['device']}, torch {found['torch']}, triton {found['triton']}"


@pytest.fixture
def measure(benchmark) -> Callable[[Case], None]:
    """Benchmark a case: its time is the host's for one eager call, GPU figures go to ``extra_info``."""

    def run(case: Case) -> None:
        benchmark.group = case.operator
        call, facts = timing.prepare(case)
        benchmark.extra_info.update(facts)
        # The wait lies outside the timed call, so the queue is empty before each and never fills.
        benchmark.pedantic(call, setup=timing.synchronize, rounds=timing.HOST_ROUNDS, warmup_rounds=3)
        timing.synchronize()

    return run
