"""What the kernel tests need on a machine without a GPU: Triton's interpreter and compilation for other targets.

Child processes. Both run in processes of their own, which :func:`start_children` starts for the tests that a session
has selected; they run beside its other tests, and the tests that read their results come last.

Interpreter. ``TRITON_INTERPRET=1`` must be set before a kernel is decorated, so interpreter tests run in one child
(:func:`run_interpreter_tests`). There, :func:`install_bf16` mends the interpreter's bfloat16.

Compilation. :func:`compile_target` runs one process a target, with a time limit. In it a stand-in driver answers
Triton's questions about the GPU, the package's own launch functions compile their kernels instead of launching
them, and each binary's registers, spills and shared memory are read back.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# ---------------------------------------------------------------------------------------------------------------
# Child processes
# ---------------------------------------------------------------------------------------------------------------

CORES = max(1, min(6, os.cpu_count() or 1))

# A thread for each child. One core is for the tests of this process, until one of them waits for a child.
_threads = concurrent.futures.ThreadPoolExecutor(max_workers=CORES)
_free_cores = threading.Semaphore(max(1, CORES - 1))
_jobs: dict[Any, concurrent.futures.Future[Any]] = {}
_running: set[subprocess.Popen[str]] = set()
_ended = threading.Event()


def _run_child(command: list[str], env: dict[str, str], limit_s: int) -> subprocess.CompletedProcess[str]:
    """Run a child once a core is free for it, and end it after ``limit_s`` seconds; stderr is part of stdout."""
    with _free_cores:
        if _ended.is_set():
            raise RuntimeError("the session ended before this child began")
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes) as child:
            _running.add(child)
            try:
                output, _ = child.communicate(timeout=limit_s)
            finally:
                child.kill()
                _running.discard(child)
    return subprocess.CompletedProcess(command, child.returncode, output)


def _start(key: Any, job: Callable[..., Any], *arguments: Any) -> None:
    if key not in _jobs:
        _jobs[key] = _threads.submit(job, *arguments)


@functools.cache
def _lend_own_core() -> None:
    _free_cores.release()


def _result(key: Any) -> Any:
    """What the job gave, once it has. A process that waits runs no tests: its core is the children's from then on."""
    if not _jobs[key].done():
        _lend_own_core()
    return _jobs[key].result()


def start_children(items: Iterable[Any]) -> None:
    """Start the child processes whose results the tests ``items`` read, as many at a time as there are cores."""
    orders: dict[Target, tuple[set[str], set[str]]] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path.stem == "test_interpreter":
            _start(INTERPRETER, _run_interpreter, 900)
        elif item.path.stem == "test_compile" and params:
            cases, sweeps = orders.setdefault(params.get("target", SWEEP_TARGET), (set(), set()))
            cases.update(params[name] for name in ("case", "plain") if name in params)
            sweeps.update({params["sweep"]} if "sweep" in params else ())
    for target, (cases, sweeps) in orders.items():
        _start(target, _compile_in_child, target, cases, sweeps, 600)


def end_children() -> None:
    """End those that run and begin no more."""
    _ended.set()
    _threads.shutdown(wait=False, cancel_futures=True)
    for child in list(_running):
        child.kill()


# ---------------------------------------------------------------------------------------------------------------
# Interpreter: bfloat16
# ---------------------------------------------------------------------------------------------------------------


