"""The directions of the package's imports, read from the source, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gdn_kernels"

# Who stands above whom. A unit imports units of a lower rank and itself; those of TOP also import each other.
RANK = {
    "replay": -1,
    "launch": 0,
    "contracts": 1,
    "reference": 1,
    "kernels": 1,
    "ops": 2,
    "graphs": 3,
    "nn": 3,
    "integrations": 3,
    "": 4,  # gdn_kernels/__init__.py
    "accuracy": 5,
    "environment": 5,
    "demo": 6,
    "kl": 7,
    "__main__": 8,
}
TOP = {"graphs", "nn", "integrations"}
IMPORT_SECONDS = 0.3


def module_name(path: Path) -> str:
    """``ops/norm.py`` -> ``ops.norm``; a package's ``__init__.py`` is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def unit(module: str) -> str:
    return module.split(".")[0]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(module: str, node: ast.AST) -> list[str]:
    """The absolute dotted names that one node imports, ``from X import Y`` giving ``X.Y``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            path = SOURCES[module]
            here = ["gdn_kernels", *filter(None, module.split("."))]
            package = here if path.name == "__init__.py" else here[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        # A name put together at run time counts by its constant beginning.
        target = node.args[0] if node.args else None
        if isinstance(target, ast.JoinedStr) and target.values:
            target = target.values[0]
        if isinstance(target, ast.Constant) and isinstance(target.value, str):
            return [target.value]
    return []


def own_imports(module: str) -> Iterator[tuple[int, str]]:
    """``(line, module of this package)`` for every import in ``module``, lazy ones included."""
    for node in ast.walk(tree(SOURCES[module])):
        for name in imported_names(module, node):
            if name.split(".")[0] != "gdn_kernels":
                continue
            inside = name.split(".")[1:]
            while inside and ".".join(inside) not in SOURCES:
                inside.pop()
            yield node.lineno, ".".join(inside)


def module_level(path: Path) -> Iterator[ast.AST]:
    """The nodes that run on import: everything outside function bodies."""
    stack: list[ast.AST] = list(tree(path).body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack.extend(ast.iter_child_nodes(node))


def test_every_module_has_a_rank() -> None:
    unknown = sorted({unit(module) for module in SOURCES} - RANK.keys())
    assert not unknown, f"give these a rank in {Path(__file__).name}: {unknown}"


@pytest.mark.parametrize("module", SOURCES, ids=lambda module: module or "__init__")
def test_imports_go_down_only(module: str) -> None:
    own = unit(module)
    wrong = []
    for line, target in own_imports(module):
        other = unit(target)
        allowed = other == own or RANK[other] < RANK[own] or (own in TOP and other in TOP)
        if not allowed:
            wrong.append(f"{SOURCES[module].relative_to(ROOT)}:{line} imports gdn_kernels.{target}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle() -> None:
    edges = {module: {target for _, target in own_imports(module)} - {module} for module in SOURCES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(edges[module]):
                # A package's __init__ may list its own files, and they may name it.
                if target != unit(module):
                    visit(target, (*path, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())


KERNELS = [module for module in SOURCES if unit(module) == "kernels"]


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_import_only_triton_torch_launch_and_each_other(module: str) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names} - {"__future__"}
    wrong = []
    for node in ast.walk(tree(SOURCES[module])):
        for name in imported_names(module, node):
            if name.split(".")[0] == "gdn_kernels":
                # The circle and rank tests see to the rest.
                ok = name.startswith("gdn_kernels.launch") or name.startswith("gdn_kernels.kernels.")
            else:
                ok = name.split(".")[0] in allowed
            if not ok:
                wrong.append(f"{SOURCES[module].relative_to(ROOT)}:{node.lineno} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_triton_is_imported_by_kernels_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for module, path in SOURCES.items()
        if unit(module) != "kernels"
        for node in module_level(path)
        for name in imported_names(module, node)
        if name.split(".")[0] == "triton"
    ]
    assert not wrong, f"triton imported at module level: {wrong}"


def test_kernels_are_imported_lazily() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for module, path in SOURCES.items()
        if unit(module) != "kernels"
        for node in module_level(path)
        for name in imported_names(module, node)
        if name.startswith("gdn_kernels.kernels")
    ]
    assert not wrong, f"gdn_kernels.kernels imported at module level: {wrong}"


def test_no_environment_variable_is_read() -> None:
    wrong = []
    for module, path in SOURCES.items():
        if unit(module) == "integrations":
            continue
        for node in ast.walk(tree(path)):
            names = [node.attr] if isinstance(node, ast.Attribute) else imported_names(module, node)
            if any(name.split(".")[-1] in ("environ", "environb", "getenv", "getenvb") for name in names):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, f"environment variables read: {wrong}"


def test_setup_imports_nothing_heavy() -> None:
    names = {
        name.split(".")[0] for node in ast.walk(tree(ROOT / "setup.py")) for name in imported_names("launch", node)
    }
    heavy = names - {"__future__", "re", "pathlib", "setuptools"}
    assert not heavy, f"setup.py imports {sorted(heavy)}"


IMPORT = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import gdn_kernels
seconds = time.perf_counter() - start
new = set(sys.modules) - before
assert not any(name.split(".")[0] == "triton" for name in new), "import gdn_kernels imported triton"
assert not any(name.startswith("gdn_kernels.kernels.") for name in new), "import gdn_kernels imported a kernel"
assert not torch.cuda.is_initialized(), "import gdn_kernels initialised CUDA"
print(seconds)
"""


def test_import_is_light() -> None:
    runs = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert result.returncode == 0, result.stderr
        runs.append(float(result.stdout))
    print("seconds beyond torch's own import:", " ".join(f"{run:.3f}" for run in runs))
    assert min(runs) < IMPORT_SECONDS, f"import gdn_kernels took {min(runs):.3f} s beyond torch's own import"
