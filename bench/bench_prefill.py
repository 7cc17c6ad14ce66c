"""Prefill on every row of the peers: the table, its ratios and their geometric mean.

    python bench/bench_prefill.py [--only 2/8] [--json FILE]

As the peers were timed: q and k normalised beforehand, fp32 states given and returned, graphs of 5 calls over one set
of buffers. Correctness is ``bench_chunk.py``'s and the tests'; here what comes out must only be finite.
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

ROWS = list(peers.PREFILL) if ON_GPU else [(1, 2, "2x100"), (1, 2, "130+5")]
HEAD_DIM = 128 if ON_GPU else 64


def row(num_k_heads: int, num_v_heads: int, sequences: str) -> dict[str, Any]:
    """The figures of one row; on a CPU only that it runs."""
    tokens = lengths(sequences)
    shape = cases.ModelShapes(num_k_heads, num_v_heads, HEAD_DIM, HEAD_DIM)
    make = Inputs(0)
    inputs = make.delta(shape, 1, sum(tokens), raw=False)
    states, offsets = make.pool(shape, len(tokens)), make.offsets(tokens)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return gdn_kernels.chunk_gated_delta_rule(**inputs, initial_state=states, cu_seqlens=offsets)

    with torch.no_grad():
        results = call()
        assert all(x.isfinite().all() for x in results), (num_k_heads, num_v_heads, sequences)
        moved = sum(x.nbytes for x in (*inputs.values(), states, offsets, *results) if isinstance(x, torch.Tensor))
        found = peers.PREFILL.get((num_k_heads, num_v_heads, sequences), {})
        facts = {"heads": f"{num_k_heads}/{num_v_heads}", "sequences": sequences, "floor_us": timing.floor_us(moved)}
        facts |= {"peers_us": found, "best_peer_us": min(found.values(), default=None)}
        if ON_GPU:
            facts["gpu_us"] = timing.graph_us([call], 5)
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    print(f"{'heads':>6} {'sequences':>11} {'us':>8} {'best':>8} {'best/us':>8} {'fla/us':>8} {'us/floor':>8}")
    rows = []
    for heads_and_sequences in ROWS:
        if options.only not in ("", "{}/{}".format(*heads_and_sequences)):
            continue
        facts = row(*heads_and_sequences)
        rows.append(facts)
        us, best, fla = facts.get("gpu_us"), facts["best_peer_us"], facts["peers_us"].get("fla")
        ratios = [a / us if a and us else None for a in (best, fla)] + [us / facts["floor_us"] if us else None]
        numbers = "".join(" " * 8 + "-" if x is None else f" {x:8.1f}" for x in (us, best))
        numbers += "".join(" " * 8 + "-" if x is None else f" {x:8.2f}" for x in ratios)
        print(f"{facts['heads']:>6} {facts['sequences']:>11}{numbers}", flush=True)
    for who in ("best_peer_us", "fla"):
        each = [(r["best_peer_us"] if who == "best_peer_us" else r["peers_us"].get(who), r.get("gpu_us")) for r in rows]
        found = [peer / us for peer, us in each if peer and us]
        print(f"geometric mean of {who.removesuffix('_us')} / ours over {len(found)} rows: {geometric_mean(found):.2f}")
    if options.json:
        options.json.write_text(json.dumps({**timing.versions(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