def bf16_to_fp32(bits: Any) -> Any:
    """fp32 numbers of the uint16 array ``bits``, in which the interpreter keeps bfloat16."""
    import numpy as np

    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: Any) -> Any:
    """uint16 bits of ``values`` rounded to bfloat16, to nearest even; a NaN stays one, overflow gives infinity."""
    import numpy as np

    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def install_bf16() -> None:
    """Make the interpreter's bfloat16 right: raised to fp32 for each operation, rounded to nearest even after it.

    Untouched, it computes on the raw bits and truncates where it casts. ``tl.sum`` and ``tl.cumsum`` of bfloat16
    raise TypeError: kernels cast to fp32 after each load. Four things more for the whole process: fp32 is cast to e4m3
    to nearest even, where the interpreter rounds ties up and carries into the exponent wrongly; numpy's floating-point
    warnings, which masked lanes cause, are silenced; Triton 3.6 loops over a bound held in a tensor under numpy 2.4
    too; and new tensors are full of NaN, so that an output left unwritten shows. Call it once, in the interpreter's
    process; a second call does nothing.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "rounds_bf16"):
        return
    builder.rounds_bf16 = True
    np.seterr(all="ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    handle = interpreter.TensorHandle

    def is_bf16(arg: Any) -> bool:
        return isinstance(arg, handle) and arg.dtype.scalar == tl.bfloat16

    def raised(arg: Any) -> Any:
        return handle(bf16_to_fp32(arg.data), tl.float32) if is_bf16(arg) else arg

    def lowered(result: Any) -> Any:
        # A comparison's result is boolean whatever the handle's dtype says.
        if result.data.dtype == np.bool_:
            return result
        return handle(fp32_to_bf16(result.data), tl.bfloat16)

    def through_fp32(name: str) -> None:
        """Have a method of the builder compute in fp32 wherever one of its operands is bfloat16."""
        plain = getattr(builder, name)

        @functools.wraps(plain)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(is_bf16(arg) for arg in args):
                return plain(self, *args, **kwargs)
            return lowered(plain(self, *(raised(arg) for arg in args), **kwargs))

        setattr(builder, name, method)

    for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_clampf", "create_erf"):
        through_fp32(name)

    # A comparison keeps its operands' dtype on the handle, so a scalar condition spread over a block is no mask.
    plain_binary_op = builder.binary_op

    def binary_op(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain_binary_op(self, *args, **kwargs)
        return handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    builder.binary_op = binary_op

    # One product of two bfloat16 is exact in fp32; the accumulator keeps its own dtype.
    plain_dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain_dot(self, raised(a), raised(b), raised(d), *args, **kwargs)
        return lowered(result) if is_bf16(d) else result

    builder.create_dot = create_dot

    plain_cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if is_bf16(src):
            if dst_type.scalar == tl.bfloat16:
                return src
            return plain_cast(self, raised(src), dst_type)
        if dst_type.scalar == tl.bfloat16:
            return handle(fp32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    builder.cast_impl = cast_impl

    plain_fp_to_fp = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.float8e4nv):
            # a GPU's conversion saturates
            values = torch.from_numpy(np.ascontiguousarray(src.data)).clamp(-448, 448).to(torch.float8_e4m3fn)
            return handle(values.view(torch.uint8).numpy(), tl.float8e4nv)
        # Other casts to fp8 and back pass through here as well: leave those to the interpreter.
        widths = {src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth}
        if 8 not in widths and tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return plain_fp_to_fp(self, src, dst_type, rounding_mode)

    builder.create_fp_to_fp = create_fp_to_fp

    # 3.6 has no way to make a bfloat16 constant.
    builder.get_bf16 = lambda self, value: handle(fp32_to_bf16(np.array([value], np.float32)), tl.bfloat16)

    def refuse_bf16(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def method(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            if input.dtype.scalar == tl.bfloat16:
                raise TypeError(f"{name} of bfloat16 in the interpreter: cast to float32 after the load")
            return plain(self, input, *args, **kwargs)

        setattr(owner, name, method)

    refuse_bf16(interpreter.ReduceOps, "sum")
    refuse_bf16(interpreter.ScanOps, "cumsum")

    plain_patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *args: Any) -> None:
        plain_patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor

    # Each call of a helper patches the language of the helper's module again, which takes longer than most helpers:
    # once a launch is enough.
    plain_patch_lang = interpreter._patch_lang
    patched: set[int] = set()

    def patch_lang(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()  # nothing to restore
        scope = plain_patch_lang(fn)
        if not patched:  # the kernel's own, restored when its launch ends
            plain_restore = scope.restore

            def restore() -> None:
                patched.clear()
                plain_restore()

            scope.restore = restore
        patched.add(module)
        return scope

    interpreter._patch_lang = patch_lang

    # It works out whether each sum and product of integers overflows, for an assertion that it makes in debug mode.
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


# ---------------------------------------------------------------------------------------------------------------
# Interpreter: the process
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModuleResult:
    """How the interpreter tests of one module went."""

    passed: int
    skipped: int
    failures: tuple[str, ...]


def interpreter_modules() -> list[str]:
    """Names of the test modules that run in the interpreter."""
    return sorted(path.stem for path in TESTS.glob("test_interpreter_*.py"))


INTERPRETER = "interpreter"


def run_interpreter_tests() -> tuple[dict[str, ModuleResult], str]:
    """Run every interpreter test in one child process; results by module, and the child's output."""
    _start(INTERPRETER, _run_interpreter, 900)
    return _result(INTERPRETER)


