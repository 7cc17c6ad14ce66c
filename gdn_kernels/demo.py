"""The demo: a small byte-level language model of GatedDeltaNet blocks, served from real text, with every claim checked.

Prefill of a ragged batch into state pools, greedy decode, the same compiled over many token counts in capture mode and,
on a GPU, replayed from CUDA graphs. The weights are random, so what the model says means nothing; how it computes is
what an engine does. Each check compares two ways of computing one thing, and the operators are compared with fp64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gdn_kernels import __version__, accuracy, environment, graphs, launch
from gdn_kernels import nn as gdn_nn

VOCABULARY = 256  # one token a byte
DECODE_TOKENS = 32
KL_LIMIT = 0.0025  # what a serving engine tolerates between its decode path and a prefill of the same tokens
SEED = 0
TEXT_LIMIT = 1 << 20  # bytes read from --text; the prompts need far fewer

# Lengths of the prompts: one token, one below, at and above the chunk of 64, and tails of other sizes.
PROMPT_LENGTHS = {"cpu": (1, 63, 64, 65, 130, 200), "cuda": (1, 63, 64, 65, 330, 517, 1000, 2000)}
# Padded token counts of the compiled sweep. The first is neither 1 nor 2, so that neither gets a graph by being first.
TOKEN_COUNTS = {
    "cpu": (16, 1, 2, 3, 5, 8, 31, 64, 65, 100, 128, 255, 256, 500, 512, 777, 1024, 1500, 2048),
    "cuda": (16, 1, 2, 3, 5, 8, 31, 64, 65, 100, 128, 255, 256, 500, 512, 777, 1024, 2048, 3000, 4096, 6000, 8192),
}
# Real tokens in a padded count: the CPU implementation is no place for thousands of them.
REAL_TOKENS = {"cpu": 300, "cuda": 8192}


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Head counts of one tensor-parallel rank, and the width of the model around them."""

    num_k_heads: int
    num_v_heads: int
    hidden_size: int
    note: str
    head_k_dim: int = 128
    head_v_dim: int = 128

    def __str__(self) -> str:
        return (
            f"{self.num_k_heads} key heads of {self.head_k_dim}, {self.num_v_heads} value heads of {self.head_v_dim}, "
            f"hidden size {self.hidden_size}"
        )

    def shapes(self, device: torch.device) -> launch.ModelShapes:
        """The static facts that warm-up needs."""
        return launch.ModelShapes(
            self.num_k_heads,
            self.num_v_heads,
            self.head_k_dim,
            self.head_v_dim,
            dtype=model_dtype(device),
            draft_tokens=accuracy.OperatorChecks.STEPS,
        )


PRESETS = {
    "small": Preset(2, 4, 512, "Qwen3-Next on one of 8 ranks, a quarter as wide, for laptops"),
    "qwen3-next-tp8": Preset(2, 4, 2048, "Qwen3-Next on one of 8 ranks"),
    "qwen3-next-tp4": Preset(4, 8, 2048, "Qwen3-Next on one of 4 ranks"),
    "qwen3-next-tp2": Preset(8, 16, 2048, "Qwen3-Next on one of 2 ranks"),
    "qwen3-next-tp1": Preset(16, 32, 2048, "Qwen3-Next on one rank"),
}
DEFAULT_PRESET = {"cpu": "small", "cuda": "qwen3-next-tp4"}
DEFAULT_LAYERS = {"cpu": 2, "cuda": 4}


def preset(name: str | None, device: torch.device) -> tuple[str, Preset]:
    """The preset of that name, or the device's default. Raises UsageError for an unknown name."""
    name = DEFAULT_PRESET[device.type] if name is None else name
    if name not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return name, PRESETS[name]


def model_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, as engines serve; fp32 on a CPU, where bf16 would only be slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------


