"""Which tests run where: interpreter tests in a process of their own, GPU tests where there is a GPU."""

from __future__ import annotations

import pytest
import torch
import triton_support

# The bundled demo and the references use all cores they get; test runners have few.
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_configure(config):
    if triton_support.INTERPRETED:
        triton_support.install_bf16()


def pytest_report_header(config):
    if triton_support.INTERPRETED:
        return "interpreter: on, only interpreter tests run in this process"
    return "interpreter: tests marked interpreter run in a child process of tests/test_interpreter.py"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    elsewhere = [item for item in items if ("interpreter" in item.keywords) != triton_support.INTERPRETED]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        gone = set(map(id, elsewhere))
        items[:] = [item for item in items if id(item) not in gone]
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))
