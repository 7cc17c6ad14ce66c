"""Inert modules for what an engine imports and a test does not need, so that its kernels import beside torch alone.

``install()`` puts a finder behind all others: a top-level module that no other finder has becomes an empty one whose
attributes are inert objects. They can be called, subclassed, used as decorators and as annotations, and are false. What
is installed is imported as it is, and torch, triton and numpy are never stood in for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

#: What decides by its presence which platform an engine runs on counts as absent.
NEVER = {"torch", "triton", "numpy", "sglang", "vllm", "gdn_kernels", "libtpu", "tpu_inference", "amdsmi", "pynvml"}
#: Names with double underscores that engines read of what they import; others mean that Python asks for a protocol.
ASKED_FOR = ("__class_validators__", "__file__", "__version__")
#: An engine's own compiled modules, which a GPU's platform imports and a package without its .so files lacks.
COMPILED = re.compile(r"vllm\._\w*C(_\w+)?|vllm\._\w+_C")
#: What was stood in for, in the order of import.
STOOD_IN: list[str] = []


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name not in ASKED_FOR:
            raise AttributeError(name)
        return Inert

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __setitem__(cls, item: Any, value: Any) -> None:
        pass

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __bool__(cls) -> bool:
        return False

    def __iter__(cls) -> Any:
        return iter(())


class Inert(metaclass=_Meta):
    """Takes any arguments; called with one function it gives that function back, as a decorator does."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is Inert and len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType | type):
            return args[0]
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> dict[str, str]:
        return {"type": "any"}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Inert(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ASKED_FOR:
            raise AttributeError(name)
        return Inert

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ASKED_FOR:
            raise AttributeError(name)
        return Inert if name == "__class_validators__" or not name.startswith("__") else "0"


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, within: tuple[str, ...]) -> None:
        self.within = within

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if COMPILED.fullmatch(name):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if top in sys.stdlib_module_names or top.startswith("_") or (top in NEVER and name not in self.within):
            return None
        if "." in name and not isinstance(sys.modules.get(top), _Module):
            return None  # a part of something that is installed
        if not self._wanted_by_an_engine():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    @staticmethod
    def _wanted_by_an_engine() -> bool:
        """Only imports that an engine's own files make: torch probes for modules too."""
        frame = sys._getframe(2)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        return frame is not None and any(f"/{engine}/" in frame.f_code.co_filename for engine in ("sglang", "vllm"))

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        STOOD_IN.append(spec.name)
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Instead(Finder):
    """Before all others: an inert module even where the library is installed."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(())
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)


def install(within: tuple[str, ...] = (), instead: tuple[str, ...] = ()) -> None:
    """Stand in for missing modules; ``within`` names modules of an engine itself that do not load here, ``instead``
    libraries that are installed without what they need, so that an engine's imports of them fail."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Instead(instead))
        sys.meta_path.append(Finder(within))