def read_text(path: str | None) -> tuple[str, bytes]:
    """``(what it is, its bytes)``; without a path the package's README, or in its place what the package carries."""
    if path is not None:
        try:
            with open(path, "rb") as file:
                data = file.read(TEXT_LIMIT)
        except OSError as error:
            raise UsageError(f"--text must be a readable file, got {path!r}: {error.strerror or error}") from error
        if not data:
            raise UsageError(f"--text must hold at least one byte, got the empty file {path!r}")
        return path, data
    root = Path(__file__).resolve().parent.parent
    if (root / "README.md").is_file() and (root / "setup.py").is_file():
        return "the package's README.md", (root / "README.md").read_bytes()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        description = importlib.metadata.metadata("gdn-kernels").get_payload()
        if isinstance(description, str) and description.strip():
            return "the package's README.md, from its installed metadata", description.encode()
    return "this module's source, since the README is not installed", Path(__file__).read_bytes()


def cut(text: bytes, lengths: tuple[int, ...]) -> list[bytes]:
    """Consecutive prompts of these lengths, as far as the text goes; the last may be shorter."""
    prompts, start = [], 0
    for length in lengths:
        if start >= len(text):
            break
        prompts.append(text[start : start + length])
        start += length
    return prompts


# ---------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """``x + norm(mixer(norm(x)))``: only operations whose bits are the same eager and compiled.

    The second norm is there for that: Inductor would fuse a sum that follows a projection into ``addmm``, which rounds
    once where eager rounds twice.
    """

    def __init__(self, shape: Preset, layer_id: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm_in = gdn_nn.RMSNormGated(shape.hidden_size, device=device, dtype=dtype)
        self.norm_out = gdn_nn.RMSNormGated(shape.hidden_size, device=device, dtype=dtype)
        self.mixer = gdn_nn.GatedDeltaNet(
            shape.hidden_size,
            shape.num_k_heads,
            shape.num_v_heads,
            shape.head_k_dim,
            shape.head_v_dim,
            layer_id=layer_id,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm_out(self.mixer(self.norm_in(x)))


class ByteModel(torch.nn.Module):
    """Tokens ``[T]`` to logits ``[T, 256]``; the head is the embedding."""

    def __init__(self, shape: Preset, layers: int, device: torch.device) -> None:
        super().__init__()
        dtype = model_dtype(device)
        self.shape = shape
        self.embedding = torch.nn.Parameter(torch.empty(VOCABULARY, shape.hidden_size, device=device, dtype=dtype))
        self.blocks = torch.nn.ModuleList(Block(shape, layer, device, dtype) for layer in range(layers))
        self.norm = gdn_nn.RMSNormGated(shape.hidden_size, device=device, dtype=dtype)
        self.requires_grad_(False)
        self.fill()

    def fill(self) -> None:
        """Fixed random weights: the same numbers on every device, up to the rounding of the dtype."""
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in self.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name == "embedding":
                # Small beside the blocks' outputs, else the tied head would only repeat the last token.
                values = 0.02 * values
            elif name == "norm.weight":
                # Logits with a standard deviation of about 2, as a trained model's.
                values = torch.full(parameter.shape, 2.0 / (0.02 * math.sqrt(self.shape.hidden_size)))
            elif name.endswith("A_log"):
                values = (1.0 + 15.0 * torch.rand(parameter.shape, generator=generator)).log()
            elif name.endswith("dt_bias"):
                # softplus(dt_bias) between 0.001 and 0.1, evenly in the logarithm: memories from short to long
                step = torch.exp(math.log(1e-3) + math.log(100.0) * torch.rand(parameter.shape, generator=generator))
                values = step + torch.log(-torch.expm1(-step))
            elif parameter.dim() == 1:
                values = 1.0 + 0.1 * values
            else:
                values = values / math.sqrt(parameter.shape[-1])
            parameter.copy_(values)

    def allocate_states(self, num_slots: int, draft_tokens: int = 1) -> dict[int, graphs.LayerState]:
        return {
            layer: block.mixer.allocate_states(num_slots, draft_tokens=draft_tokens)
            for layer, block in enumerate(self.blocks)
        }

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding)


# ---------------------------------------------------------------------------------------------------------------
# Serving
# ---------------------------------------------------------------------------------------------------------------

Call = Callable[[torch.Tensor], torch.Tensor]


class Server:
    """A model, its state pools, and batches of metadata; ``call`` may be the model or its compiled form."""

    def __init__(self, model: ByteModel, num_slots: int, device: torch.device, draft_tokens: int = 1) -> None:
        self.model, self.device = model, device
        self.layers = model.allocate_states(num_slots, draft_tokens)
        generator = torch.Generator().manual_seed(SEED + 1)
        for pool in self.pools():
            # What earlier requests left behind: a new request must not see it.
            pool.copy_(0.1 * torch.randn(pool.shape, generator=generator))

    def pools(self) -> list[torch.Tensor]:
        return [pool for state in self.layers.values() for pool in (state.conv_state, state.recurrent_state)]

    def snapshot(self) -> list[torch.Tensor]:
        return [pool.clone() for pool in self.pools()]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        for pool, saved in zip(self.pools(), snapshot, strict=True):
            pool.copy_(saved)

    def integers(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def prefill_batch(self, slots: list[int], lengths: list[int], has_state: list[bool]) -> graphs.BatchMetadata:
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        return graphs.BatchMetadata(
            self.integers(slots),
            cu_seqlens=self.integers(offsets),
            has_initial_state=torch.tensor(has_state, device=self.device),
        )

    def decode_batch(self, slots: list[int]) -> graphs.BatchMetadata:
        return graphs.BatchMetadata(self.integers(slots))

    def run(self, call: Call, tokens: torch.Tensor, batch: graphs.BatchMetadata) -> torch.Tensor:
        with graphs.forward_context(self.layers, batch):
            return call(tokens)

    def prefill(self, prompts: list[list[int]], slots: list[int]) -> torch.Tensor:
        """Logits of every token of the packed prompts, which start from nothing."""
        tokens = torch.tensor([byte for prompt in prompts for byte in prompt], device=self.device)
        batch = self.prefill_batch(slots, [len(prompt) for prompt in prompts], [False] * len(prompts))
        return self.run(self.model, tokens, batch)


def last_rows(lengths: list[int]) -> list[int]:
    """The row of each sequence's last token in a packed batch."""
    rows, end = [], 0
    for length in lengths:
        end += length
        rows.append(end - 1)
    return rows


