"""The KL guard: decode's log-probabilities of the tokens it generated, against a prefill of the same text.

As serving engines check it: tokens are sampled while decoding, the same text is then prefilled, and the k3 estimator of
the KL between the two must stay below a limit. Here for every way of running the model: eager, with the core at a split
point, and captured whole; for a prefill from nothing and one that goes on from a prefix cache's states; for tokens from
decode and from verification. Captured and eager must not differ at all. The weights are the demo's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gdn_kernels import accuracy, demo, graphs, launch

MODES = ("eager", "split-point", "whole-graph")
DRAFT_TOKENS = accuracy.OperatorChecks.STEPS  # what the demo's shapes are warmed up for
PROMPT_LENGTHS = {"cpu": (1, 63, 64, 65, 130), "cuda": (1, 63, 64, 65, 330, 517, 1000)}
STEPS = {"cpu": 12, "cuda": 128}  # generated tokens of each prompt
BLOCK = 64  # tokens after which a prefix cache keeps states


class Mode:
    """A model, its states and a plan, run in one way. Every mode pads a batch to the same sizes, because a projection's
    rounding may follow its number of rows."""

    def __init__(self, name: str, model: demo.ByteModel, num_slots: int, sizes: list[int], sequences: int) -> None:
        device = model.embedding.device
        self.model, self.sequences, self.device = model, sequences, device
        self.plan = graphs.BatchPlan(sequences, sizes[-1], draft_tokens=DRAFT_TOKENS, device=device)
        self.server = demo.Server(model, num_slots, device, DRAFT_TOKENS)
        self.sizes = sorted({*sizes, sequences, sequences * DRAFT_TOKENS})
        self.runner: graphs.PiecewiseRunner | graphs.WholeRunner | None = None
        if name == "split-point":
            self.runner = graphs.PiecewiseRunner(model, self.sizes)
        elif name == "whole-graph":
            rows = (sequences,)
            self.runner = graphs.WholeRunner(model, self.plan, sizes, decode_rows=rows, verify_rows=rows)
        if self.runner is not None:
            self.runner.capture(self.server.layers, torch.zeros(1, dtype=torch.long, device=device))

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """Logits of the plan's batch."""
        x, plan = torch.tensor(tokens, device=self.device), self.plan
        if isinstance(self.runner, graphs.WholeRunner):
            return self.runner(x)
        batch = plan.batch(kind=plan.kind)
        if self.runner is not None:
            return self.server.run(self.runner, x, batch)
        size = next(size for size in self.sizes if size >= len(x))
        return self.server.run(self.model, F.pad(x, (0, size - len(x))), batch)[: len(x)]

    def prefill(self, texts: list[list[int]], slots: list[int], known: list[bool] | None = None) -> torch.Tensor:
        self.plan.fill(
            [len(text) for text in texts], slots, has_initial_state=[False] * len(texts) if known is None else known
        )
        return self([token for text in texts for token in text])

    def copy_states(self, source: list[int], target: list[int]) -> None:
        for pool in self.server.pools():
            pool[target] = pool[source]


