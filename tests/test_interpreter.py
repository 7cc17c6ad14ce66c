"""Runs the interpreter tests (``test_interpreter_*.py``) in their own process, and reports them module by module."""

from __future__ import annotations

import pytest
import triton_support


@pytest.mark.parametrize("module", triton_support.interpreter_modules())
def test_interpreter_suite(module):
    results, output = triton_support.run_interpreter_tests()
    assert module in results, f"no result for {module}:\n{output[-8000:]}"
    result = results[module]
    print(f"{result.passed} passed, {result.skipped} skipped")
    assert not result.failures, "\n".join(result.failures)[-20000:]
    assert result.passed > 0, f"nothing passed in {module}:\n{output[-8000:]}"
