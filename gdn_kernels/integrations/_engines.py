"""What the plugins for serving engines share: whether one is chosen, what it replaces, and what then ran.

A plugin is a list of places. A place is an engine's function or method under its dotted path, and an adapter: a
function of the same signature that calls this package's operators, or returns a string, the reason why it leaves the
call to the engine. An adapter decides before it writes anything.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

#: The name of the plugins' entry points, by which an engine's whitelist chooses them.
ENTRY_POINT = "gdn_kernels"
#: The other way to choose: the one environment variable that the package reads.
VARIABLE = "GDN_KERNELS_ENGINE"

REPLACED, SIGNATURE, ABSENT, YIELDED, RESTORED = "replaced", "signature differs", "absent", "yielded", "restored"

Call = Callable[..., Any]
_INHERITED = object()


def chosen(whitelist: Iterable[str] | None) -> str | None:
    """``"name"`` where the engine's whitelist names the plugin, ``"variable"`` where the variable is 1, else None.

    Raises ``ValueError`` for a value of the variable other than 0, 1 and nothing.
    """
    if any(name.strip() == ENTRY_POINT for name in whitelist or ()):
        return "name"
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return "variable" if value == "1" else None


def parameters(function: Call) -> list[tuple[str, str, Any]]:
    """Name, kind and default of each parameter; annotations do not count."""
    return [(p.name, p.kind.name, p.default) for p in inspect.signature(function).parameters.values()]


def signature_text(function: Call, skip: int = 0) -> str:
    """The signature without annotations, and without the first ``skip`` parameters."""
    kept = list(inspect.signature(function).parameters.values())[skip:]
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in kept]))


def described(value: Any) -> str:
    """A tensor by dtype, shape and, where it is a view, strides; other values as they are."""
    if isinstance(value, torch.Tensor):
        strides = "" if value.is_contiguous() else f" strides {tuple(value.stride())}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{strides}"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass(frozen=True)
class Place:
    """One function of an engine that is replaced.

    path: its dotted path. also: where other versions have it. adapter: ours; its signature is the one that the engine's
    must have, after the engine's own function where ``takes_original``. operators: what it runs. needs: ``(dotted path,
    parameter)`` pairs that the engine must have too, because the adapter relies on them. sets: attributes of the class
    whose method is replaced, with their values while it is.
    """

    path: str
    adapter: Call
    operators: tuple[str, ...]
    takes_original: bool = False
    needs: tuple[tuple[str, str], ...] = ()
    sets: tuple[tuple[str, Any], ...] = ()
    also: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        return signature_text(self.adapter, int(self.takes_original))


@dataclasses.dataclass
class Record:
    """What became of a place in this process."""

    place: Place
    state: str
    why: str = ""
    owner: Any = None
    original: Any = None
    replacement: Any = None
    calls: int = 0
    left: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    shapes: str = ""
    was: dict[str, Any] = dataclasses.field(default_factory=dict)
    elsewhere: str | None = None

    @property
    def path(self) -> str:
        return self.elsewhere or self.place.path

    @property
    def name(self) -> str:
        return self.place.path.rpartition(".")[2]

    def shown(self) -> dict[str, Any]:
        return {
            "place": self.path,
            "state": self.state,
            "why": self.why,
            "operators": list(self.place.operators),
            "calls": self.calls,
            "left": dict(self.left),
            "shapes": self.shapes,
        }


def _arguments(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    names = [name for name, *_ in parameters(function)]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return ", ".join(f"{name} {described(value)}" for name, value in given.items() if value is not None)


def _with_place(record: Record, error: Exception, shapes: str) -> Exception:
    """``error`` again, with the operators, the place and the arguments in its text."""
    operators = ", ".join(f"gdn::{name}" for name in record.place.operators)
    text = f"{error} [{operators} in place of {record.path}, called with {shapes}]"
    try:
        return type(error)(text)
    except Exception:  # an exception class that takes more than a text
        return RuntimeError(f"{type(error).__name__}: {text}")


def replacing(record: Record) -> Call:
    """The function that takes the place: the adapter, counted, and the engine's own where the adapter leaves a case.

    ``NotImplementedError`` is how an operator refuses a legal case that is not built, before it writes: such a call is
    left to the engine too. Every other exception is raised again, as the same type, with operators, place and shapes.
    Under Dynamo nothing is counted or caught: traced code must not depend on either.
    """
    original, adapter = record.original, record.place.adapter
    if record.place.takes_original:
        adapter = functools.partial(adapter, original)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            result = adapter(*args, **kwargs)
            return original(*args, **kwargs) if isinstance(result, str) else result
        try:
            result = adapter(*args, **kwargs)
        except NotImplementedError as error:
            result = str(error)
        except Exception as error:
            shapes = _arguments(original, args, kwargs)
            raise _with_place(record, error, shapes) from error
        if isinstance(result, str):
            record.left[result] += 1
            return original(*args, **kwargs)
        if not record.calls:
            record.shapes = _arguments(original, args, kwargs)
        record.calls += 1
        return result

    return replacement


def rebind(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Every module that holds the first of a pair holds the second then: ``from module import name`` copies it."""
    instead = {id(old): (old, new) for old, new in pairs}
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                if id(value) in instead:
                    setattr(module, name, instead[id(value)][1])


