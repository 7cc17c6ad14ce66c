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


def unpacked(engine: str, version: str, scratch: Path) -> Path:
    """The engine's wheel without its compiled code."""
    folder = scratch / f"{engine}-{version}"
    if not folder.is_dir():
        wheels = scratch / "wheels"
        requirement = f"{engine}=={version}"
        subprocess.run(
            [*PIP, "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(wheels), requirement], check=True
        )
        (wheel,) = wheels.glob(f"{engine}-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if ".so" not in name]
            archive.extractall(folder, names)
    return folder


def needed(scratch: Path) -> Path:
    folder = scratch / f"needed-{sys.version_info.major}.{sys.version_info.minor}"
    if not folder.is_dir():
        subprocess.run([*PIP, "install", "-q", "--no-deps", "--target", str(folder), *NEEDED], check=True)
    return folder


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
    parser.add_argument("engines", nargs="*", choices=[*VERSIONS, []], help="default: both")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".scratch" / "engines", help="where wheels are unpacked")
    options, arguments = parser.parse_known_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    return max(run(name, VERSIONS[name], options.scratch, arguments) for name in options.engines or VERSIONS)


if __name__ == "__main__":
    sys.exit(main())
