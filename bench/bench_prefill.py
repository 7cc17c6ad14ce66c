"""Prefill on every row of the peers: the table, its ratios and their geometric mean.

    python bench/bench_prefill.py [--only 2/8] [--decay all | half | none] [--inside] [--json FILE]

Under both policies that long sequences are cut by (``launch.use_prefill_policy``). As the peers were timed: q and k
normalised beforehand, fp32 states given and returned, graphs of 5 calls over one set of buffers. Their gates forget a
state within 7 chunks (to 2^-32), so cutting a long sequence is cheap; ``--decay half`` gives every second head gates of
0, which never do, ``none`` all, beside the same times of the peers. ``--inside`` also times calls with l2norm and raw
gates, as a layer makes them, under ``invariant``; their gates forget within a chunk. Correctness is
``bench_chunk.py``'s and the tests'; here what comes out must only be finite.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import cases
import peers
import timing
from cases import DEVICE, ON_GPU, Inputs, lengths

import gdn_kernels
from gdn_kernels import launch

ROWS = list(peers.PREFILL) if ON_GPU else [(1, 2, "2x100"), (1, 2, "130+5")]
HEAD_DIM = 128 if ON_GPU else 64


def row(
    num_k_heads: int, num_v_heads: int, sequences: str, *, decay: str = "all", inside: bool = False
) -> dict[str, Any]:
    """The figures of one row; on a CPU only that it runs."""
    tokens = lengths(sequences)
    shape = cases.ModelShapes(num_k_heads, num_v_heads, HEAD_DIM, HEAD_DIM)
    make = Inputs(0)
    inputs = make.delta(shape, 1, sum(tokens), raw=False)
    if decay != "all":
        inputs["g"][..., :: 1 if decay == "none" else 2] = 0
    states, offsets = make.pool(shape, len(tokens)), make.offsets(tokens)

    def call(inputs: dict[str, Any] = inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return gdn_kernels.chunk_gated_delta_rule(**inputs, initial_state=states, cu_seqlens=offsets)

    raw = make.delta(shape, 1, sum(tokens)) if inside else None
    with torch.no_grad():
        for given in (inputs, raw) if inside else (inputs,):
            results = call(given)
            assert all(x.isfinite().all() for x in results), (num_k_heads, num_v_heads, sequences)
        moved = sum(x.nbytes for x in (*inputs.values(), states, offsets, *results) if isinstance(x, torch.Tensor))
        found = peers.PREFILL.get((num_k_heads, num_v_heads, sequences), {})
        facts = {"heads": f"{num_k_heads}/{num_v_heads}", "sequences": sequences, "floor_us": timing.floor_us(moved)}
        facts |= {"peers_us": found, "best_peer_us": min(found.values(), default=None)}
        if ON_GPU:
            for policy in launch.POLICIES:
                launch.use_prefill_policy(policy)
                facts[f"gpu_us_{policy}"] = timing.graph_us([call], 5)
            launch.use_prefill_policy(launch.POLICIES[0])
            if inside:
                facts["gpu_us_inside"] = timing.graph_us([lambda: call(raw)], 5)
    return facts


def geometric_mean(ratios: list[float]) -> float:
    return statistics.geometric_mean(ratios) if ratios else float("nan")


@pytest.mark.parametrize("heads_and_sequences", ROWS, ids=lambda each: "{}-{}-{}".format(*each))
def test_prefill(heads_and_sequences: tuple[int, int, str], benchmark: Any) -> None:
    facts = benchmark.pedantic(lambda: row(*heads_and_sequences), rounds=1)
    benchmark.extra_info.update({**timing.versions(), "device": str(DEVICE), **facts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose heads are these, as 16/64")
    parser.add_argument("--decay", choices=("all", "half", "none"), default="all", help="heads whose gates are not 0")
    parser.add_argument("--inside", action="store_true", help="l2norm and raw gates inside, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    print(f"{'':27}{'invariant':>26}{'throughput':>27}")
    print(f"{'heads':>6} {'sequences':>11} {'best':>8}" + f" {'us':>8} {'best/us':>8} {'us/floor':>8}" * 2)
    rows = []
    for heads_and_sequences in ROWS:
        if options.only not in ("", "{}/{}".format(*heads_and_sequences)):
            continue
        facts = row(*heads_and_sequences, decay=options.decay, inside=options.inside)
        rows.append(facts)
        best, numbers = facts["best_peer_us"], ""
        for policy in launch.POLICIES:
            us = facts.get(f"gpu_us_{policy}")
            ratio = best / us if best and us else None
            each = ((us, ".1f"), (ratio, ".2f"), (us and us / facts["floor_us"], ".2f"))
            numbers += "".join(f" {'-' if x is None else format(x, how):>8}" for x, how in each)
        print(f"{facts['heads']:>6} {facts['sequences']:>11} {best or '-':>8}{numbers}", flush=True)
    for policy in launch.POLICIES:
        for who in ("best_peer", "fla"):
            peer = [r["best_peer_us"] if who == "best_peer" else r["peers_us"].get(who) for r in rows]
            ours = [r.get(f"gpu_us_{policy}") for r in rows]
            found = [a / b for a, b in zip(peer, ours, strict=True) if a and b]
            mean = geometric_mean(found)
            print(f"{policy}: geometric mean of {who} / ours over {len(found)} rows: {mean:.3f}")
    inside = sorted(r["gpu_us_inside"] / r["gpu_us_invariant"] for r in rows if "gpu_us_inside" in r)
    if inside:
        middle = statistics.median(inside)
        print(f"l2norm and raw gates inside: {inside[0]:.2f} to {inside[-1]:.2f} of the time, median {middle:.2f}")
    if options.json:
        options.json.write_text(json.dumps({**timing.versions(), "decay": options.decay, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
