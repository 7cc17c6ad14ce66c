"""The clients' bench runs without a GPU, on small shapes: its ways agree, and what it writes is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[clients]'")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bench_clients
import transformers_support

transformers_support.import_models()
QUICK = ["--tokens", "20", "--new-tokens", "2", "--rounds", "1"]


@pytest.mark.skipif(bench_clients.ON_GPU, reason="on a GPU the bench runs at full size, by itself")
@pytest.mark.parametrize("experts", ["0", "4"])
def test_the_model_of_every_way_gives_the_same_logits(monkeypatch, tmp_path, capsys, experts):
    written = tmp_path / "rows.json"
    arguments = ["bench_clients.py", "--only", "model", "--experts", experts, *QUICK, "--json", str(written)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench_clients.main() == 0
    rows = json.loads(written.read_text())["model"]["rows"]
    assert [row["way"] for row in rows] == ["torch", "gdn_kernels"]
    for row in rows:
        assert row["cosine"] > 1 - 1e-9 and row["max_difference"] < 1e-4 and row["equal_tokens"] == 2
        assert min(row[key] for key in ("prefill_ms", "mixer_ms", "generate_ms")) > 0
    assert any("one cached token" in line for line in rows[1]["report"])
    assert "0.000000" not in capsys.readouterr().out


@pytest.mark.skipif(bench_clients.ON_GPU, reason="on a GPU the bench runs at full size, by itself")
def test_every_function_of_fla_has_a_row(capsys):
    rows = bench_clients.bench_functions()
    assert {row["function"] for row in rows} == {
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
        "rms_norm_gated",
        "l2norm",
        "causal_conv1d",
    }
    assert all(row["host_us"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
