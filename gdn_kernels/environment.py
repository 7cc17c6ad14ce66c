"""What runs where: versions, devices, and which implementation each operator uses on a device, and why."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import gdn_kernels
import gdn_kernels.replay

#: The split point has no kernel of its own: it calls conv and delta-rule operators.
SPLIT_POINT = "linear_attention_with_output"
#: How the names of operators end that write e4m3, which not every GPU has.
FP8 = "_fp8"
#: How the names of operators begin that prefill in chunks.
CHUNKED = "chunk_"


def operator_names() -> list[str]:
    """Every operator registered under ``torch.ops.gdn``, sorted."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix("gdn::").split(".")[0] for name in names if name.startswith("gdn::")})


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of the package and of what it stands on; None for what is not installed. Imports nothing new."""
    return {
        "gdn_kernels": gdn_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton") or _version("pytorch-triton-rocm"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def devices() -> list[dict[str, Any]]:
    """The CPU, then every GPU that torch sees."""
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        target = gdn_kernels.launch.target(torch.device("cuda", index))
        found.append(
            {
                "device": f"cuda:{index}",
                "name": facts.name,
                "target": f"{target.backend} {target.arch}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "multiprocessors": facts.multi_processor_count,
            }
        )
    return found


def default_device() -> torch.device:
    """The first GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prefill_scan(target: gdn_kernels.launch.Target) -> str:
    """Which scan chunked prefill uses on ``target``, and how it cuts long sequences."""
    if not gdn_kernels.launch.has_descriptors(target):
        return "the scan is the portable one in Triton"
    policy = gdn_kernels.launch.prefill_policy()
    return f"the scan is Hopper's in Gluon where TMA can address the tensors, policy {policy}; else the portable one"


def implementation(operator: str, device: torch.device) -> dict[str, str]:
    """Which implementation ``operator`` uses for tensors on ``device``: ``reference``, ``triton`` or ``none``, and why.

    The device of the tensors alone decides; no operator falls back from one implementation to another.
    """
    key = "CUDA" if device.type == "cuda" else "CPU"
    name = "triton" if key == "CUDA" else "reference"
    kernels = f"gdn::{operator}"
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(kernels, key) or (
        torch._C._dispatch_has_kernel_for_dispatch_key(kernels, "CompositeExplicitAutograd")
    )
    if not registered:
        return {"implementation": "none", "why": f"nothing is registered for {key} tensors"}
    if name == "reference":
        why = "CPU tensors use the PyTorch implementation"
        if not torch.cuda.is_available():
            why += "; torch sees no GPU"
    elif versions()["triton"] is None:
        return {"implementation": "none", "why": "GPU tensors need Triton, which is not installed"}
    else:
        target = gdn_kernels.launch.target(device)
        if operator.endswith(FP8) and not gdn_kernels.launch.has_fp8(target):
            return {"implementation": "none", "why": f"{target.backend} {target.arch} has no e4m3"}
        why = f"GPU tensors use the Triton kernel, built for {target.backend} {target.arch}"
        if operator != SPLIT_POINT:
            failed = gdn_kernels.replay.reasons().get(operator)
            why += f"; ordinary launches: {failed}" if failed else "; recorded calls are replayed"
        if operator.startswith(CHUNKED):
            why += f"; {prefill_scan(target)}"
    if operator == SPLIT_POINT:
        why += "; it runs convolution and delta-rule operators"
    return {"implementation": name, "why": why}


def implementations(device: torch.device) -> dict[str, dict[str, str]]:
    """:func:`implementation` of every operator."""
    return {operator: implementation(operator, device) for operator in operator_names()}


def collect() -> dict[str, Any]:
    """All of the above, ready for JSON; implementations for the CPU and, where there is one, the first GPU."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "versions": versions(),
        "devices": devices(),
        "default_device": default_device().type,
        "operators": {kind: implementations(torch.device(kind)) for kind in kinds},
    }


def format_report(found: dict[str, Any]) -> str:
    """:func:`collect`'s answer as text."""
    lines = ["versions"]
    lines += [f"  {name:<12} {value}" for name, value in found["versions"].items() if value is not None]
    lines += ["", "devices"]
    for device in found["devices"]:
        facts = ", ".join(f"{name} {value}" for name, value in device.items() if name not in ("device", "name"))
        lines.append(f"  {device['device']:<12} {device['name']}: {facts}")
    for kind, operators in found["operators"].items():
        mark = " (default)" if kind == found["default_device"] else ""
        lines += ["", f"operators for {kind} tensors{mark}"]
        width = max(map(len, operators), default=0)
        lines += [f"  {name:<{width}}  {use['implementation']:<10} {use['why']}" for name, use in operators.items()]
    return "\n".join(lines)
