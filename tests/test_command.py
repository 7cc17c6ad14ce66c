"""The command ``python -m gdn_kernels``: what it prints, writes and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gdn_kernels
from gdn_kernels import __main__ as command
from gdn_kernels import accuracy, demo, environment, kl

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"ok", "backend", "graphs", "recompiles", "captured_equals_eager", "kl_prefill_decode", "operators"}


def run_command(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gdn_kernels", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=timeout
    )


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"The gate forgets, the delta rule corrects. " * 5)
    return path


def check_demo(result: subprocess.CompletedProcess[str], data: dict, backend: str) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert "everything holds" in result.stdout and "FAIL" not in result.stdout
    assert data.keys() >= KEYS
    assert data["ok"] is True
    assert data["backend"] == backend
    assert (data["graphs"], data["recompiles"]) == (1, 0)
    assert data["captured_equals_eager"] is True
    assert 0 <= data["kl_prefill_decode"] < demo.KL_LIMIT
    assert sorted(data["operators"]) == environment.operator_names()
    for name, operator in data["operators"].items():
        assert operator["implementation"] == backend, name
        assert operator["relative_error"] <= operator["budget"], name
        assert f"  {name} " in result.stdout
    assert data["tokens_per_second"]["prefill"] > 0 and data["tokens_per_second"]["decode"] > 0


def test_demo_holds_on_the_cpu(text_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = run_command("--layers", "1", "--device", "cpu", "--text", str(text_file), "--json", str(report))
    data = json.loads(report.read_text(encoding="utf-8"))
    check_demo(result, data, "reference")
    assert data["layers"] == 1 and data["text"] == str(text_file)
    # 215 bytes: four whole prompts and what was left for the fifth
    assert data["prompt_lengths"] == [1, 63, 64, 65, 22]
    assert data["token_counts"][0] == 1 and data["token_counts"][-1] == 2048


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_demo_holds_on_the_gpu(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = run_command("demo", "--json", str(report), timeout=600)
    data = json.loads(report.read_text(encoding="utf-8"))
    check_demo(result, data, "triton")
    assert data["seconds"]["total"] - data["seconds"]["warm-up"] < 30


def check_kl(result: subprocess.CompletedProcess[str], data: dict) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert data["ok"] is True and data["captured_equals_eager"] is True and data["limit"] == 0.0025
    comparisons = ("decode, prefill", "decode, prefill from a prefix cache", "verify, prefill")
    assert data["kl"].keys() == {f"{mode}: {what}" for mode in kl.MODES for what in comparisons}
    assert all(0 <= value <= 0.0025 for value in data["kl"].values())
    assert data["captured_against_eager"] == {"split-point": 0.0, "whole-graph": 0.0}
    assert result.stdout.count("0.0e+00, the same bits") == 2


def test_the_kl_guard_holds_on_the_cpu(text_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "kl.json"
    result = run_command("kl", "--layers", "1", "--device", "cpu", "--text", str(text_file), "--json", str(report))
    check_kl(result, json.loads(report.read_text(encoding="utf-8")))
    assert "no capture on a CPU" in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_the_kl_guard_holds_on_the_gpu(tmp_path: Path) -> None:
    report = tmp_path / "kl.json"
    result = run_command("kl", "--json", str(report), timeout=600)
    print(result.stdout)
    check_kl(result, json.loads(report.read_text(encoding="utf-8")))


@pytest.mark.parametrize("fault", ["cache", "replay", "accepted"])
def test_the_kl_guard_finds_what_drifts(
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """States of the cache that are another's, a replay off by one unit in the last place, a stale accepted count."""
    if fault == "cache":
        monkeypatch.setattr(kl.Mode, "copy_states", lambda self, source, target: None)
        failing = {f"{mode}: decode, prefill from a prefix cache" for mode in kl.MODES}
    elif fault == "replay":
        call = kl.graphs.WholeRunner.__call__
        monkeypatch.setattr(kl.graphs.WholeRunner, "__call__", lambda self, x: call(self, x) * (1 + 2**-23))
        failing = {"whole-graph against eager"}
    else:
        fill = kl.graphs.BatchPlan.fill_verify
        monkeypatch.setattr(
            kl.graphs.BatchPlan, "fill_verify", lambda self, slots, accepted: fill(self, slots, [1] * len(accepted))
        )
        failing = {f"{mode}: verify, prefill" for mode in kl.MODES}
    report = tmp_path / "kl.json"
    arguments = ["kl", "--layers", "1", "--device", "cpu", "--text", str(text_file), "--json", str(report)]
    assert command.main(arguments) == 1
    checks = json.loads(report.read_text(encoding="utf-8"))["checks"]
    assert {name for name, check in checks.items() if not check["ok"]} == failing
    assert capsys.readouterr().out.count("FAIL") == len(failing) + 1


def test_env_names_versions_and_every_operator(tmp_path: Path) -> None:
    report = tmp_path / "env.json"
    result = run_command("env", "--json", str(report))
    assert result.returncode == 0, result.stderr
    data = json.loads(report.read_text(encoding="utf-8"))
    assert data["versions"]["gdn_kernels"] == gdn_kernels.__version__
    assert data["versions"]["torch"] == torch.__version__
    assert data["devices"][0]["device"] == "cpu"
    for name, use in data["operators"]["cpu"].items():
        assert use["implementation"] == "reference" and use["why"]
        assert name in result.stdout
    assert sorted(data["operators"]["cpu"]) == environment.operator_names()


