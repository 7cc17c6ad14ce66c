"""Registration: from a schema to an operator with a fake, a CPU and a GPU implementation.

``Library.define`` and ``impl`` per dispatch key instead of ``torch.library.custom_op``, because the latter costs up to
80 us a call on the host for wide schemas (torch 2.13, CPU). The GPU implementation imports Triton at its first call.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch

from gdn_kernels import contracts, launch, replay

library = torch.library.Library("gdn", "DEF")

#: Every operator's name, in the order of registration.
OPERATORS: list[str] = []

Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Takes what a user may pass in more than one rank: ``lift`` the arguments, ``lower`` the result again."""

    applies: Callable[..., bool]
    lift: Call
    lower: Call


def define(
    schema: str,
    *,
    fake: Call,
    module: str | None = None,
    call: Call | None = None,
    adapter: Adapter | None = None,
    backward: Call | None = None,
) -> None:
    """Register ``schema`` under ``gdn``; ``contracts`` holds its checks under its name.

    With ``module``, ``reference/<module>.py`` and ``kernels/<module>.py`` hold its CPU and GPU implementation under its
    name, and GPU calls are recorded and replayed by their signature; else ``call`` is both. ``backward``, of
    ``reference/backward.py``, makes it differentiable in its positional arguments, which then are all tensors.
    """
    name = schema[: schema.index("(")]
    check: Call = getattr(contracts, name)

    def checked(call: Call) -> Call:
        def run(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return call(*args, **kwargs)

        def implementation(*args: Any, **kwargs: Any) -> Any:
            contracts.gradients(name, (*args, *kwargs.values()))
            if adapter is not None and adapter.applies(*args):
                return adapter.lower(run(*adapter.lift(*args), **kwargs))
            return run(*args, **kwargs)

        return implementation

    if module is None:
        on_cpu = on_gpu = checked(call)
    else:
        on_cpu = checked(getattr(importlib.import_module(f"gdn_kernels.reference.{module}"), name))
        on_gpu = replay.dispatcher(f"gdn::{schema}", checked(_lazy_kernel(module, name)), launch.replayable)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"gdn::{name}", checked(fake), lib=library)
    library.impl(name, on_cpu, "CPU")
    library.impl(name, on_gpu, "CUDA")
    if backward is not None:
        torch.library.register_autograd(f"gdn::{name}", _gradients(backward), setup_context=_keep, lib=library)
    OPERATORS.append(name)


def _keep(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _gradients(backward: Call) -> Call:
    def gradients(ctx: Any, *grads: torch.Tensor) -> Any:
        inputs, given = ctx.saved_tensors, len(ctx.needs_input_grad)  # the dispatcher drops trailing defaults
        needs = (*ctx.needs_input_grad, *[False] * (len(inputs) - given))
        return backward(grads, inputs, needs, **ctx.options)[:given]

    return gradients


def _lazy_kernel(module: str, name: str) -> Call:
    found: list[Call] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(f"gdn_kernels.kernels.{module}"), name))
        return found[0](*args, **kwargs)

    return call