def sample(logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens drawn by their probabilities, the k-th of a sequence with the same noise in every mode, and their logs."""
    tokens = (logits.double() + noise).argmax(dim=-1)
    return tokens, demo.log_probabilities(logits, tokens)


def decode(mode: Mode, first: list[int], slots: list[int], noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From each sequence's first token: the tokens drawn after it and their log-probabilities."""
    tokens, found = first, []
    mode.plan.fill([1] * len(first), slots)
    for k in range(noise.shape[1]):
        found.append(sample(mode(tokens), noise[:, k]))
        tokens = found[-1][0].tolist()
    chosen, logs = zip(*found, strict=True)
    return torch.stack(chosen, dim=1), torch.stack(logs, dim=1)


def verify(
    mode: Mode, first: list[int], slots: list[list[int]], noise: torch.Tensor, guesses: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """``decode`` by verification of drafts, of which some are wrong; and how many batches it took."""
    count, steps = noise.shape[:2]
    tokens, logs = [[] for _ in first], [[] for _ in first]
    current, accepted, batches = list(first), [1] * count, 0
    while any(len(row) < steps for row in tokens):
        done, x = [len(row) for row in tokens], []
        for n in range(count):
            drafts = [*guesses[n], *[0] * DRAFT_TOKENS][done[n] : done[n] + DRAFT_TOKENS - 1]
            wrong = (batches + n) % 4
            if wrong < len(drafts):
                drafts[wrong] = (drafts[wrong] + 1) % demo.VOCABULARY
            x += [current[n], *drafts]
        # a sequence that is done leaves its row to padding
        inert = [-1] * DRAFT_TOKENS
        mode.plan.fill_verify([slots[n] if done[n] < steps else inert for n in range(count)], accepted)
        places = torch.tensor(done, device=noise.device)[:, None] + torch.arange(DRAFT_TOKENS, device=noise.device)
        rows = torch.arange(count, device=noise.device)[:, None]
        drawn, scores = sample(mode(x).unflatten(0, (count, DRAFT_TOKENS)), noise[rows, places.clamp(max=steps - 1)])
        for n, (row, score) in enumerate(zip(drawn.tolist(), scores.tolist(), strict=True)):
            if done[n] >= steps:
                continue
            drafts, stand = x[n * DRAFT_TOKENS + 1 : (n + 1) * DRAFT_TOKENS], 1
            while stand < DRAFT_TOKENS and drafts[stand - 1] == row[stand - 1]:
                stand += 1
            tokens[n] += row[:stand]
            logs[n] += score[:stand]
            current[n], accepted[n] = row[stand - 1], stand
        batches += 1
    chosen = torch.tensor([row[:steps] for row in tokens], device=noise.device)
    return chosen, torch.tensor([row[:steps] for row in logs], dtype=torch.double, device=noise.device), batches


Scores = dict[str, tuple[torch.Tensor, torch.Tensor]]


def scores(mode: Mode, prompts: list[list[int]], noise: torch.Tensor) -> tuple[Scores, int]:
    """What each comparison of a mode compares, log-probabilities of prefill and of generation; batches verified."""
    count, steps = noise.shape[0], noise.shape[1] - 1
    ours, other, cache, *drafts = ([i * count + n for n in range(count)] for i in range(3 + DRAFT_TOKENS))

    def scored(logits: torch.Tensor, lengths: list[int], tokens: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor(demo.final_rows(lengths, steps), device=logits.device)
        return demo.log_probabilities(logits[rows], tokens)

    def prefilled(first: list[int], tokens: torch.Tensor) -> torch.Tensor:
        texts = demo.continued(prompts, first, tokens.tolist())
        return scored(mode.prefill(texts, other), [len(text) for text in texts], tokens)

    ends = demo.last_rows([len(prompt) for prompt in prompts])
    first = sample(mode.prefill(prompts, ours)[ends], noise[:, 0])[0].tolist()
    tokens, decoded = decode(mode, first, ours, noise[:, 1:])
    found = {"decode, prefill": (prefilled(first, tokens), decoded)}

    # a prefix cache holds the states after whole blocks of the prompt; the rest of the text goes on from them
    texts = demo.continued(prompts, first, tokens.tolist())
    blocks = [(len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts]
    mode.prefill([text[:block] for text, block in zip(texts, blocks, strict=True)], cache)
    mode.copy_states(cache, other)
    rest = [text[block:] for text, block in zip(texts, blocks, strict=True)]
    logits = mode.prefill(rest, other, [block > 0 for block in blocks])
    found["decode, prefill from a prefix cache"] = scored(logits, [len(text) for text in rest], tokens), decoded

    mode.prefill(prompts, drafts[0])
    verified, logs, batches = verify(mode, first, [*zip(*drafts, strict=True)], noise[:, 1:], tokens.tolist())
    found["verify, prefill"] = prefilled(first, verified), logs
    return found, batches


def guard(
    report: demo.Report,
    device: torch.device,
    preset_name: str,
    shape: demo.Preset,
    layers: int,
    label: str,
    text: bytes,
) -> None:
    """All modes and comparisons."""
    data, kind = report.data, device.type
    prompts, steps = [list(prompt) for prompt in demo.cut(text, PROMPT_LENGTHS[kind])], STEPS[kind]
    count, total = len(prompts), sum(map(len, prompts))
    with report.phase("model", device):
        model = demo.ByteModel(shape, layers, device)
    demo.head(report, device, preset_name, shape, model)
    report.line(f"text   {label}: {count} prompts, {total} bytes; {steps} tokens sampled for each")
    if kind == "cuda":
        with report.phase("warm-up", device):
            report.line(f"warm-up: {launch.warmup(shape.shapes(device), device)}")
    else:
        report.line(
            "no capture on a CPU: there split point and whole graph make the same calls, on the same padded batches"
        )
    uniform = torch.rand(count, steps + 1, demo.VOCABULARY, generator=torch.Generator().manual_seed(demo.SEED))
    noise = -uniform.double().log().neg().log().to(device)
    sizes = [-(-tokens // BLOCK) * BLOCK for tokens in (total // 2, total, total + count * steps)]

    data.update(limit=demo.KL_LIMIT, kl={}, captured_against_eager={})
    eager: Scores | None = None
    report.line(f"\n{'check':<50}  found")
    for name in MODES:
        with report.phase(name, device):
            found, batches = scores(Mode(name, model, (3 + DRAFT_TOKENS) * count, sizes, count), prompts, noise)
        for what, pair in found.items():
            data["kl"][f"{name}: {what}"] = kl = demo.k3(*pair)
            margin = f"{demo.KL_LIMIT / kl:.1e}" if kl > 0 else "any"
            report.check(f"{name}: {what}", kl <= demo.KL_LIMIT, f"{kl:.1e}, limit {demo.KL_LIMIT}, margin x {margin}")
        if eager is None:
            eager = found
            report.line(f"  {batches} batches verified {count} x {steps} tokens")
            continue
        same = all(demo.same_bits(list(found[what]), list(eager[what])) for what in found)
        kls = [abs(demo.k3(found[what][i], eager[what][i])) for what in found for i in (0, 1)]
        data["captured_against_eager"][name] = max(kls)
        report.check(f"{name} against eager", same, f"{max(kls):.1e}, {'the same' if same else 'other'} bits")
    data["captured_equals_eager"] = not any(data["captured_against_eager"].values())


def main(options: demo.Options) -> int:
    """Run the guard; returns and raises as the demo."""
    return demo.run(options, "the KL guard", guard)
