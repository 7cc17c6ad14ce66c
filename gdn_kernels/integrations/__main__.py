"""``python -m gdn_kernels.integrations``: what a report of a difference needs, for the engines that are installed.

Versions; each place of each plugin, with what the guard found; and the launch configurations for one model's shapes.
``report()`` in the engine's own process adds what ran there, and the shapes of each place's first call.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from gdn_kernels import launch

ENGINES = ("sglang", "vllm")


def versions() -> dict[str, str | None]:
    """Of the package, the engines and what both stand on; None for what is not installed."""
    found: dict[str, str | None] = {
        "gdn_kernels": sys.modules["gdn_kernels"].__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    for name in ("triton", *ENGINES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def configurations(shapes: launch.ModelShapes) -> dict[str, str]:
    """The configuration of each kernel for a model's shapes; those of an architecture only where there is one."""
    facts: dict[str, tuple[Any, ...]] = {
        "layer_norm_gated": (shapes.head_v_dim,),
        "causal_conv1d": (),
        "causal_conv1d_update": (),
        "recurrent": (shapes.head_k_dim,),
        "chunk_prep": (shapes.num_v_heads,),
        "chunk_hopper_scan": (shapes.head_v_dim, shapes.num_v_heads),
    }
    if torch.cuda.is_available():
        target = launch.target(torch.device("cuda"))
        facts["decode_step"] = shapes.head_k_dim, shapes.head_v_dim, target
        facts["chunk_scan"] = shapes.head_k_dim, target
    return {kernel: repr(launch.config(kernel, *known)) for kernel, known in facts.items()}


def places(engine: str) -> list[dict[str, Any]] | None:
    """Each place as the guard finds it here, None where the engine is not installed."""
    try:
        records = importlib.import_module(f"gdn_kernels.integrations.{engine}").examine()
    except RuntimeError:
        return None
    return [{"place": record.path, "state": record.state, "why": record.why} for record in records.values()]


def main(arguments: list[str] | None = None) -> int:
    """Print what was found, or write it to ``--json``; 1 where a place of an installed engine would not be replaced."""
    parser = argparse.ArgumentParser(prog="python -m gdn_kernels.integrations", description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"of {', '.join(ENGINES)}; default: both")
    parser.add_argument("--heads", nargs=2, type=int, default=(16, 32), metavar=("H", "HV"), help="of one rank")
    parser.add_argument("--sizes", nargs=2, type=int, default=(128, 128), metavar=("K", "V"))
    parser.add_argument("--json", metavar="FILE", help="write it there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.engines if name not in ENGINES]
    if unknown:
        parser.error(f"ENGINE must be one of {', '.join(ENGINES)}, got {unknown[0]}")
    shapes = launch.ModelShapes(*options.heads, *options.sizes)
    found = {
        "versions": versions(),
        "configurations": configurations(shapes),
        "places": {engine: places(engine) for engine in options.engines or ENGINES},
    }
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    for title in ("versions", "configurations"):
        print(title, *(f"  {name:<22} {value}" for name, value in found[title].items()), sep="\n")
    wrong = False
    for engine, rows in found["places"].items():
        print(engine if rows else f"{engine}: not installed")
        for row in rows or ():
            wrong = wrong or row["state"] != "replaced"
            state = "would be replaced" if row["state"] == "replaced" else row["state"]
            print("  ".join(filter(None, (f"  {state:<17}", row["place"], row["why"]))))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
