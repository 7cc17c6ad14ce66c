"""Small engines with the signatures of the real ones, whose functions do nothing but say that they ran."""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from gdn_kernels.integrations._engines import Place, Plugin

#: What a stand-in's function returns: the engine's own ran.
ENGINE = "the engine's own"


def function(path: str, signature: inspect.Signature) -> Callable[..., Any]:
    """A function of ``signature`` that returns :data:`ENGINE` and its arguments."""
    name = path.rpartition(".")[2]

    def call(*args: Any, **kwargs: Any) -> Any:
        return ENGINE, args, kwargs

    call.__name__ = call.__qualname__ = name
    call.__signature__ = signature
    call.__module__ = path.rpartition(".")[0]
    # Compiled under the engine's own file, as far as anyone can see.
    call.__code__ = call.__code__.replace(co_filename=f"/engines/{path.partition('.')[0]}/{name}.py")
    return call


def signature(place: Place) -> inspect.Signature:
    kept = list(inspect.signature(place.adapter).parameters.values())[int(place.takes_original) :]
    return inspect.Signature(kept)


class StandIn:
    """Modules in ``sys.modules`` for as long as the test lasts; ``importer`` has imported every function by name."""

    def __init__(self, plugin: Plugin, monkeypatch: Any) -> None:
        self.plugin, self.monkeypatch = plugin, monkeypatch
        for name in [name for name in sys.modules if name.partition(".")[0] == plugin.package]:
            monkeypatch.delitem(sys.modules, name)
        self.module(plugin.package).__file__ = f"/engines/{plugin.package}/__init__.py"
        for place in plugin.places:
            self.add(place.path, function(place.path, signature(place)))
            for path, parameter in place.needs:
                self.needed(path, parameter)
        self.importer = self.module(f"{plugin.package}.importer")
        for place in plugin.places:
            setattr(self.importer, place.path.rpartition(".")[2], self.get(place.path))
        monkeypatch.setattr(plugin, "records", {})

    def module(self, name: str) -> types.ModuleType:
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__path__ = []
            self.monkeypatch.setitem(sys.modules, name, module)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(self.module(parent), last, module)
        return sys.modules[name]

    def owner(self, path: str) -> tuple[Any, str]:
        """The module or class of ``path``, and the last name."""
        parent, _, name = path.rpartition(".")
        last = parent.rpartition(".")[2]
        if last[0].isupper() or last == "_forward_core":
            module = self.module(parent.rpartition(".")[0])
            if not hasattr(module, last):
                setattr(module, last, type(last, (), {"__module__": module.__name__}))
            return getattr(module, last), name
        return self.module(parent), name

    def add(self, path: str, value: Any) -> None:
        setattr(*self.owner(path), value)

    def get(self, path: str) -> Any:
        return getattr(*self.owner(path))

    def needed(self, path: str, parameter: str) -> None:
        owner, name = self.owner(path)
        had = list(inspect.signature(getattr(owner, name)).parameters) if hasattr(owner, name) else []
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        both = [inspect.Parameter(each, kind) for each in dict.fromkeys([*had, parameter])]
        setattr(owner, name, function(path, inspect.Signature(both)))

    def state(self) -> dict[str, int]:
        """Every function by identity, where it is defined and where it was imported."""
        found = {place.path: id(inspect.getattr_static(*self.owner(place.path))) for place in self.plugin.places}
        return {**found, **{f"importer.{name}": id(value) for name, value in vars(self.importer).items()}}


class HookType(enum.Enum):
    AROUND = "around"
    REPLACE = "replace"


def hook_registry(stand_in: StandIn) -> type:
    """What the plugin uses of SGLang's registry: hooks by path, applied once, and rebound where they were imported."""

    class HookRegistry:
        _hooks: dict[str, list[tuple[HookType, Any, Any]]] = {}
        _patched: set[str] = set()
        source: Any = None

        @classmethod
        def register(cls, target: str, hook: Any, hook_type: HookType = HookType.AROUND) -> None:
            cls._hooks.setdefault(target, []).append((hook_type, hook, cls.source))

        @classmethod
        def apply_hooks(cls) -> None:
            for target in sorted(set(cls._hooks) - cls._patched):
                cls._patched.add(target)
                owner, name = stand_in.owner(target)
                original = wrapped = getattr(owner, name)
                for kind, hook, _ in sorted(cls._hooks[target], key=lambda entry: entry[0] is not HookType.REPLACE):
                    wrapped = cls.wrap(wrapped, hook, replace=kind is HookType.REPLACE)
                setattr(owner, name, wrapped)
                for imported, value in list(vars(stand_in.importer).items()):
                    if value is original:
                        setattr(stand_in.importer, imported, wrapped)

        @staticmethod
        def wrap(original: Any, hook: Any, replace: bool) -> Any:
            @functools.wraps(original)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return hook(*args, **kwargs) if replace else hook(original, *args, **kwargs)

            return wrapper

    return HookRegistry


def sglang(monkeypatch: Any, whitelist: str = "") -> tuple[Plugin, StandIn, type]:
    from gdn_kernels.integrations.sglang import plugin

    stand_in = StandIn(plugin, monkeypatch)
    registry = hook_registry(stand_in)
    hooks = stand_in.module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry, hooks.HookType = registry, HookType
    setting = types.SimpleNamespace(get=lambda: whitelist)
    stand_in.module("sglang.srt.environ").envs = types.SimpleNamespace(SGLANG_PLUGINS=setting)
    stand_in.module("sglang.srt.compilation.compilation_config").SPLIT_OPS = ["sglang.other"]
    return plugin, stand_in, registry


def vllm(monkeypatch: Any, whitelist: list[str] | None = None) -> tuple[Plugin, StandIn]:
    from gdn_kernels.integrations.vllm import plugin

    stand_in = StandIn(plugin, monkeypatch)
    stand_in.module("vllm.envs").VLLM_PLUGINS = whitelist
    config = type("CompilationConfig", (), {"_attention_ops": ["vllm::other"]})
    stand_in.module("vllm.config.compilation").CompilationConfig = config
    return plugin, stand_in
