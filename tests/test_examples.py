"""The examples run as a new user would run them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


SCRIPTS = {
    "fla_drop_in.py": "against a prefill of",
    "causal_conv1d_drop_in.py": "against torch.nn.functional.conv1d",
    "transformers_qwen3_next.py": "equal greedy tokens",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_example_runs(script: str) -> None:
    if script.startswith("transformers") and importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers: pip install -e '.[clients]'")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "what is not built says so" in run.stdout and SCRIPTS[script] in run.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SCRIPTS)
