"""Which tests run where: interpreter tests in a process of their own, GPU tests where there is a GPU."""

from __future__ import annotations

import gc

import pytest
import torch
import triton_support

# On tensors this small several threads mostly wait for each other: two take four times the processor time of one.
# Tests to which the number matters set it themselves.
torch.set_num_threads(1)


def pytest_configure(config):
    if triton_support.INTERPRETED:
        triton_support.install_bf16()


def pytest_report_header(config):
    if triton_support.INTERPRETED:
        return "interpreter: on, only interpreter tests run in this process"
    return "interpreter: tests marked interpreter run in a child process of tests/test_interpreter.py"


# Modules that read what child processes found: last, so that the children have run beside the others.
LAST = ("test_interpreter", "test_compile")


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
    items.sort(key=lambda item: LAST.index(item.path.stem) if item.path.stem in LAST else -1)


def pytest_collection_finish(session):
    # What the imports made stays: each full collection would visit all of it again.
    gc.collect()
    gc.freeze()
    # A worker of pytest-xdist runs some of the tests it collects, and starts what these need when they ask for it.
    if not (triton_support.INTERPRETED or session.config.option.collectonly or hasattr(session.config, "workerinput")):
        triton_support.start_children(session.items)


def pytest_sessionfinish():
    triton_support.end_children()
