"""Runs the tests of this folder against the engines' real code: ``python tests/engines/run.py``.

For each engine it downloads the wheel of the version below, unpacks it but for compiled code, installs what its imports
cannot do without beside it, and runs pytest twice: as it is, for what is replaced, and in Triton's interpreter, for
what is computed. Everything else that an engine imports is stood in for (``stand_ins.py``), so neither a GPU nor the
engines' compiled code is needed. Triton 3.6 or 3.7: SGLang's norm uses block pointers, which 3.9 has no more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VERSIONS = {"sglang": "0.5.23", "vllm": "0.33.0"}
#: Whose objects the engines' modules compute with while they are imported.
NEEDED = ["annotated-types", "dill", "einops", "msgspec", "pydantic", "pydantic-core", "regex", "typing-inspection"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def wheel(engine: str, version: str, scratch: Path) -> Path:
    folder = scratch / "wheels"
    if not list(folder.glob(f"{engine}-{version}-*.whl")):
        only = ["--no-deps", "--only-binary=:all:"]
        subprocess.run([*PIP, "download", "-q", *only, "-d", str(folder), f"{engine}=={version}"], check=True)
    (found,) = folder.glob(f"{engine}-{version}-*.whl")
    return found


def kept(name: str) -> bool:
    """All but compiled code: what Python imports, and the headers that SGLang looks for."""
    return ".so" not in name


def unpacked(engine: str, version: str, scratch: Path) -> Path:
    """The engine's wheel without its compiled code."""
    folder = scratch / f"{engine}-{version}"
    if not folder.is_dir():
        with zipfile.ZipFile(wheel(engine, version, scratch)) as archive:
            archive.extractall(folder, filter(kept, archive.namelist()))
    return folder


def needed(scratch: Path, python: str = f"{sys.version_info.major}.{sys.version_info.minor}") -> Path:
    """What imports cannot do without, for a version of Python."""
    folder = scratch / f"needed-{python}"
    if not folder.is_dir():
        options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--target", str(folder)]
        subprocess.run([*PIP, "install", "-q", *options, *NEEDED], check=True)
    return folder


def pack(target: Path, python: str, versions: dict[str, str], scratch: Path) -> None:
    """One archive for a machine that reaches no index: unpack it and put the folder on the path."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        folder = needed(scratch, python)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, path.relative_to(folder))
        for engine, version in versions.items():
            with zipfile.ZipFile(wheel(engine, version, scratch)) as source:
                for name in filter(packed, source.namelist()):
                    archive.writestr(name, source.read(name))
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB for Python {python}")


def packed(name: str) -> bool:
    """The Python files alone, and what SGLang's own compiled-at-run-time kernels include."""
    return kept(name) and (name.endswith((".py", "METADATA", "entry_points.txt")) or "/jit/" in name)


def run(engine: str, version: str, scratch: Path, arguments: list[str]) -> int:
    """Both runs of one engine; the first exit status that is not 0."""
    paths = [ROOT, unpacked(engine, version, scratch), needed(scratch)]
    # No GPU is meant: vLLM then keeps its kernels although no driver answers.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("GDN_KERNELS_ENGINE", None)
    worst = 0
    for interpreted in ("0", "1"):
        environment["TRITON_INTERPRET"] = interpreted
        print(f"{engine} {version}, {'interpreter' if interpreted == '1' else 'what is replaced'}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", str(HERE / f"test_{engine}.py"), *arguments]
        code = subprocess.run(command, env=environment, cwd=ROOT).returncode
        worst = worst or code
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*", metavar="ENGINE[==VERSION]", help="default: both, as tested")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".scratch" / "engines", help="where wheels are unpacked")
    parser.add_argument("--pack", type=Path, metavar="FILE.zip", help="run nothing: pack what bench_engines.py needs")
    parser.add_argument("--python", default="3.12", help="of the machine that the archive is for")
    options, arguments = parser.parse_known_args()
    chosen = [name.partition("==") for name in options.engines or VERSIONS]
    versions = {name: version or VERSIONS[name] for name, _, version in chosen}
    options.scratch.mkdir(parents=True, exist_ok=True)
    if options.pack:
        pack(options.pack, options.python, versions, options.scratch)
        return 0
    return max(run(name, version, options.scratch, arguments) for name, version in versions.items())


if __name__ == "__main__":
    sys.exit(main())
