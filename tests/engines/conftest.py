"""The cases of these tests are those of the bench."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "bench"))
pytest.register_assert_rewrite("suite")