class Plugin:
    """The places of one engine. A subclass says how the engine replaces a function, and whose it is already.

    Args:
        engine: its name in messages. package: its distribution and its import. versions: those whose signatures the
            adapters have.
    """

    def __init__(self, engine: str, package: str, versions: tuple[str, ...]) -> None:
        self.engine, self.package, self.versions = engine, package, versions
        self.places: list[Place] = []
        self.records: dict[str, Record] = {}
        self.logger = logging.getLogger(f"gdn_kernels.integrations.{package}")

    def place(self, path: str, *operators: str, **options: Any) -> Callable[[Call], Call]:
        """A decorator: the adapter of the function at ``path``; options as of :class:`Place`."""

        def decorate(adapter: Call) -> Call:
            self.places.append(Place(path, adapter, operators, **options))
            return adapter

        return decorate

    # What a subclass gives.

    def whitelist(self) -> Iterable[str] | None:
        raise NotImplementedError

    def held_by(self, record: Record) -> str | None:
        """Which other plugin has replaced the place, None if none has."""
        raise NotImplementedError

    def install(self, records: list[Record]) -> None:
        raise NotImplementedError

    def uninstall(self, records: list[Record]) -> None:
        raise NotImplementedError

    # What an engine or a user calls.

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def require(self) -> None:
        """Raises ``RuntimeError`` where the engine is not installed."""
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            raise RuntimeError(
                f"{self.engine} must be installed for gdn_kernels.integrations.{self.package}, "
                f"got no module {self.package!r}"
            ) from error

    def register(self) -> None:
        """The entry point: :meth:`apply` where the plugin is chosen, else nothing."""
        self.require()
        how = chosen(self.whitelist())
        if how is None:
            self.logger.debug(
                "gdn_kernels is installed and not chosen: name %s in the plugin whitelist, or set %s=1",
                ENTRY_POINT,
                VARIABLE,
            )
            return
        self.apply(by_name=how == "name")

    def apply(self, by_name: bool = False) -> None:
        """Replace every place whose signature is the expected one; again does nothing.

        Args:
            by_name: also take places that another plugin holds.

        Raises:
            RuntimeError: the engine is not installed.
        """
        self.require()
        if any(record.state == REPLACED for record in self.records.values()):
            return
        self.records = {place.path: self._examine(place, by_name) for place in self.places}
        replaced = [record for record in self.records.values() if record.state == REPLACED]
        for record in replaced:
            record.replacement = replacing(record)
            for name, value in record.place.sets:
                record.was[name] = vars(record.owner).get(name, _INHERITED)
                setattr(record.owner, name, value)
        self.install(replaced)
        self.logger.info(
            "gdn_kernels in %s %s: %d of %d places replaced",
            self.engine,
            self.version(),
            len(replaced),
            len(self.places),
        )

    def restore(self) -> None:
        """Put the engine's functions back in this process. Objects that took a bound method keep it."""
        replaced = [record for record in self.records.values() if record.state == REPLACED]
        self.uninstall(replaced)
        for record in replaced:
            record.state = RESTORED
            for name, value in record.was.items():
                delattr(record.owner, name) if value is _INHERITED else setattr(record.owner, name, value)

    def examine(self) -> dict[str, Record]:
        """Each place as :meth:`apply` would find it, without replacing or warning."""
        self.require()
        return {place.path: self._examine(place, by_name=False, warn=False) for place in self.places}

    def report(self) -> list[dict[str, Any]]:
        """What runs, place by place: ``place``, ``state`` (replaced, signature differs, absent, yielded, restored or
        off), ``why``, ``operators``, ``calls`` that ran here, calls ``left`` to the engine by reason, and the
        ``shapes`` of the first call. Calls that Dynamo traced are not counted.
        """
        return [self.records.get(place.path, Record(place, "off")).shown() for place in self.places]

    # How a place is looked at.

    def _examine(self, place: Place, by_name: bool, warn: bool = True) -> Record:
        record = Record(place, REPLACED)
        found = self._found(record)
        if found is not None:
            record.state = ABSENT if record.original is None else SIGNATURE
            record.why = f"expected {place.expected}, found {found}"
            if warn:
                self.logger.warning(
                    "gdn_kernels leaves %s to %s %s: expected %s, found %s; versions that work: %s",
                    place.path,
                    self.engine,
                    self.version(),
                    place.expected,
                    found,
                    ", ".join(self.versions),
                )
            return record
        holder = self.held_by(record)
        if holder is not None and not by_name:
            record.state, record.why = YIELDED, f"replaced by {holder}"
            self.logger.info("gdn_kernels yields %s to %s", place.path, holder)
        return record

    def _found(self, record: Record) -> str | None:
        """None where the engine's function is as expected, else what was found. Fills ``owner`` and ``original``."""
        place = record.place
        failures = []
        for path in (place.path, *place.also):
            try:
                record.owner = pkgutil.resolve_name(path.rpartition(".")[0])
                record.original = getattr(record.owner, record.name)
            except Exception as error:  # whatever the import of an engine's module raises, the engine goes on
                failures.append(f"{type(error).__name__}: {error}")
            else:
                record.elsewhere = None if path == place.path else path
                break
        else:
            return failures[0]
        wanted = parameters(place.adapter)[int(place.takes_original) :]
        try:
            have = parameters(record.original)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        if have != wanted:
            return signature_text(record.original)
        for path, parameter in place.needs:
            try:
                names = [name for name, *_ in parameters(pkgutil.resolve_name(path))]
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            if parameter not in names:
                return f"{path} without {parameter}"
        return None


def format_report(rows: list[dict[str, Any]]) -> str:
    """:meth:`Plugin.report` as text, a line a place."""
    lines = []
    for row in rows:
        facts = f"{row['calls']} calls" if row["state"] == REPLACED else row["why"]
        left = "; ".join(f"left {count}: {why}" for why, count in row["left"].items())
        lines.append("  ".join(filter(None, (f"{row['state']:<9}", row["place"], facts, left))))
    return "\n".join(lines)