def _run_interpreter(limit_s: int) -> tuple[dict[str, ModuleResult], str]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [str(TESTS / f"{module}.py") for module in interpreter_modules()]
        child = _run_child(command, {**os.environ, "TRITON_INTERPRET": "1"}, limit_s)
        results: dict[str, list[list[str]]] = {}
        if report.exists():
            for case in ElementTree.parse(report).getroot().iter("testcase"):
                # An error of collection has no class name; its name is the module's path.
                module = (case.get("classname") or case.get("name", "")).split(".")[-1]
                counts = results.setdefault(module, [[], [], []])
                bad = [found for tag in ("failure", "error") if (found := case.find(tag)) is not None]
                if bad:
                    counts[2].append(f"{case.get('name')}\n{bad[0].text or bad[0].get('message')}")
                else:
                    counts[1 if case.find("skipped") is not None else 0].append(case.get("name", ""))
    summary = {name: ModuleResult(len(good), len(skip), tuple(bad)) for name, (good, skip, bad) in results.items()}
    return summary, child.stdout


# ---------------------------------------------------------------------------------------------------------------
# Compilation for other targets
# ---------------------------------------------------------------------------------------------------------------

Target = tuple[str, int | str]

# Architectures that every kernel must compile for: A100, H100, B200, RTX 50, MI300.
TARGETS: tuple[Target, ...] = (
    ("cuda", 80),
    ("cuda", 90),
    ("cuda", 100),
    ("cuda", 120),
    ("hip", "gfx942"),
)


@dataclasses.dataclass(frozen=True)
class Binary:
    """One compiled kernel of a case: registers a thread, bytes of spills and of shared memory, and NVIDIA's
    assembler's words."""

    kernel: str
    registers: int
    spills: int
    shared: int
    asm: str
    log: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling one case gave: its binaries, or the text of the error."""

    binaries: tuple[Binary, ...]
    error: str | None


@dataclasses.dataclass(frozen=True)
class Swept:
    """How many binaries each kernel of one case got over all token counts, or the text of the error."""

    binaries: dict[str, int]
    error: str | None


@dataclasses.dataclass(frozen=True)
class TargetResult:
    """What compiling for one target gave, by case: every case once, and those swept over token counts."""

    cases: dict[str, Compiled]
    sweeps: dict[str, Swept]


class _StandInUtils:
    """Answers about a device that is not there."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 1, "warpSize": 32}


class StandInDriver:
    """Triton's active driver for a target that this machine does not have: compiles, never launches."""

    def __init__(self, backend: str, arch: int | str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(backend, arch, 64 if backend == "hip" and str(arch).startswith("gfx9") else 32)
        self.utils = _StandInUtils()

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self._target.arch, 10)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def install_driver(backend: str, arch: int | str) -> None:
    """Have this process compile for the given target; nothing can be launched afterwards."""
    from triton.runtime.driver import driver

    driver.set_active(StandInDriver(backend, arch))


def keep_ptxas_logs() -> None:
    """Have every binary's metadata hold, as ``ptxas_log``, what the assembler had to say when Triton called it.

    Triton keeps the metadata in its cache with the binary, so the log is there where the binary comes from the cache.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    knobs.nvidia.dump_ptxas_log = True
    plain = CUDABackend.make_cubin

    def make_cubin(self: Any, ptx: str, metadata: dict[str, Any], *options: Any) -> bytes:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            cubin = plain(self, ptx, metadata, *options)
        metadata["ptxas_log"] = log.getvalue()
        return cubin

    CUDABackend.make_cubin = make_cubin


def _ptxas_log(kernel: Any) -> str:
    """What the assembler has to say of a compiled kernel; one cached by another process is assembled once more."""
    if hasattr(kernel.metadata, "ptxas_log"):
        return kernel.metadata.ptxas_log
    from triton.compiler import make_backend

    target, metadata = kernel.metadata.target, {}
    make_backend(target).make_cubin(kernel.asm["ptx"], metadata, kernel.metadata, target.arch)
    return metadata["ptxas_log"]


def _ptxas_usage(log: str) -> tuple[int, int]:
    """Registers a thread and bytes of spills that the assembler reports."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    return int(registers.group(1)), max(spills, default=0)


