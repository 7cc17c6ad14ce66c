"""Replay: repeat an operator call whose launches are known, for little more host time than the launches themselves.

A GPU call is decided by its signature: the operator's plain arguments, and each tensor's dtype, shape, strides, device
and alignment. The first call of a signature is checked, planned and launched the ordinary way while a
:class:`Recording` notes what it allocates and which compiled kernels it launches on which pointers. Later calls of the
signature allocate the same, put the new pointers in and launch the compiled kernels, without Triton's argument binding
(20 us a launch on the host of an H100, 2026-11-23, against 5) and without checking again what the signature decides.

Both halves of that are written as straight lines of Python and compiled once: an operator's signature from its schema,
a replay from the form of its recording. Loops over arguments took as long as the rest (6 of 12 us there).

Nothing is keyed by a tensor's identity. A pointer that the recording cannot trace to an argument or an allocation, or a
Triton whose compiled kernels look different, makes the signature unrepeatable: it keeps the ordinary path, and
:func:`reasons` says why.

What prepares a call, picks options and makes views, can be repeated together with it: :func:`repeatable`.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_thread = threading.local()
_reasons: dict[str, str] = {}
# Of each operator: its signatures' replays with what recognises them, and the last one.
_recorded: list[tuple[dict, list]] = []

# Of an operator: token counts are part of a signature, so a server meets some thousands. Then it starts afresh.
MAX_SIGNATURES = 8192

# Bytes that the parts of an allocation are aligned to, as PyTorch's allocations are.
ALIGNMENT = 512

# What Inductor's generated code allocates with: 1.1 us where torch.empty takes 4.4. Absent, torch.empty_strided serves.
_empty_on_current_device: Callable[..., torch.Tensor] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)


def _trusted(guards: Any) -> Any:
    """Dynamo's guards over tensors, if they tell apart here what they have to; it is no public interface."""
    try:
        x = torch.zeros(2, 3, device="cpu")
        check = guards(x, dynamic_dims_sizes=[[2, 3]], dynamic_dims_strides=[[3, 1]]).check
        others = (x.view(3, 2), x.view(3, 2).t(), x.double(), x.detach().requires_grad_(), x[None])
        return guards if check(x.clone()) and not any(map(check, others)) else None
    except (AttributeError, TypeError, RuntimeError):
        return None


# What Dynamo's guards compare tensors with: nine in 0.9 us, where Python takes 4 to read what decides. They hold the
# dispatch state of a thread, which inference mode changes, and never hold where one tensor comes twice: after
# MAX_GUARDS, as without any, a signature is compared in Python.
_TensorGuards = _trusted(getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None))
MAX_GUARDS = 4

_NOTHING = (None, None, None)

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Where torch does not say whether modes stand between, one may.
_num_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_is_function_mode_on = getattr(torch._C, "_is_torch_function_mode_enabled", lambda: True)


def is_straight(first: torch.Tensor) -> bool:
    """Whether the dispatcher would take an operator's call, whose first argument this is, straight to its GPU
    implementation: nothing traces or records it, no gradient is asked for, no mode or tensor subclass stands between.
    """
    return not (
        torch.compiler.is_compiling()
        or type(first) not in _PLAIN
        or not first.is_cuda
        or torch.is_grad_enabled()
        or _num_modes()
        or _is_function_mode_on()
    )


def current() -> Recording | None:
    """The recording under way in this thread."""
    return getattr(_thread, "recording", None)


def forget() -> None:
    """Record every signature afresh: something that decides launches, and is no argument, has changed."""
    for known, last in _recorded:
        known.clear()
        last[0] = _NOTHING


def reasons() -> dict[str, str]:
    """Operator -> why one of its calls could not be recorded; empty where all could."""
    return dict(_reasons)


# ---------------------------------------------------------------------------------------------------------------
# Recording a call
# ---------------------------------------------------------------------------------------------------------------


class Patch(NamedTuple):
    """An argument of a launch that holds a pointer: as it is, or in what ``make`` makes of it and ``constants``."""

    position: int
    number: int
    offset: int  # bytes past the pointer of that number
    make: Callable[..., Any] | None = None
    constants: tuple = ()


