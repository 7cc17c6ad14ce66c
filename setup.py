from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    # Read, not imported: the build runs in an isolated environment that has no torch.
    source = (ROOT / "gdn_kernels" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('gdn_kernels/__init__.py must hold a line __version__ = "..."')
    return match.group(1)


setup(
    name="gdn-kernels",
    version=read_version(),
    description="Triton kernels for Gated Delta Net layers, as torch operators that are safe to compile and capture",
    # The wheel's metadata carries the README, so the demo finds its text in an installed package too.
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gdn_kernels", "gdn_kernels.*"]),
    package_data={"gdn_kernels.integrations": ["README.md"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy",
    ],
    extras_require={
        "test": ["pytest", "pytest-benchmark", "hypothesis"],
        # Libraries whose callers gdn_kernels.integrations serves, for its tests; fla-core itself brings no torch.
        "clients": ["fla-core==0.6.0", "transformers>=5.17"],
        "bench": ["pytest", "pytest-benchmark", "matplotlib"],
    },
    entry_points={
        "console_scripts": ["gdn-kernels=gdn_kernels.__main__:main"],
        # Called by the engines in each of their processes; they do nothing until they are chosen.
        "sglang.srt.plugins": ["gdn_kernels=gdn_kernels.integrations.sglang:register"],
        "vllm.general_plugins": ["gdn_kernels=gdn_kernels.integrations.vllm:register"],
    },
)
