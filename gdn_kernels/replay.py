"""Replay: repeat an operator call whose launches are known, for little more host time than the launches themselves.

A GPU call is decided by its signature: the operator's plain arguments, and each tensor's dtype, shape, strides, device
and alignment. The first call of a signature is checked, planned and launched the ordinary way while a
:class:`Recording` notes what it allocates and which compiled kernels it launches on which pointers. Later calls of the
signature allocate the same, put the new pointers in and launch the compiled kernels, without Triton's argument binding
(20 us a launch on the host of an H100, 2026-11-23, against 5) and without checking again what the signature decides.

Nothing is keyed by a tensor's identity. A pointer that the recording cannot trace to an argument or an allocation, or a
Triton whose compiled kernels look different, makes the signature unrepeatable: it keeps the ordinary path, and
:func:`reasons` says why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_thread = threading.local()
_reasons: dict[str, str] = {}

# Of an operator: token counts are part of a signature, so a server meets some thousands. Then it starts afresh.
MAX_SIGNATURES = 8192

# What Inductor's generated code allocates with: 1.1 us where torch.empty takes 4.4. Absent, torch.empty_strided serves.
_empty_on_current_device: Callable[..., torch.Tensor] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)


def current() -> Recording | None:
    """The recording under way in this thread."""
    return getattr(_thread, "recording", None)


def reasons() -> dict[str, str]:
    """Operator -> why one of its calls could not be recorded; empty where all could."""
    return dict(_reasons)


class Recording:
    """Notes the allocations and launches of one call; a context manager."""

    def __init__(self, operator: str, inputs: list[torch.Tensor]) -> None:
        self.operator, self.device = operator, inputs[0].get_device()
        # tensor id -> (number of the pointer, bytes past it); the tensors are kept, so that no id is used twice
        self.sources = {id(tensor): (number, 0) for number, tensor in enumerate(inputs)}
        self.kept: list[Any] = list(inputs)
        self.num_inputs = len(inputs)
        self.allocations: list[tuple[torch.Tensor, bool]] = []
        self.launches: list[tuple] = []
        self.failure: str | None = None

    def __enter__(self) -> Recording:
        _thread.recording = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _thread.recording = None

    def allocated(self, tensor: torch.Tensor, zero: bool) -> None:
        self.sources[id(tensor)] = (self.num_inputs + len(self.allocations), 0)
        self.allocations.append((tensor, zero))

    def viewed(self, view: torch.Tensor, base: torch.Tensor) -> None:
        if id(base) in self.sources:
            number, offset = self.sources[id(base)]
            self.sources[id(view)] = (number, offset + view.data_ptr() - base.data_ptr())
            self.kept.append(view)

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: tuple) -> None:
        template: list[Any] = list(arguments)
        patches = []
        for position, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                if id(argument) not in self.sources:
                    self.failure = f"argument {position} of a launch is neither an argument nor an allocation"
                    return
                patches.append((position, *self.sources[id(argument)]))
                template[position] = None  # a replay must not keep the recorded call's tensors alive
        try:
            handles = compiled.run, compiled.function, compiled.packed_metadata
        except AttributeError as error:
            self.failure = f"compiled kernels of this Triton differ: {error}"
            return
        x, y, z = (*grid, 1, 1)[:3]
        self.launches.append((*handles, x, y, z, template, tuple(patches)))

    def replay(self, result: Any) -> Replay | None:
        """What repeats the call that gave ``result``; None, with a reason noted, where it cannot be repeated."""
        results = result if isinstance(result, tuple) else () if result is None else (result,)
        made = []
        shapes = [tensor for tensor, _ in self.allocations]
        for tensor in results:
            number, offset = self.sources.get(id(tensor), (-1, 0))
            if number < self.num_inputs or offset:
                self.failure = "a result is not an allocation"
                break
            # a result may be a view of all of its allocation: it is then allocated in that shape
            shapes[number - self.num_inputs] = tensor
            made.append(number - self.num_inputs)
        if self.failure is not None:
            _reasons[self.operator] = self.failure
            return None
        allocations = [
            (tuple(tensor.shape), tensor.stride(), tensor.dtype, zero)
            for tensor, (_, zero) in zip(shapes, self.allocations, strict=True)
        ]
        kind = tuple if isinstance(result, tuple) else None if result is None else torch.Tensor
        return Replay(self.device, allocations, self.launches, made, kind)


class Replay:
    """Repeats a recorded call on new pointers, on the current stream of its device."""

    __slots__ = ("allocations", "device", "launches", "made", "single")

    def __init__(self, device: int, allocations: list, launches: list, made: list[int], kind: type | None) -> None:
        self.device, self.allocations, self.launches = device, allocations, launches
        self.made = tuple(made) if kind is tuple else None
        self.single = made[0] if kind is torch.Tensor else None

    def __call__(self, pointers: list[int]) -> Any:
        """``pointers``: of the call's tensors, in the order of its arguments; the list is used up."""
        device = self.device
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return self(pointers)
        tensors = []
        for shape, stride, dtype, zero in self.allocations:
            if zero:
                tensor = torch.zeros(shape, dtype=dtype, device=device)
            elif _empty_on_current_device is not None:
                tensor = _empty_on_current_device(shape, stride, dtype)
            else:
                tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            tensors.append(tensor)
            pointers.append(tensor.data_ptr())
        stream = torch._C._cuda_getCurrentRawStream(device)
        for run, function, metadata, x, y, z, template, patches in self.launches:
            arguments = template.copy()
            for position, number, offset in patches:
                arguments[position] = pointers[number] + offset
            run(x, y, z, stream, function, metadata, None, None, None, *arguments)
        if self.single is not None:
            return tensors[self.single]
        return None if self.made is None else tuple([tensors[number] for number in self.made])


def signature(values: Any, key: list, pointers: list[int]) -> None:
    """Append to ``key`` what decides a call about ``values``, and to ``pointers`` where its tensors are."""
    for value in values:
        if isinstance(value, torch.Tensor):
            pointer = value.data_ptr()
            pointers.append(pointer)
            key += (value.dtype, value.shape, value.stride(), pointer & 15, value.get_device())
        else:
            key.append(value)