def greedy(server: Server, first: torch.Tensor, slots: list[int], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From each sequence's ``first`` token: the ``[N, steps]`` tokens chosen after it and their log-probabilities."""
    batch, tokens = server.decode_batch(slots), first
    chosen, scores = [], []
    for _ in range(steps):
        logits = server.run(server.model, tokens, batch)
        tokens = logits.argmax(dim=-1)
        chosen.append(tokens)
        scores.append(log_probabilities(logits, tokens))
    return torch.stack(chosen, dim=1), torch.stack(scores, dim=1)


def continued(prompts: list[list[int]], first: list[int], generated: list[list[int]]) -> list[list[int]]:
    """Each prompt with its first token and all but the last of those generated after it: what the last one follows."""
    return [[*prompt, token, *tokens[:-1]] for prompt, token, tokens in zip(prompts, first, generated, strict=True)]


def final_rows(lengths: list[int], count: int) -> list[list[int]]:
    """The rows of each sequence's last ``count`` tokens in a packed batch."""
    return [[*range(end - count + 1, end + 1)] for end in last_rows(lengths)]


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """In fp64, so that the comparison adds no rounding of its own."""
    return logits.double().log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


def k3(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """The k3 estimator of KL(q || p) from tokens of q: the mean of ``exp(r) - 1 - r``, ``r = log p - log q``."""
    r = log_p - log_q
    return (torch.expm1(r) - r).mean().item()


# ---------------------------------------------------------------------------------------------------------------
# Compiled, captured, replayed
# ---------------------------------------------------------------------------------------------------------------


class CountingBackend:
    """A ``torch.compile`` backend that counts the graphs it compiled."""

    def __init__(self, name: str) -> None:
        self.name, self.graphs = name, 0
        self.inner = torch._dynamo.lookup_backend(name)

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled = self.inner(module, inputs)
        self.graphs += 1  # counted last: an attempt that Dynamo restarts, say to specialise a float, is no graph
        return compiled


def ragged(total: int) -> list[int]:
    """Four lengths that add up to ``total``, one of them 0 where the total allows no more."""
    first = min(1, total)
    second = (total - first) // 2
    third = (total - first - second) // 3
    return [first, second, third, total - first - second - third]


def same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Equal element for element, and finite, so that NaN cannot hide."""
    pairs = list(zip(actual, expected, strict=True))
    return all(torch.equal(a, e) for a, e in pairs) and all(bool(torch.isfinite(e).all()) for _, e in pairs)


def padded_batches(server: Server, text: bytes, count: int) -> Iterator[tuple[str, torch.Tensor, graphs.BatchMetadata]]:
    """A prefill batch padded to ``count`` tokens, and a decode batch where it is small enough to be one."""
    tokens = torch.tensor(list((text * (count // len(text) + 1))[:count]), device=server.device)
    real = min(max(1, count - count // 8), REAL_TOKENS[server.device.type])
    slots, has_state = [6, 1, 4, 3], [True, False, True, False]
    yield f"prefill {count}", tokens, server.prefill_batch(slots, ragged(real), has_state)
    if count <= 8:
        yield f"decode {count}", tokens, server.decode_batch([6, -1, 4, 3, 0, 1, 2, 5][:count])


@dataclasses.dataclass
class Sweep:
    """What a sweep over token counts found."""

    counts: list[int]
    batches: int
    unequal: list[str]


def compiled_sweep(server: Server, compiled: Call, text: bytes, counts: list[int], progress: Progress) -> Sweep:
    """Run every padded batch eagerly and compiled from the same states; compare logits and states bit for bit."""
    start, found = server.snapshot(), Sweep(counts, 0, [])
    for number, count in enumerate(counts):
        progress(f"compiled, {count} tokens ({number + 1} of {len(counts)})")
        for name, tokens, batch in padded_batches(server, text, count):
            server.restore(start)
            eager = [server.run(server.model, tokens, batch), *server.snapshot()]
            server.restore(start)
            # Unbacked: a count of 1 gets no graph of its own.
            marked = tokens.clone()
            torch._dynamo.decorators.mark_unbacked(marked, 0)
            output = [server.run(compiled, marked, batch), *server.snapshot()]
            found.batches += 1
            if not same_bits(output, eager):
                found.unequal.append(name)
    server.restore(start)
    return found


class Replayed:
    """A call captured in a CUDA graph, with token and metadata buffers that stay where they are."""

    def __init__(self, server: Server, call: Call, tokens: torch.Tensor, batch: graphs.BatchMetadata) -> None:
        self.server, self.tokens, self.batch = server, tokens.clone(), batch
        torch._dynamo.decorators.mark_unbacked(self.tokens, 0)
        slots = batch.state_indices.clone()
        batch.state_indices.fill_(batch.pad_slot_id)  # warm-up and capture must not write live states
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            server.run(call, self.tokens, batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = server.run(call, self.tokens, batch)
        batch.state_indices.copy_(slots)

    def load(self, tokens: torch.Tensor, batch: graphs.BatchMetadata) -> None:
        """Copy a batch of the captured sizes into the buffers."""
        self.tokens.copy_(tokens)
        for name in ("state_indices", "cu_seqlens", "has_initial_state"):
            if getattr(self.batch, name) is not None:
                getattr(self.batch, name).copy_(getattr(batch, name))

    def __call__(self) -> torch.Tensor:
        self.graph.replay()
        return self.logits


def replay_sweep(server: Server, call: Call, text: bytes, progress: Progress) -> tuple[list[str], int, Replayed]:
    """Capture prefill and decode, replay each with other tokens, lengths, slots and padding, compare with eager.

    Returns the names of replays that differ, how many were compared, and the captured decode.
    """
    start, unequal, compared = server.snapshot(), [], 0
    T, N = 512, 8

    def tokens(seed: int, count: int) -> torch.Tensor:
        return torch.tensor([text[(seed * 97 + t) % len(text)] for t in range(count)], device=server.device)

    prefills = [
        ([6, 1, 4, 3], ragged(500), [True, False, True, False]),
        ([0, 5, 2, 7], [64, 128, 0, 320], [False, False, True, True]),
        ([3, -1, 6, 1], [1, 100, 63, 65], [True, True, False, True]),
    ]
    decodes = [[6, 1, 4, 3, 0, 5, 2, 7], [7, 6, 5, 4, 3, 2, 1, 0], [2, -1, 9, 0, -1, 8, -1, 4]]
    for name, size, batches in (
        ("prefill", T, [server.prefill_batch(*batch) for batch in prefills]),
        ("decode", N, [server.decode_batch(slots) for slots in decodes]),
    ):
        progress(f"capturing {name} in a CUDA graph")
        # A batch of its own: the captured one holds the buffers.
        buffers = server.prefill_batch(*prefills[0]) if name == "prefill" else server.decode_batch(decodes[0])
        replayed = Replayed(server, call, tokens(0, size), buffers)
        for number, batch in enumerate(batches):
            server.restore(start)
            eager = [server.run(server.model, tokens(number + 1, size), batch), *server.snapshot()]
            server.restore(start)
            replayed.load(tokens(number + 1, size), batch)
            compared += 1
            if not same_bits([replayed(), *server.snapshot()], eager):
                unequal.append(f"{name} replay {number + 1}")
    server.restore(start)
    return unequal, compared, replayed


# ---------------------------------------------------------------------------------------------------------------
# The run and its report
# ---------------------------------------------------------------------------------------------------------------


class Progress:
    """What is being done, on stderr: one line that is rewritten on a terminal, now and then a line elsewhere."""

    EVERY = 5.0  # seconds between lines where stderr is no terminal

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.start = self.last = time.perf_counter()

    def __call__(self, text: str) -> None:
        now = time.perf_counter()
        line = f"[{now - self.start:5.1f} s] {text}"
        if self.terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif now - self.last >= self.EVERY:
            self.last = now
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Report:
    """Prints as it goes and collects the same for JSON."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.data: dict[str, Any] = {
            "ok": False,
            "backend": None,
            "graphs": None,
            "recompiles": None,
            "captured_equals_eager": None,
            "kl_prefill_decode": None,
            "operators": {},
            "checks": {},
            "tokens_per_second": {},
            "seconds": {},
        }

    def line(self, text: str = "") -> None:
        self.progress.clear()
        print(text, flush=True)

    def check(self, name: str, holds: bool, found: str) -> None:
        self.data["checks"][name] = {"ok": holds, "found": found}
        self.line(f"  {name:<48}  {found:<52}  {'ok' if holds else 'FAIL'}")

    @contextlib.contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        self.progress(name)
        synchronize(device)
        start = time.perf_counter()
        yield
        synchronize(device)
        self.data["seconds"][name] = round(time.perf_counter() - start, 3)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says; None is the device's default."""

    text: str | None = None
    preset: str | None = None
    layers: int | None = None
    device: str | None = None
    json: str | None = None


def writable(path: str | None) -> None:
    """Raise UsageError now rather than after the work, if ``path`` cannot be written."""
    if path is None:
        return
    try:
        new = not os.path.exists(path)
        with open(path, "a", encoding="utf-8"):
            pass
        if new:
            os.remove(path)  # nothing is left behind if the run is interrupted
    except OSError as error:
        raise UsageError(f"--json must be a writable file, got {path!r}: {error.strerror or error}") from error


def write_json(path: str | None, data: dict[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(finite(data), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """``value`` with None for what JSON cannot hold, infinity and NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pick_device(name: str | None) -> torch.device:
    """The device of that kind, or the default. Raises UsageError where torch sees none of the kind."""
    if name is None:
        return environment.default_device()
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device must be available, got 'cuda', but torch sees no GPU")
    return torch.device(name)


Phases = Callable[["Report", torch.device, str, Preset, int, str, bytes], None]


def main(options: Options) -> int:
    """Run the demo; 0 where everything holds, 1 where anything does not. Raises UsageError before any work."""
    return run(options, "the demo", serve)


def run(options: Options, name: str, phases: Phases) -> int:
    """``phases`` on the device, model and text of the command line; their report; returns and raises as ``main``."""
    device = pick_device(options.device)
    preset_name, shape = preset(options.preset, device)
    label, text = read_text(options.text)
    writable(options.json)
    progress = Progress()
    report = Report(progress)
    start = time.perf_counter()
    threads = torch.get_num_threads()
    if device.type == "cpu":
        # The steps are small: waiting for a thread whose core is busy elsewhere costs more than the thread gives.
        torch.set_num_threads(max(1, threads // 2))
    try:
        with torch.no_grad():
            phases(report, device, preset_name, shape, options.layers or DEFAULT_LAYERS[device.type], label, text)
        checks = [check["ok"] for check in report.data["checks"].values()]
        report.data["ok"] = bool(checks) and all(checks)
    except Exception as error:
        progress.clear()
        traceback.print_exc()
        report.data["error"] = f"{type(error).__name__}: {error}"
        report.check(f"{name} runs to its end", False, type(error).__name__)
    finally:
        progress.clear()
        torch.set_num_threads(threads)
    report.data["seconds"]["total"] = round(time.perf_counter() - start, 3)
    warm = report.data["seconds"].get("warm-up", 0.0)
    after = f", {report.data['seconds']['total'] - warm:.1f} s after warm-up" if warm else ""
    verdict = "everything holds" if report.data["ok"] else "FAIL: something does not hold, see above"
    report.line(f"\n{verdict}; {report.data['seconds']['total']:.1f} s{after}")
    write_json(options.json, report.data)
    return 0 if report.data["ok"] else 1


def serve(
    report: Report, device: torch.device, preset_name: str, shape: Preset, layers: int, label: str, text: bytes
) -> None:
    """All phases in order."""
    data, progress, kind = report.data, report.progress, device.type
    prompts = [list(prompt) for prompt in cut(text, PROMPT_LENGTHS[kind])]
    lengths = [len(prompt) for prompt in prompts]

    with report.phase("model", device):
        model = ByteModel(shape, layers, device)
        server = Server(model, 2 * max(len(prompts), 5), device)
    head(report, device, preset_name, shape, model)
    report.line(f"text   {label}: {len(prompts)} prompts of {', '.join(map(str, lengths))} bytes")
    data.update(text=label, prompt_lengths=lengths)

    if kind == "cuda":
        with report.phase("warm-up", device):
            built = launch.warmup(shape.shapes(device), device, progress=lambda name: progress(f"warm-up: {name}"))
            # cuBLAS and allocations; the padding slot keeps live states alone
            server.run(model, torch.zeros(1, dtype=torch.long, device=device), server.decode_batch([-1]))
        data["binaries"] = {"warm-up": built.built}
        report.line(f"warm-up: {built}")

    operators(report, shape, device)
    before_serving = launch.binaries()  # the table of errors also runs forms that the model does not

    report.line(f"\n{'check':<50}  found")
    # New requests sit in the odd slots; the even ones are for the comparison.
    slots = [2 * n + 1 for n in range(len(prompts))]
    others = [2 * n for n in range(len(prompts))]
    with report.phase("prefill, first", device):
        server.prefill(prompts, slots)
    with report.phase("prefill", device):
        logits = server.prefill(prompts, slots)
    first = logits[last_rows(lengths)].argmax(dim=-1)
    with report.phase("decode", device):
        generated, log_decode = greedy(server, first, slots, DECODE_TOKENS)
    speed = data["tokens_per_second"]
    speed["prefill"] = round(sum(lengths) / data["seconds"]["prefill"], 1)
    speed["decode"] = round(len(prompts) * DECODE_TOKENS / data["seconds"]["decode"], 1)
    finite = bool(torch.isfinite(logits).all() and torch.isfinite(log_decode).all())
    report.check("logits are finite", finite, f"{len(prompts)} prompts, {DECODE_TOKENS} tokens decoded for each")

    with report.phase("prefill of the same tokens", device):
        longer = continued(prompts, first.tolist(), generated.tolist())
        logits = server.prefill(longer, others)
        rows = final_rows([len(prompt) for prompt in longer], DECODE_TOKENS)
        log_prefill = log_probabilities(logits[torch.tensor(rows, device=device)], generated)
    data["kl_prefill_decode"] = kl = k3(log_prefill, log_decode)
    report.check("KL of decode against prefill", 0 <= kl < KL_LIMIT, f"{kl:.1e}, limit {KL_LIMIT}")

    compiled_phases(report, server, text)
    if kind == "cuda":
        data["binaries"]["serving"] = built_late = launch.binaries() - before_serving
        report.check("warm-up built all binaries", built_late == 0, f"{built_late} more built while serving")

    report.line("\nspeed")
    for name, value in speed.items():
        report.line(f"  {name:<48}  {value:>12,.0f} tokens/s")
    report.line("\ntime")
    for name, value in data["seconds"].items():
        report.line(f"  {name:<48}  {value:>12.2f} s")


def head(report: Report, device: torch.device, preset_name: str, shape: Preset, model: ByteModel) -> None:
    """What runs where."""
    versions, use = environment.versions(), environment.implementation("packed_decode", device)["implementation"]
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, threads used: {torch.get_num_threads()}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers, dtype = len(model.blocks), str(model_dtype(device)).removeprefix("torch.")
    report.data.update(backend=use, device=where, versions=versions, preset=preset_name, layers=layers, dtype=dtype)
    report.data.update(parameters=parameters)
    stack = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if versions[name])
    report.line(f"gdn-kernels {__version__} with {stack}; {where}; implementation: {use}")
    report.line(f"preset {preset_name} ({shape.note}): {shape}")
    report.line(f"model  {layers} layers, {dtype}, {parameters / 1e6:.1f} M random weights, states in fp32")


def operators(report: Report, shape: Preset, device: torch.device) -> None:
    """Every operator's implementation and its error against fp64."""
    report.line(f"\n{'operator':<42}  {'implementation':<14}  {'error':>8}  {'budget':>8}   (relative, against fp64)")
    failed = []
    with report.phase("operators", device):
        checks = accuracy.OperatorChecks(shape.shapes(device), device)
        for name in environment.operator_names():
            report.progress(f"operators: {name}")
            use = environment.implementation(name, device)
            if use["implementation"] == "none":
                report.data["operators"][name] = use
                report.line(f"  {name:<40}  {'none':<14}  {use['why']}")
                continue
            error, budget = accuracy.relative_error(getattr(checks, name)()), checks.budget(name)
            holds = error <= budget
            report.data["operators"][name] = {**use, "relative_error": error, "budget": budget, "ok": holds}
            verdict = "ok" if holds else "FAIL"
            report.line(f"  {name:<40}  {use['implementation']:<14}  {error:8.1e}  {budget:8.1e}   {verdict}")
            if not holds:
                failed.append(name)
    count = sum("ok" in use for use in report.data["operators"].values())
    found = f"{count - len(failed)} of {count} operators"
    report.data["checks"]["operators are within their budgets"] = {"ok": not failed, "found": found}


def compiled_phases(report: Report, server: Server, text: bytes) -> None:
    """One graph for all token counts, equal to eager; on a GPU CUDA graphs of prefill and decode as well."""
    data, device = report.data, server.device
    counts = list(TOKEN_COUNTS[device.type])
    backend = CountingBackend("inductor" if device.type == "cuda" else "aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(server.model, backend=backend, fullgraph=True, dynamic=True)
    with launch.capture_mode():
        with report.phase("compile", device):
            before = compiled_sweep(server, compiled, text, counts[:1], report.progress)
        with report.phase("compiled sweep", device):
            sweep = compiled_sweep(server, compiled, text, counts[1:], report.progress)
    compared, unequal = before.batches + sweep.batches, before.unequal + sweep.unequal
    report.check(
        f"compiled ({backend.name}) equals eager, bit for bit",
        not unequal,
        f"{compared - len(unequal)} of {compared} batches" + (f"; not {unequal[0]}" if unequal else ""),
    )
    if device.type == "cuda":
        with launch.capture_mode(), report.phase("CUDA graphs", device):
            different, replays, decode = replay_sweep(server, compiled, text, report.progress)
        report.check(
            "CUDA graph replays equal eager, bit for bit",
            not different,
            f"{replays - len(different)} of {replays} replays" + (f"; not {different[0]}" if different else ""),
        )
        unequal += different
        rows = decode.tokens.shape[0]
        with report.phase("decode, CUDA graph", device):
            for _ in range(DECODE_TOKENS):
                decode.tokens.copy_(decode().argmax(dim=-1))
        data["tokens_per_second"]["decode, CUDA graph"] = round(
            rows * DECODE_TOKENS / data["seconds"]["decode, CUDA graph"], 1
        )
    data["captured_equals_eager"] = not unequal
    data["token_counts"] = sorted(counts)
    data["graphs"], data["recompiles"] = backend.graphs, backend.graphs - 1
    report.check(
        "graphs compiled, none recompiled",
        backend.graphs == 1,
        f"{backend.graphs} for {len(counts)} token counts from {min(counts)} to {max(counts)}",
    )
