"""What the clients' callers gain: ``python bench/bench_clients.py [--json FILE]``.

A Qwen3-Next model of transformers with random weights of a fixed seed, three mixers to one attention layer, on a GPU at
the released mixers' sizes: prefill of 4,096 tokens, greedy generation, and one mixer alone. On the library's PyTorch
code (``torch``), with FLA as the library takes it up by itself where it is installed (``fla``), and after ``apply()``
(``gdn_kernels``). Logits are compared with ``torch``'s. Then GPU times of FLA's functions and ``integrations.fla``'s.

A layer has one MLP of the size of the experts that a token passes: a router picks other experts after one rounding, and
the comparison of logits would say little of the mixers. ``--experts N`` gives it N experts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import timing
from cases import DEVICE, DTYPE, ON_GPU

from gdn_kernels.integrations import fla as drop_in
from gdn_kernels.integrations import transformers as gdn

WAYS = ("torch", "fla", "gdn_kernels")
TOKENS, NEW, ROUNDS = (4096, 64, 10) if ON_GPU else (70, 4, 2)
LAYERS = 4
SIZES = {
    "vocab_size": 8192 if ON_GPU else 128,
    "hidden_size": 2048 if ON_GPU else 64,
    "intermediate_size": 11 * 512 if ON_GPU else 64,  # of 512 experts a token passes 10 and the shared one
    "moe_intermediate_size": 512 if ON_GPU else 32,
    "shared_expert_intermediate_size": 512 if ON_GPU else 32,
    "num_attention_heads": 16 if ON_GPU else 2,
    "num_key_value_heads": 2 if ON_GPU else 1,
    "head_dim": 256 if ON_GPU else 32,
    "linear_num_key_heads": 16 if ON_GPU else 2,
    "linear_num_value_heads": 32 if ON_GPU else 4,
    "linear_key_head_dim": 128 if ON_GPU else 64,
    "linear_value_head_dim": 128 if ON_GPU else 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
#: The functions of transformers' module that FLA and causal-conv1d replace as it is imported.
REPLACED = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)
#: Key and value heads, tokens of FLA's functions; head size 128, on a CPU 64.
HEADS, LENGTHS = ([(16, 32), (4, 16)], [4096, 1024]) if ON_GPU else ([(2, 4)], [70])
WIDTH = 128 if ON_GPU else 64

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------


def build(layers: int, experts: int) -> Any:
    import transformers

    dense = {} if experts else {"mlp_only_layers": list(range(layers))}
    count = {"num_experts": experts or 2, "num_experts_per_tok": min(10, experts or 2)}
    config = transformers.Qwen3NextConfig(**SIZES, **dense, **count, num_hidden_layers=layers)
    torch.manual_seed(0)
    with DEVICE:
        return transformers.Qwen3NextForCausalLM(config).to(DTYPE).eval()


def model_code() -> Any:
    return importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")


def takes_fla() -> bool:
    """Whether the library runs FLA's chunked rule; it decides as its module is imported."""
    if not ON_GPU or importlib.util.find_spec("fla") is None:
        return False
    chosen = inspect.getclosurevars(model_code().torch_chunk_gated_delta_rule).nonlocals
    return bool(chosen.get("is_new_implementation"))