def _amdgcn_usage(asm: str) -> tuple[int, int]:
    """Vector registers a lane, and bytes of spills a lane: four for each spilled vector or scalar register."""
    registers = re.search(r"\.vgpr_count:\s*(\d+)", asm)
    spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", asm))
    return int(registers.group(1)), 4 * spills


def usage(name: str, kernel: Any, backend: str) -> Binary:
    """Registers, spills and shared memory of one compiled kernel, with its assembly."""
    asm = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
    log = _ptxas_log(kernel) if backend == "cuda" else ""
    registers, spills = _ptxas_usage(log) if backend == "cuda" else _amdgcn_usage(asm)
    return Binary(name, registers, spills, int(kernel.metadata.shared), asm, log)


def load_compile_cases() -> Any:
    """The registry of ``compile_cases.py``, filled by it and by every ``compile_cases_*.py`` beside it."""
    import compile_cases

    for path in sorted(TESTS.glob("compile_cases_*.py")):
        importlib.import_module(path.stem)
    return compile_cases


def _compile_in_child(target: Target, cases: set[str], sweeps: set[str], limit_s: int) -> TargetResult:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        order = json.dumps({"target": target, "cases": sorted(cases), "sweeps": sorted(sweeps), "answer": str(answer)})
        command = [sys.executable, str(TESTS / "triton_support.py"), order]
        child = _run_child(command, env, limit_s)
        if child.returncode != 0:
            raise RuntimeError(f"compiling for {target} ended with {child.returncode}:\n{child.stdout[-4000:]}")
        found = json.loads(answer.read_text())
    cases = {
        case: Compiled(tuple(Binary(**binary) for binary in entry["binaries"]), entry["error"])
        for case, entry in found["cases"].items()
    }
    return TargetResult(cases, {case: Swept(**entry) for case, entry in found["sweeps"].items()})


def compile_target(target: Target) -> TargetResult:
    """What compiling for ``target`` gave: of the cases that the selected tests read, or of all."""
    if target not in _jobs:
        registry = load_compile_cases()
        _start(target, _compile_in_child, target, set(registry.COMPILE_CASES), set(registry.SWEEP_CASES), 600)
    return _result(target)


# One token, few, multiples of 16 and not, more than a tile, many: what Triton might specialise on.
TOKEN_COUNTS = (1, 2, 3, 16, 17, 100, 1024, 4099)
# Token counts are swept for one target: what gets a binary of its own does not depend on it.
SWEEP_TARGET: Target = ("cuda", 90)


def _compile_here(backend: str, arch: int | str, cases: list[str], sweeps: list[str]) -> dict[str, Any]:
    """Compile in this process, which compiles for this one target only."""
    install_driver(backend, arch)
    if backend == "cuda":
        keep_ptxas_logs()
    registry = load_compile_cases()

    from gdn_kernels import launch

    target = launch.Target(backend, arch)
    compiled_cases: dict[str, Any] = {}
    for case in cases:
        if case in registry.FP8_CASES and not launch.has_fp8(target):
            continue
        binaries: list[dict[str, Any]] = []
        error = None
        try:
            with launch.compile_only(target) as compiled:
                registry.COMPILE_CASES[case]()
            unique = {id(kernel): (name, kernel) for name, kernel in compiled}
            binaries = [dataclasses.asdict(usage(name, kernel, backend)) for name, kernel in unique.values()]
        except Exception:
            error = traceback.format_exc()
        compiled_cases[case] = {"binaries": binaries, "error": error}

    swept_cases: dict[str, Any] = {}
    for case in sweeps:
        kernels: dict[str, set[int]] = {}
        error = None
        try:
            with launch.compile_only(target) as compiled:
                for tokens in TOKEN_COUNTS:
                    registry.SWEEP_CASES[case](tokens)
            for name, kernel in compiled:
                kernels.setdefault(name, set()).add(id(kernel))
        except Exception:
            error = traceback.format_exc()
        swept_cases[case] = {"binaries": {name: len(ids) for name, ids in kernels.items()}, "error": error}
    return {"cases": compiled_cases, "sweeps": swept_cases}


def main() -> None:
    order = json.loads(sys.argv[1])
    found = _compile_here(*order["target"], order["cases"], order["sweeps"])
    Path(order["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
