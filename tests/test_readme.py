"""What the README shows is what the package does."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import gdn_kernels  # noqa: F401  registers torch.ops.gdn.*
from gdn_kernels import graphs
from gdn_kernels.integrations import transformers

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block(containing: str) -> str:
    found = [text for text in BLOCKS if containing in text]
    assert len(found) == 1, f"README.md must hold one python block with {containing!r}, got {len(found)}"
    return found[0]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 120


@pytest.mark.parametrize(
    "command", ["pip install -e . && python -m gdn_kernels", "pip install -e '.[test]' && python -m pytest"]
)
def test_both_commands_stand_alone_on_a_line(command: str) -> None:
    assert command in README.splitlines()


def test_usage_runs_as_written() -> None:
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block("packed_decode"), "README.md", "exec"), names)
    y, state, slots = names["y"], names["state"], names["slots"].tolist()
    assert y.shape == (names["N"], names["HV"], names["V"])
    assert torch.isfinite(y).all() and torch.isfinite(names["out"]).all()
    touched = state.abs().amax(dim=(1, 2, 3)) > 0
    assert [slot for slot in range(names["S"]) if touched[slot]] == sorted(slots)


@pytest.mark.parametrize("operator", ["recurrent_gated_delta_rule", "chunk_gated_delta_rule"])
@pytest.mark.parametrize("H, HV", [(2, 2), (2, 6)], ids=["hv-1x-h", "hv-3x-h"])
def test_operators_match_the_equivalent(operator: str, H: int, HV: int) -> None:
    names: dict = {"torch": torch}
    exec(compile(block("def gated_delta_rule"), "README.md", "exec"), names)
    T, K, V = 70, 64, 128
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(T, H, K, generator=generator, dtype=torch.float64) for _ in range(2))
    k = k / k.norm(dim=-1, keepdim=True)
    v = torch.randn(T, HV, V, generator=generator, dtype=torch.float64)
    g = -torch.rand(T, HV, generator=generator, dtype=torch.float64)
    beta = torch.rand(T, HV, generator=generator, dtype=torch.float64)
    expected_o, expected_S = names["gated_delta_rule"](q, k, v, g, beta, K**-0.5)
    o, S = getattr(torch.ops.gdn, operator)(q[None], k[None], v[None], g[None], beta[None])
    # Rounding of fp64 over 70 steps on values of order one; observed error is near 1e-14.
    torch.testing.assert_close(o[0], expected_o, rtol=0, atol=1e-11)
    torch.testing.assert_close(S[0], expected_S, rtol=0, atol=1e-11)


def test_what_is_said_of_clients_is_what_they_have() -> None:
    section = README.split("## Clients")[1].split("\n## ")[0]
    modules = re.findall(r"`from (gdn_kernels\.integrations\.\w+) import ([\w, ]+)`", section)
    assert len(modules) == 2
    for module, names in modules:
        found = importlib.import_module(module)
        assert all(hasattr(found, name) for name in names.split(", "))
    assert all(hasattr(transformers, name) for name in ("apply", "report", "restore"))
    assert f"**transformers** {'.'.join(transformers.VERSIONS.split('.')[:2])} to 5.24" in section
    assert transformers.VERSIONS == "5.17.0 to 5.24.0"
    assert all(len(client.splitlines()) <= 10 for client in section.split("\n- "))


def test_every_operator_is_in_the_table() -> None:
    section = README.split("## Operators")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    table = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    registered = {name.removeprefix("gdn::") for name in torch._C._dispatch_get_all_op_names() if "gdn::" in name}
    assert table == {name.split(".")[0] for name in registered}


def test_the_ways_of_cutting_are_those_of_the_package_and_of_torch() -> None:
    section = README.split("## Capture")[1].split("\n## ")[0]
    assert all(f'"{cut}"' in section for cut in graphs.PiecewiseRunner.CUTS)
    (name,) = graphs.SPLIT_OPERATORS
    assert f'torch._inductor.config.custom_should_partition_ops = ["{name}"]' in section
    assert isinstance(torch._inductor.config.custom_should_partition_ops, list)
    assert f'add_split_op("{torch.ops.gdn.linear_attention_with_output}")' in section