def test_warmup_on_the_cpu_says_that_nothing_is_built(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "warmup.json"
    assert command.main(["warmup", "--device", "cpu", "--preset", "qwen3-next-tp1", "--json", str(report)]) == 0
    assert "nothing is to be built" in capsys.readouterr().out
    assert json.loads(report.read_text(encoding="utf-8"))["built"] == 0


def status_of(arguments: list[str]) -> int:
    try:
        return command.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text", "{tmp}/missing.txt"], "--text must be a readable file, got '{tmp}/missing.txt': No such file"),
        (["demo", "--text", "{tmp}"], "--text must be a readable file, got '{tmp}': Is a directory"),
        (["--text", "{tmp}/empty.txt"], "--text must hold at least one byte, got the empty file '{tmp}/empty.txt'"),
        (["--preset", "gpt"], "--preset must be one of small, qwen3-next-tp8, "),
        (
            ["kl", "--text", "{tmp}/missing.txt"],
            "--text must be a readable file, got '{tmp}/missing.txt': No such file",
        ),
        (["warmup", "--preset", "gpt"], "--preset must be one of small, qwen3-next-tp8, "),
        (["--json", "{tmp}/no/report.json"], "--json must be a writable file, got '{tmp}/no/report.json': No such"),
        (["env", "--json", "{tmp}"], "--json must be a writable file, got '{tmp}': Is a directory"),
        (["--layers", "0"], "--layers: must be a number from 1, got '0'"),
        (["--layers", "two"], "--layers: must be a number from 1, got 'two'"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["serve"], "invalid choice: 'serve'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    arguments, message = [a.format(tmp=tmp_path) for a in arguments], message.format(tmp=tmp_path)
    assert status_of(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt"]


def test_bad_usage_of_the_command_itself_is_status_2() -> None:
    result = run_command("--text", "/no/such/file")
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_missing_gpu_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["--device", "cuda"]) == 2
    assert "--device must be available, got 'cuda'" in capsys.readouterr().err


def test_what_does_not_hold_is_status_1(
    monkeypatch: pytest.MonkeyPatch, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    monkeypatch.setattr(demo, "KL_LIMIT", 0.0)
    monkeypatch.setattr(demo, "compiled_phases", lambda *args: None)
    monkeypatch.setattr(accuracy.OperatorChecks, "budget", lambda self, name: -1.0 if name == "gating" else 1.0)
    arguments = ["--layers", "1", "--device", "cpu", "--text", str(text_file), "--json", str(report)]
    assert command.main(arguments) == 1
    data = json.loads(report.read_text(encoding="utf-8"))
    assert data["ok"] is False
    assert [name for name, operator in data["operators"].items() if not operator["ok"]] == ["gating"]
    assert not data["checks"]["KL of decode against prefill"]["ok"]
    assert capsys.readouterr().out.count("FAIL") == 3


def test_an_exception_is_status_1_and_in_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no luck")

    report = tmp_path / "report.json"
    monkeypatch.setattr(demo, "serve", broken)
    assert command.main(["--device", "cpu", "--json", str(report)]) == 1
    data = json.loads(report.read_text(encoding="utf-8"))
    assert data["ok"] is False and data["error"] == "RuntimeError: no luck"
    assert data.keys() >= KEYS
    assert "no luck" in capsys.readouterr().err


def test_unequal_bits_are_found() -> None:
    x = torch.ones(4)
    y = x.clone()
    y[3] = torch.nextafter(y[3], torch.tensor(2.0))
    assert demo.same_bits([x], [x.clone()])
    assert not demo.same_bits([x], [y])
    assert not demo.same_bits([x / 0], [x / 0])


def test_a_recompile_is_counted() -> None:
    backend = demo.CountingBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend=backend, fullgraph=True, dynamic=False)
    compiled(torch.ones(3))
    compiled(torch.ones(3))
    assert backend.graphs == 1
    compiled(torch.ones(4))
    assert backend.graphs == 2


def test_k3_is_zero_for_equal_and_positive_for_different_scores() -> None:
    scores = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    assert demo.k3(scores, scores) == 0.0
    assert demo.k3(scores + 0.1, scores) == pytest.approx(0.1**2 / 2, rel=0.05)
    assert demo.k3(scores - 0.1, scores) == pytest.approx(0.1**2 / 2, rel=0.05)


def test_a_wrong_operator_is_found() -> None:
    expected = torch.ones(3, dtype=torch.float64)
    assert accuracy.relative_error([(expected, expected)]) == 0.0
    assert accuracy.relative_error([(expected * 1.01, expected)]) == pytest.approx(0.01)
    assert accuracy.relative_error([(expected * float("nan"), expected)]) == float("inf")
    assert accuracy.relative_error([(expected[:2], expected)]) == float("inf")


def test_prompts_are_consecutive_pieces_of_the_text() -> None:
    assert demo.cut(b"abcdefgh", (1, 3, 9)) == [b"a", b"bcd", b"efgh"]
    assert demo.cut(b"a", (1, 3)) == [b"a"]


def test_without_a_path_the_text_is_the_readme() -> None:
    label, text = demo.read_text(None)
    assert "README.md" in label
    assert text.startswith(b"# gdn-kernels")


def test_env_says_which_scan_prefill_uses() -> None:
    hopper, other = gdn_kernels.launch.Target("cuda", 90), gdn_kernels.launch.Target("cuda", 80)
    assert "Gluon" in environment.prefill_scan(hopper) and "policy invariant" in environment.prefill_scan(hopper)
    assert environment.prefill_scan(other) == "the scan is the portable one in Triton"
