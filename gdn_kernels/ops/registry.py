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
from torch._C import DispatchKey

from gdn_kernels import contracts, launch, replay

library = torch.library.Library("gdn", "DEF")

#: Every operator's name, in the order of registration.
OPERATORS: list[str] = []

Call = Callable[..., Any]

# Each operator's GPU implementation, for :func:`direct`.
_on_gpu: dict[str, Call] = {}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Takes what a user may pass in more than one form: ``lift`` gives the positional and the keyword arguments that
    the checks and the implementations know, ``lower`` the result, from that and the positional arguments as they came.
    """

    applies: Callable[..., bool]
    lift: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    lower: Call


def define(
    schema: str,
    *,
    fake: Call,
    module: str | None = None,
    call: Call | None = None,
    adapter: Adapter | None = None,
    backward: Call | None = None,
    keep: Call | None = None,
) -> None:
    """Register ``schema`` under ``gdn``; ``contracts`` holds its checks under its name.

    With ``module``, ``reference/<module>.py`` and ``kernels/<module>.py`` hold its CPU and GPU implementation under its
    name, and GPU calls are recorded and replayed by their signature; else ``call`` is both. ``backward``, of
    ``reference/backward.py``, makes it differentiable in its positional arguments, which then are all tensors; it takes
    the gradients of the results, these arguments, which of their gradients are asked for, and the options. ``keep``
    gives the arguments as ``backward`` needs them, before any is written; one that is written has no gradient.
    """
    name = schema[: schema.index("(")]
    check: Call = getattr(contracts, name)

    def checked(call: Call) -> Call:
        def run(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return call(*args, **kwargs)

        def implementation(*args: Any, **kwargs: Any) -> Any:
            contracts.gradients(name, (*args, *kwargs.values()))
            if adapter is None or not adapter.applies(*args, **kwargs):
                return run(*args, **kwargs)
            lifted, options = adapter.lift(*args, **kwargs)
            return adapter.lower(run(*lifted, **options), *args)

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
    _on_gpu[name] = on_gpu
    operator = getattr(torch.ops.gdn, name).default
    library.impl(name, _without_autocast(operator), "AutocastCPU")
    if backward is not None:
        implementations = {DispatchKey.CPU: on_cpu, DispatchKey.CUDA: on_gpu}
        differentiable = _differentiable(operator, implementations, check, backward, keep)
        library.impl(name, differentiable, "Autograd", with_keyset=True)
    OPERATORS.append(name)


def direct(name: str) -> Call:
    """The operator ``name``, called without the dispatcher where that would come straight to its GPU implementation.

    :func:`replay.is_straight` says where. The dispatcher takes 4 to 7 us a call for a wide schema (H100 host and a CPU
    machine, torch 2.11 and 2.13).
    """
    operator, implementation = getattr(torch.ops.gdn, name).default, _on_gpu[name]

    def call(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (implementation if replay.is_straight(first) else operator)(first, *args, **kwargs)

    return call


def _without_autocast(operator: Any) -> Call:
    """What runs under ``torch.autocast("cpu")``: the operator, whose PyTorch implementation picks its own dtypes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return operator(*args, **kwargs)

    return call


def _differentiable(
    operator: Any, implementations: dict[Any, Call], check: Call, backward: Call, keep: Call | None
) -> Call:
    """What runs at the Autograd key: where an input requires a gradient, the operator with ``backward``, else without.

    ``torch.library.register_autograd`` does the same, and costs 10 us a call that needs no gradient: it enters a guard
    and dispatches again (torch 2.13, CPU). Here a call whose next stop is the CPU's or the GPU's implementation, since
    no mode and no tensor subclass stands between, goes there: 2 us. All others are dispatched again.
    """
    below = torch._C._after_autograd_keyset
    arguments = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.kwarg_only}
    positional = len(arguments) - len(defaults)
    written = {i: a.name for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write}
    known: dict[int, Call | None] = {}

    def next_stop(keyset: Any) -> Call | None:
        # ADInplaceOrView has nothing to do: nothing is registered there
        left = (keyset & below).remove(DispatchKey.ADInplaceOrView)
        known[keyset.raw_repr()] = found = implementations.get(left.highestPriorityTypeId())
        return found

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, options: dict[str, Any], *inputs: torch.Tensor | None) -> Any:
            # the dispatcher leaves out what equals its default
            kept, ctx.options = (*inputs, *[None] * (positional - len(inputs))), defaults | options
            if keep is not None:
                check(*kept, **ctx.options)
                kept = keep(*kept, **ctx.options)
            ctx.save_for_backward(*kept)
            return operator.redispatch(keyset & below, *inputs, **options)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            needs = ctx.needs_input_grad[2:]
            absent = (False,) * (positional - len(needs))
            found = backward(grads, ctx.saved_tensors, (*needs, *absent), **ctx.options)
            return None, None, *found[: len(needs)]

    def call(keyset: Any, *inputs: torch.Tensor | None, **options: Any) -> Any:
        if torch.is_grad_enabled():
            for x in inputs:
                if x is not None and x.requires_grad:
                    for position, argument in written.items():
                        contracts.written(operator.name(), argument, inputs[position])
                    return Differentiable.apply(keyset, options, *inputs)
        raw = keyset.raw_repr()
        implementation = known[raw] if raw in known else next_stop(keyset)
        if implementation is None:
            return operator.redispatch(keyset & below, *inputs, **options)
        return implementation(*inputs, **options)

    return call


def _lazy_kernel(module: str, name: str) -> Call:
    found: list[Call] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(f"gdn_kernels.kernels.{module}"), name))
        return found[0](*args, **kwargs)

    return call