@contextlib.contextmanager
def running(way: str) -> Iterator[None]:
    """The models' mixers on one of ``WAYS``."""
    code = model_code()
    if way == "gdn_kernels":
        gdn.apply()
        try:
            yield
        finally:
            gdn.restore()
        return
    kept = {name: getattr(code, name) for name in REPLACED}
    if way == "torch":
        for name, function in kept.items():
            setattr(code, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(code, name, function)


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """Median time of one call, from an empty queue to its end."""
    call()
    times = []
    for _ in range(rounds):
        timing.synchronize()
        start = time.perf_counter()
        call()
        timing.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@torch.no_grad()
def measure(
    way: str, model: Any, tokens: torch.Tensor, new: int, rounds: int
) -> tuple[Row, torch.Tensor, torch.Tensor]:
    """A row of times, the logits of the prompt and the tokens generated."""
    mixer = next(module for module in model.modules() if type(module).__name__ == gdn.FAMILIES["qwen3_next"])
    hidden = torch.randn(1, tokens.shape[1], model.config.hidden_size, dtype=DTYPE, device=DEVICE)
    count = new - 1

    def generate(tokens_wanted: int) -> torch.Tensor:
        options = {"max_new_tokens": tokens_wanted, "min_new_tokens": tokens_wanted, "do_sample": False}
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    with running(way):
        logits = model(tokens).logits
        row: Row = {"way": way, "prefill_ms": milliseconds(lambda: model(tokens, logits_to_keep=1), rounds)}
        row["mixer_ms"] = milliseconds(lambda: mixer(hidden), rounds)
        if ON_GPU:
            row["mixer_gpu_us"] = sum(timing.kernels_us(lambda: mixer(hidden)).values())
        generated = generate(new)[:, tokens.shape[1] :]
        row["generate_ms"] = milliseconds(lambda: generate(new), max(2, rounds // 3))
        row["token_ms"] = (row["generate_ms"] - milliseconds(lambda: generate(1), max(2, rounds // 3))) / count
        if way == "gdn_kernels":
            row["report"] = gdn.report().splitlines()
            if any("own code" in line for line in row["report"]):
                raise AssertionError(f"the operators must serve all of it, got {gdn.report()}")
    return row, logits, generated


def bench_model(layers: int, experts: int, length: int, new: int, rounds: int) -> list[Row]:
    model = build(layers, experts)
    tokens = torch.randint(1, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows: list[Row] = []
    for way in WAYS if takes_fla() else ("torch", "gdn_kernels"):
        row, logits, generated = measure(way, model, tokens, new, rounds)
        if not rows:
            expected_logits, expected = logits, generated
        flat = logits.flatten().double(), expected_logits.flatten().double()
        row["cosine"] = F.cosine_similarity(*flat, dim=0).item()
        row["max_difference"] = (flat[0] - flat[1]).abs().max().item()
        row["equal_tokens"] = int((generated == expected).long().cumprod(-1).sum())
        row["new_tokens"] = generated.numel()
        rows.append(row)
        print(model_line(row, rows[0]), flush=True)
    return rows


def model_line(row: Row, first: Row) -> str:
    def against(key: str) -> str:
        return f"{row[key]:9.2f} ({first[key] / row[key]:5.2f}x)"

    same = f"{row['equal_tokens']}/{row['new_tokens']}"
    times = "  ".join(against(key) for key in ("prefill_ms", "mixer_ms", "token_ms"))
    return f"{row['way']:<12} {times}  {row['cosine']:.6f}  {row['max_difference']:.1e}  {same:>7}"


MODEL_HEAD = f"{'ms (of torch)':<12} {'prefill':>17}  {'one mixer':>17}  {'a token':>17}    cosine  max diff   equal"


# ---------------------------------------------------------------------------------------------------------------
# FLA
# ---------------------------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, str, str, tuple, dict[str, Any]]]:
    """A case's name, a function's module in FLA and name, its arguments."""

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DTYPE, device=DEVICE)

    kernel = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True}
    rule = "fla.ops.gated_delta_rule"
    for H, HV in HEADS:
        parameters = {"A_log": torch.zeros(HV, device=DEVICE), "dt_bias": torch.zeros(HV, device=DEVICE)}
        for B, T in [(1, length) for length in LENGTHS] + [(8, LENGTHS[-1])]:
            q, k, v = (F.normalize(rand(B, T, h, WIDTH), dim=-1) for h in (H, H, HV))
            g, beta = F.logsigmoid(rand(B, T, HV).float()) / 16, rand(B, T, HV).float().sigmoid()
            yield f"chunk {H}/{HV} {B}x{T}", rule, "chunk_gated_delta_rule", (q, k, v, g, beta), {}
            options = {**kernel, **parameters, "output_final_state": True}
            raw = (q, k, v, rand(B, T, HV), rand(B, T, HV))
            yield f"chunk, raw gates {H}/{HV} {B}x{T}", rule, "chunk_gated_delta_rule", raw, options
        for B in (1, 32):
            token = {"beta": rand(B, 1, HV), "initial_state": torch.randn(B, HV, WIDTH, WIDTH, device=DEVICE)}
            options = {**kernel, **parameters, **token, "output_final_state": True}
            args = (rand(B, 1, H, WIDTH), rand(B, 1, H, WIDTH), rand(B, 1, HV, WIDTH), rand(B, 1, HV))
            # a state as the last step returned it: k-first, in v-first memory here, k-first in FLA
            yield f"recurrent {H}/{HV} {B}x1", rule, "fused_recurrent_gated_delta_rule", args, options
    heads, tokens = HEADS[0][1], LENGTHS[0]
    x, z, weight = rand(tokens, heads, WIDTH), rand(tokens, heads, WIDTH), rand(WIDTH)
    yield (
        f"rms_norm_gated {tokens}x{heads}",
        "fla.modules.norm.fused_norm_gate",
        "rms_norm_gated",
        (x, z, weight, None),
        {},
    )
    yield f"l2norm {tokens}x{heads}", "fla.modules.norm.l2norm", "l2norm", (x,), {}
    channels = 4 * heads * WIDTH // 2
    options = {"weight": rand(channels, 4), "activation": "silu"}
    yield (
        f"causal_conv1d {tokens}x{channels}",
        "fla.modules.causal_conv1d",
        "causal_conv1d",
        (rand(1, tokens, channels),),
        options,
    )


def flatten(result: Any) -> torch.Tensor:
    return (result[0] if isinstance(result, tuple) else result).flatten().double()


@torch.no_grad()
def bench_functions() -> list[Row]:
    rows, has_fla = [], ON_GPU and importlib.util.find_spec("fla") is not None
    torch.manual_seed(0)
    for case, module, name, args, options in calls():
        if "initial_state" in options:
            # as each library's own last step left it
            state = options["initial_state"]
            ours = {**options, "initial_state": state.mT.contiguous().mT}
        else:
            ours = options
        call = functools.partial(getattr(drop_in, name), *args, **ours)
        row: Row = {"case": case, "function": name}
        if ON_GPU:
            row["gpu_us"] = timing.graph_us([call], 5)
        if has_fla:
            theirs = functools.partial(getattr(importlib.import_module(module), name), *args, **options)
            row["cosine"] = F.cosine_similarity(flatten(call()), flatten(theirs()), dim=0).item()
            row["fla_gpu_us"] = timing.graph_us([theirs], 5)
            row["host_us"], row["fla_host_us"] = timing.hosts_us([call, theirs])
        else:
            row["host_us"] = timing.host_us(call)
        rows.append(row)
        print(function_line(row), flush=True)
    return rows


def function_line(row: Row) -> str:
    def cell(key: str) -> str:
        return f"{row[key]:9.1f}" if key in row else f"{'-':>9}"

    ratio = f"{row['fla_gpu_us'] / row['gpu_us']:6.2f}x" if "fla_gpu_us" in row else f"{'-':>7}"
    cosine = f"{row['cosine']:.6f}" if "cosine" in row else "-"
    cells = " ".join(map(cell, ("gpu_us", "fla_gpu_us"))), " ".join(map(cell, ("host_us", "fla_host_us")))
    return f"{row['case']:<34} {cells[0]} {ratio}  {cells[1]}  {cosine}"


FUNCTION_HEAD = f"{'us':<34} {'GPU':>9} {'FLA':>9} {'':>7}  {'host':>9} {'FLA':>9}  cosine"


# ---------------------------------------------------------------------------------------------------------------
# Under pytest, and as a command
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_model(benchmark: Any) -> None:
    rows = benchmark.pedantic(lambda: bench_model(LAYERS, 0, TOKENS, NEW, ROUNDS), rounds=1)
    benchmark.extra_info.update({**timing.versions(), "case": "qwen3-next", "rows": rows})
    assert rows[-1]["way"] == "gdn_kernels" and rows[-1]["cosine"] >= 0.9999


def test_functions(benchmark: Any) -> None:
    rows = benchmark.pedantic(bench_functions, rounds=1)
    benchmark.extra_info.update({**timing.versions(), "case": "fla", "rows": rows})
    assert all(row.get("cosine", 1) >= 0.9999 for row in rows)


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("model", "functions"), help="default both")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=NEW)
    parser.add_argument("--layers", type=int, default=LAYERS, help="every fourth is full attention")
    parser.add_argument("--experts", type=int, default=0, metavar="N", help="default 0: one MLP a layer")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="fla")
    found: Row = {
        **timing.versions(),
        **{name: version(name) for name in ("transformers", "fla-core", "causal-conv1d")},
    }
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    if options.only != "functions":
        facts = {"layers": options.layers, "experts": options.experts, "tokens": options.tokens, "dtype": str(DTYPE)}
        print(f"\nQwen3-Next, {', '.join(f'{name} {value}' for name, value in facts.items())}\n{MODEL_HEAD}")
        rows = bench_model(options.layers, options.experts, options.tokens, options.new_tokens, options.rounds)
        found["model"] = {**facts, "rows": rows}
    if options.only != "model":
        print(f"\nintegrations.fla\n{FUNCTION_HEAD}")
        found["functions"] = bench_functions()
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not ON_GPU:
        print("\nwithout a GPU: small shapes on PyTorch implementations; the times mean nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