class Descriptor:
    """What Triton's launcher reads of a tensor descriptor: made for one launch, and its own base."""

    __slots__ = ("padding", "pointer", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, pointer: int, shape: tuple, strides: tuple, padding: str, round_f32_to_tf32: bool) -> None:
        self.pointer = pointer
        self.shape = shape
        self.strides = strides
        self.padding = padding
        self.round_f32_to_tf32 = round_f32_to_tf32

    @property
    def base(self) -> Descriptor:
        return self

    def data_ptr(self) -> int:
        return self.pointer


def _fills(view: torch.Tensor, allocation: torch.Tensor, zero: bool) -> bool:
    """Whether an allocation in the shape of ``view``, which begins where this one does, is as good as this one."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return view.numel() == allocation.numel() == extent and (view.is_contiguous() or not zero)


def _is_descriptor(argument: Any) -> bool:
    return hasattr(argument, "base") and hasattr(argument, "block_shape")


class Recording:
    """Notes the allocations and launches of one call; a context manager."""

    def __init__(self, operator: str, inputs: list[torch.Tensor | None]) -> None:
        """``inputs``: what the call has for each tensor argument of the operator, in the schema's order."""
        self.operator = operator
        self.kept: list[Any] = [tensor for tensor in inputs if tensor is not None]
        self.device = self.kept[0].get_device()
        # tensor id -> (number of the pointer, bytes past it); the tensors are kept, so that no id is used twice
        self.sources = {id(tensor): (number, 0) for number, tensor in enumerate(inputs) if tensor is not None}
        self.num_inputs = len(inputs)
        self.allocations: list[tuple[torch.Tensor, bool]] = []
        self.launches: list[tuple[Any, tuple[int, int, int], list[Any], list[Patch]]] = []
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

    def source(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Number of the pointer that ``tensor`` is found from, and bytes past it: its own, or that of the only input or
        allocation that begins where it does, or else shares its storage."""
        found = self.sources.get(id(tensor))
        if found is None:
            storage, pointer = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
            known = (*self.kept, *(allocation for allocation, _ in self.allocations))
            bases = [base for base in known if base.untyped_storage().data_ptr() == storage]
            bases = [base for base in bases if base.data_ptr() == pointer] or bases
            places = set()
            for base in bases:
                number, offset = self.sources[id(base)]
                places.add((number, offset + pointer - base.data_ptr()))
            if len(places) == 1:
                found = places.pop()
        return found

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: tuple) -> None:
        template: list[Any] = list(arguments)
        patches = []
        for position, argument in enumerate(arguments):
            made: tuple = ()
            tensor = argument
            if _is_descriptor(argument):
                if hasattr(argument, "pixel_box_lower_corner"):
                    self.failure = f"argument {position} of a launch is an im2col descriptor"
                    return
                shape, strides = tuple(argument.shape), tuple(argument.strides)
                rounding = getattr(argument, "round_f32_to_tf32", False)  # not in Triton 3.6
                made = (Descriptor, (shape, strides, argument.padding, rounding))
                tensor = argument.base
            elif not isinstance(argument, torch.Tensor):
                continue
            source = self.source(tensor)
            if source is None:
                what = "the base of argument" if made else "argument"
                self.failure = f"{what} {position} of a launch is neither an argument nor an allocation"
                return
            patches.append(Patch(position, *source, *made))
            template[position] = None  # a replay must not keep the recorded call's tensors alive
        self.launches.append((compiled, (*grid, 1, 1)[:3], template, patches))

    def replay(self, result: Any) -> Callable[..., Any] | None:
        """What repeats the call that gave ``result``, a function of the pointers of ``inputs``; None, with a reason
        noted, where it cannot be repeated."""
        results = result if isinstance(result, tuple) else () if result is None else (result,)
        made = []
        shapes = [tensor for tensor, _ in self.allocations]
        for tensor in results:
            number, offset = self.source(tensor) or (-1, 0)
            if number < self.num_inputs or offset or not _fills(tensor, *self.allocations[number - self.num_inputs]):
                self.failure = "a result is not an allocation"
                break
            # a result may be a view of all of its allocation: it is then allocated in that shape
            shapes[number - self.num_inputs] = tensor
            made.append(number - self.num_inputs)
        try:
            starts = [_start(*launch) for launch in self.launches]
        except AttributeError as error:
            self.failure = f"compiled kernels of this Triton differ: {error}"
        if self.failure is not None:
            _reasons[self.operator] = self.failure
            return None
        allocations = [
            (tuple(tensor.shape), tensor.stride(), tensor.dtype, zero)
            for tensor, (_, zero) in zip(shapes, self.allocations, strict=True)
        ]
        returned = "(" + "".join(f"t{number}, " for number in made) + ")" if isinstance(result, tuple) else None
        returned = f"t{made[0]}" if isinstance(result, torch.Tensor) else returned
        return _written(self.num_inputs, self.device, allocations, set(made), starts, returned)


# ---------------------------------------------------------------------------------------------------------------
# Triton's launcher: the one place that knows it
# ---------------------------------------------------------------------------------------------------------------


def _start(compiled: Any, grid: tuple[int, int, int], template: list[Any], patches: list[Patch]) -> tuple:
    """What launches ``compiled``, the arguments before and after the stream, and the kernel's own, which follow them.

    Raises AttributeError where compiled kernels of this Triton are made otherwise.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    hooks = (None, None, None)  # metadata for launch hooks, and the hooks: with hooks nothing is replayed
    if type(run).__name__ == "CudaLauncher" and not hasattr(run, "kernel_signature"):
        # Triton 3.6: its __call__ only adds the scratch memory of kernels that need some, in 1 us
        if run.global_scratch_size == run.profile_scratch_size == 0:
            flags = (run.launch_cooperative_grid, run.launch_pdl, None, None)
            launch, *own = _expanded(run.launch, template, patches) or (run.launch, template, patches)
            return launch, grid, (function, *flags, metadata, *hooks), *own
    return run, grid, (function, metadata, *hooks), template, patches


def _expanded(launch: Any, template: list[Any], patches: list[Patch]) -> tuple[Any, list[Any], list[Patch]] | None:
    """Triton 3.6's launcher in C and the arguments it takes, where ``launch`` is the loop in Python that puts a tensor
    map, a shape and strides in each descriptor's place; None where there are no descriptors, or where it is another."""
    by_position = {patch.position: patch for patch in patches}
    descriptors = [position for position, patch in by_position.items() if patch.make is Descriptor]
    try:
        known = dict(zip(launch.__code__.co_freevars, (cell.cell_contents for cell in launch.__closure__), strict=True))
        launcher, metas = known["launcher"], dict(zip(descriptors, known["tensordesc_meta"], strict=True))
        names = launch.__globals__
        fills = names["make_tensordesc_arg"].__code__
        fill = names["triton"].runtime.driver.active.utils.fill_tma_descriptor
        if set(descriptors) != known["tensordesc_indices"] or "padding" not in fills.co_varnames:
            return None
        arguments: list[Any] = []
        moved = []
        for position, value in enumerate(template):
            here = len(arguments)
            arguments.append(value)
            if position not in by_position:
                continue
            patch = by_position[position]._replace(position=here)
            if patch.make is Descriptor:
                meta, (shape, strides, padding, _) = metas[position], patch.constants
                if meta["fp4_padded"] or strides[-1] != 1:
                    return None
                kind = names["TMA_DTYPE_DEVICE_TO_HOST"][meta["elem_type"]]
                encoding = meta["swizzle"], meta["elem_size"], kind, tuple(meta["block_size"])
                patch = patch._replace(make=fill, constants=(*encoding, shape, strides, int(padding == "nan")))
                arguments += shape + strides
            moved.append(patch)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return launcher, arguments, moved


# ---------------------------------------------------------------------------------------------------------------
# Writing a replay
# ---------------------------------------------------------------------------------------------------------------


@functools.cache
def _factory(source: str) -> Callable[..., Any]:
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # written below, from counts and names of this file
    return namespace["make"]


def _empty(shape: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


def _zeros(shape: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="cuda")


def _renew(memo: list, number: int, pointer: int, make: Callable[..., Any], *constants: Any) -> Any:
    value = make(pointer, *constants)
    memo[number] = pointer, value
    return value


def _on_device(device: int, call: Callable[..., Any], *pointers: int | None) -> Any:
    with torch.cuda.device(device):
        return call(*pointers)


def _written(
    num_inputs: int, device: int, allocations: list, results: set[int], launches: list, returned: str | None
) -> Callable:
    """``replay(p0, p1, ...)``: allocates, launches on the current stream of ``device``, gives what ``returned`` says.

    Shapes, strides and numbers are its free variables: its text, and so its code, is that of all calls of this form.
    What an argument is made of, a pointer and constants, is made once where several launches take it, and again only
    for another pointer than in the call before: a tensor map takes about 0.5 us, and allocations mostly come back.
    Allocations that are no results are parts of one, which takes as long as each would.
    """
    constants: dict[str, Any] = {
        "device": device,
        "on_device": _on_device,
        "current_device": torch._C._cuda_getDevice,
        "stream_of": torch._C._cuda_getCurrentRawStream,
        "empty": _empty_on_current_device or _empty,
    }
    pointers = [f"p{number}" for number in range(num_inputs)]
    used = {patch.number for *_, patches in launches for patch in patches}
    lines = []
    scratch, size = {}, 0
    for i, (shape, _, dtype, zero) in enumerate(allocations):
        if i not in results and not zero:
            scratch[i] = size
            size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    if len(scratch) > 1:
        constants |= {"shape": (size,), "stride": (1,), "dtype": torch.uint8}
        lines.append("t = empty(shape, stride, dtype); q = t.data_ptr()")
    else:
        scratch = {}
    for i, (shape, stride, dtype, zero) in enumerate(allocations):
        if i in scratch:
            constants[f"part{i}"] = scratch[i]
            pointers.append(f"q + part{i}")
            continue
        constants |= {f"shape{i}": shape, f"stride{i}": stride, f"dtype{i}": dtype}
        lines.append(f"t{i} = {'zeros' if zero else 'empty'}(shape{i}, stride{i}, dtype{i})")
        pointers.append(f"q{i}")
        if num_inputs + i in used:
            lines.append(f"q{i} = t{i}.data_ptr()")
    if any(zero for *_, zero in allocations):
        constants["zeros"] = _zeros
    lines.append("stream = stream_of(device)")
    # what is made: pointer, function and constants -> number
    memo: dict[tuple, int] = {}
    for i, (start, before, after, template, patches) in enumerate(launches):
        arguments = ["None"] * (len(before) + 1 + len(after) + len(template))
        for position, value in enumerate((*before, None, *after, *template)):
            if value is not None:
                arguments[position] = f"c{i}_{position}"
                constants[f"c{i}_{position}"] = value
        arguments[len(before)] = "stream"
        for own, number, offset, make, made_of in patches:
            position = own + len(before) + 1 + len(after)
            pointer = pointers[number]
            if offset:
                pointer += f" + c{i}_{position}"
                constants[f"c{i}_{position}"] = offset
            if make is not None:
                what = number, offset, make, made_of
                if what not in memo:
                    known = memo[what] = len(memo)
                    given = {f"given{known}_{j}": value for j, value in enumerate(made_of)}
                    constants |= {f"make{known}": make, **given}
                    again = ", ".join(("memo", f"{known}", pointer, f"make{known}", *given))
                    lines.append(f"m = memo[{known}]; d{known} = m[1] if m[0] == {pointer} else renew({again})")
                pointer = f"d{memo[what]}"
            arguments[position] = pointer
        constants[f"start{i}"] = start
        lines.append(f"start{i}({', '.join(arguments)})")
    if memo:
        constants |= {"memo": [(None, None)] * len(memo), "renew": _renew}
    inputs = ", ".join(pointers[:num_inputs])
    source = f"""
def make({", ".join(constants)}):
    def replay({inputs}):
        if current_device() != device:
            return on_device(device, replay, {inputs})
        {"; ".join(lines)}
        return {returned}
    return replay
"""
    return _factory(source)(**constants)


# ---------------------------------------------------------------------------------------------------------------
# Writing a signature
# ---------------------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """One of a call's: a tensor, or a plain argument that decides what the call does.

    may_be_first: a tensor that is written, and may be the call's first.
    """

    name: str
    is_tensor: bool
    is_optional: bool
    is_keyword: bool
    default: tuple[Any, ...]  # of none or one
    may_be_first: bool


def dispatcher(schema: str, call: Callable[..., Any], replayable: Callable[[], bool]) -> Callable[..., Any]:
    """``call``, recorded once for each signature and replayed from then on: a function of the arguments of ``schema``.

    It takes the ordinary path where ``replayable()`` is false, and where a tensor requires a gradient. The signature of
    the last replay is recognised by its plain arguments and by guards over its tensors, if all are aligned to 16 bytes;
    any other is put together and looked up.
    """
    parsed = torch._C.parse_schema(schema)
    parameters = [
        Parameter(
            argument.name,
            str(argument.type) in ("Tensor", "Optional[Tensor]"),
            str(argument.type) == "Optional[Tensor]",
            argument.kwarg_only,
            (argument.default_value,) if argument.has_default_value() else (),
            argument.alias_info is not None,
        )
        for argument in parsed.arguments
    ]
    return _recognised(parsed.name.split("::")[-1], parameters, call, replayable)


def repeatable(replayable: Callable[[], bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: a function that prepares and makes one operator call is recorded and replayed together with it.

    Only where :func:`is_straight`. Then of what the function does before and after the operator nothing is left but the
    shape of its results.

    Its annotations say which arguments are tensors, ``torch.Tensor`` or ``torch.Tensor | None``; the first is one. What
    the function does must follow from its plain arguments and the tensors' dtypes, shapes, strides and devices, and all
    that it has the GPU do is the operator's. It returns what the operator allocates, or views that fill that, or None;
    a string, the reason for which a call is left to someone else, is returned and never repeated. Views are traced to
    the argument that begins where they do; where two do, as one tensor given twice, the call is not repeated.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = [
            Parameter(
                name,
                str(parameter.annotation).startswith("torch.Tensor"),
                str(parameter.annotation) == "torch.Tensor | None",
                parameter.kind is parameter.KEYWORD_ONLY,
                () if parameter.default is parameter.empty else (parameter.default,),
                False,
            )
            for name, parameter in inspect.signature(function).parameters.items()
        ]
        found = _recognised(function.__name__, parameters, function, replayable, is_straight)
        return functools.update_wrapper(found, function)

    return decorate


def _recognised(
    name: str,
    parameters: list[Parameter],
    call: Callable[..., Any],
    replayable: Callable[[], bool],
    applies: Callable[[torch.Tensor], bool] | None = None,
) -> Callable[..., Any]:
    """``call`` as :func:`dispatcher` says; where there is ``applies``, only if that holds for the first argument."""
    taken, given, plain, facts, grads, lines, tensors, guarded = [], [], [], [], [], [], [], []
    constants: dict[str, Any] = {"applies": applies}
    for parameter in parameters:
        this = parameter.name
        if parameter.is_keyword and "*" not in taken:
            taken.append("*")
        given.append(f"{this}={this}" if parameter.is_keyword else this)
        if parameter.default:
            constants[f"default_{this}"] = parameter.default[0]
            taken.append(f"{this}=default_{this}")
        else:
            taken.append(this)
        if not parameter.is_tensor:
            facts.append(this)
            plain.append(this)
            continue
        pointer = f"p{len(tensors)}"
        tensors.append(this)
        decisive = f"{this}.dtype, {this}.shape, {this}.stride(), {pointer} & 15, {this}.get_device()"
        stands_in = ""
        if parameter.is_optional:
            lines.append(f"{pointer} = None if {this} is None else {this}.data_ptr()")
            facts.append(f"None if {this} is None else ({decisive})")
            grads.append(f"{this} is not None and {this}.requires_grad")
            plain.append(f"{this} is None")
            stands_in = f"{this} is None"  # guards take a tensor for each argument
        else:
            lines.append(f"{pointer} = {this}.data_ptr()")
            facts.append(decisive)
            grads.append(f"{this}.requires_grad")
        if parameter.may_be_first and len(tensors) > 1:
            # guards do not take one tensor twice
            plain.append(f"{this} is {tensors[0]}")
            stands_in = " or ".join(filter(None, (stands_in, f"{this} is {tensors[0]}")))
        if stands_in:
            constants[f"no_{this}"] = torch.empty(0, device="cpu")
        guarded.append(f"no_{this} if {stands_in} else {this}" if stands_in else this)
    body = "; ".join(lines)
    optional = {parameter.name for parameter in parameters if parameter.is_optional}
    aligned = " | ".join(f"(p{i} or 0)" if this in optional else f"p{i}" for i, this in enumerate(tensors))
    source = f"""
def make(call, record, remember, replayable, known, last, grad_enabled, {", ".join(constants)}):
    def implementation({", ".join(taken)}):
        if {f"not applies({tensors[0]})" if applies else False}:
            return call({", ".join(given)})
        {body}
        plain = ({", ".join(plain)}{"," if plain else ""})
        recent, check, replay = last[0]
        if recent != plain or ({aligned}) & 15 or not check({", ".join(guarded)}):
            key = ({", ".join(facts)},)
            found = known.get(key)
            if found is None:
                return (record(key) if replayable() else call)({", ".join(given)})
            replay = found[0]
            if replay is None:
                return call({", ".join(given)})
            if found[2] <= {MAX_GUARDS} and not ({aligned}) & 15:
                remember(found, plain, {", ".join(guarded)})
        if not replayable() or grad_enabled() and ({" or ".join(grads)}):
            return call({", ".join(given)})
        return replay({", ".join(f"p{number}" for number in range(len(tensors)))})
    return implementation
"""
    known: dict[tuple, list] = {}
    record = functools.partial(_recorder, name, call, known, [each.name for each in parameters], tensors)
    last: list[tuple[Any, Any, Any]] = [_NOTHING]
    _recorded.append((known, last))
    remember = functools.partial(_remember, last)
    return _factory(source)(call, record, remember, replayable, known, last, torch.is_grad_enabled, **constants)


def _guards(tensors: tuple[torch.Tensor, ...]) -> Callable[..., bool] | None:
    """What says whether other tensors are like these; None where this torch has none, or makes them otherwise."""
    try:
        shapes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        return _TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
    except (AttributeError, TypeError, RuntimeError):
        return None


def _remember(last: list, found: list, plain: tuple, *tensors: torch.Tensor) -> None:
    """Make ``found``, a signature's replay, its guards and how many there were, the last one; new guards where those do
    not hold."""
    if found[1] is None or not found[1](*tensors):
        found[2] += 1
        guards = _guards(tensors) if found[2] <= MAX_GUARDS else None
        if guards is None:
            found[2], last[0] = MAX_GUARDS + 1, _NOTHING
            return
        found[1] = guards
    last[0] = plain, found[1], found[0]


def _recorder(
    operator: str, call: Callable[..., Any], known: dict, names: list[str], tensors: list[str], key: tuple
) -> Callable[..., Any]:
    """``call``, which also notes under ``key`` what repeats it."""

    def recorded(*args: Any, **kwargs: Any) -> Any:
        seen: set[int] = set()

        def apart(value: Any) -> Any:
            # one tensor given twice may be two in the signature's next call
            if isinstance(value, torch.Tensor):
                value = value.detach() if id(value) in seen else value
                seen.add(id(value))
            return value

        args, kwargs = tuple(map(apart, args)), {name: apart(value) for name, value in kwargs.items()}
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        with Recording(operator, [values[name] for name in tensors]) as recording:
            result = call(*args, **kwargs)
        if len(known) >= MAX_SIGNATURES:
            known.clear()
        known[key] = [None if isinstance(result, str) else recording.replay(result), None, 0]
        return result

    return recorded
