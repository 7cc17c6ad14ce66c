"""What an engine's kernels need to run in Triton's interpreter on a CPU: nothing of their arithmetic changes."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from typing import Any

import triton.language as tl

#: Functions of triton.language that a kernel reaches by a name of its own: the interpreter replaces only those of the
#: module, and only while a kernel runs.
ALIASES = ("exp", "exp2", "log", "log2")

_SGLANG = "sglang.kernels.ops.attention.fla"
_VLLM = "vllm.third_party.flash_linear_attention.ops"
MODULES = {
    "sglang": [
        f"{_SGLANG}.{name}"
        for name in (
            "chunk_delta_h",
            "chunk_fwd",
            "chunk_o",
            "cumsum",
            "fused_recurrent",
            "l2norm",
            "layernorm_gated",
            "op",
            "utils",
        )
    ],
    "vllm": [
        f"{_VLLM}.{name}"
        for name in (
            "chunk_delta_h",
            "chunk_o",
            "chunk_scaled_dot_kkt",
            "cumsum",
            "fused_recurrent",
            "l2norm",
            "layernorm_guard",
            "op",
            "solve_tril",
            "wy_fast",
        )
    ],
}
#: The module whose import brings in all that pins memory.
PINNING = {"vllm": "vllm.v1.attention.backends.utils"}


def settle(engine: str) -> None:
    """Device contexts do nothing, the number of multiprocessors is not asked for, no memory is pinned, aliases are
    looked up when called, and of an autotuned kernel's configurations the first is taken."""
    importlib.import_module(PINNING.get(engine, engine))
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(f"{engine}.") and "PIN_MEMORY" in vars(module):
            module.PIN_MEMORY = False
    for name in MODULES[engine]:
        module = importlib.import_module(name)
        for alias in ALIASES:
            if hasattr(module, alias):
                setattr(module, alias, _late(alias))
        for context in ("device_context", "custom_device_ctx"):
            if hasattr(module, context):
                setattr(module, context, lambda *args: contextlib.nullcontext())
        if hasattr(module, "calc_rows_per_block"):
            module.calc_rows_per_block = lambda rows, device: 4
        for kernel in vars(module).values():
            while type(kernel).__module__.startswith("triton."):
                if isinstance(getattr(kernel, "configs", None), list):
                    kernel.configs = kernel.configs[:1]
                kernel = getattr(kernel, "fn", None)


def _late(name: str) -> types.FunctionType:
    def function(x: Any) -> Any:
        return getattr(tl, name)(x)

    return function
