"""Every kernel compiled ahead of time for the supported architectures: a binary, no spills, shared memory that fits.

One process a target compiles all cases of ``compile_cases.py``; the tests here read what it found.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import triton_support

from gdn_kernels import launch

registry = triton_support.load_compile_cases()
CASES = pytest.mark.parametrize("case", registry.COMPILE_CASES)
TARGETS = pytest.mark.parametrize(
    "target", triton_support.TARGETS, ids=lambda target: f"sm_{target[1]}" if target[0] == "cuda" else target[1]
)


def binaries(target, case):
    compiled = triton_support.compile_target(target).cases[case]
    assert compiled.error is None, compiled.error
    assert compiled.binaries, f"{case} launched no kernel"
    return compiled.binaries


@TARGETS
@CASES
def test_kernel_compiles_within_registers_and_shared_memory(target, case):
    backend, arch = target
    if case in registry.FP8_CASES and not launch.has_fp8(launch.Target(backend, arch)):
        pytest.skip(f"{backend} {arch} has no e4m3: contracts refuse the call, as tests/test_norm_fp8.py shows")
    limit = launch.Target(backend, arch).shared_memory
    for binary in binaries(target, case):
        print(f"{binary.kernel}: {binary.registers} registers, {binary.spills} bytes spilled, {binary.shared} shared")
        assert binary.spills <= registry.spill_budget(case, arch), f"{binary.kernel} spills {binary.spills} bytes"
        assert binary.shared <= limit, f"{binary.kernel} takes {binary.shared} bytes of shared memory of {limit}"


# Types of PTX accesses of so many bytes.
WIDE = {16: r"v4\.[bf]32|v2\.[bf]64|b128|v8\.b16", 8: r"v2\.[bf]32|[bf]64|v4\.b16"}


# Inputs and outputs that rows of whole 16 bytes must be moved by, counted as (loads, stores) at least.
@pytest.mark.parametrize(
    ("case", "size", "loads", "stores"),
    [
        pytest.param("norm-rms-gated-128", 16, 2, 1, id="norm-x-and-strided-z"),
        # e4m3 is stored 8 bytes a thread, what 16 bytes of bf16 become
        pytest.param("norm-fp8-128", 16, 2, 0, id="norm-fp8-x-and-strided-z"),
        pytest.param("l2norm-128", 16, 1, 1, id="l2norm"),
        pytest.param("split-r2", 16, 2, 2, id="split-v-z"),
        # four channels a thread: three columns and 8 of a run; an edge's 9 columns, its outputs and its window
        pytest.param("conv-channel-last", 8, 3 + 8 + 9, 8 + 3 + 3, id="conv-tokens"),
        pytest.param("conv-channel-last", 16, 2 * 2, 0, id="conv-weights"),
        pytest.param("conv-update-1", 8, 4, 4, id="conv-update-tokens-and-windows"),
        pytest.param("conv-verify-16-tree", 16, 0, 16, id="conv-verify-windows"),
    ],
)
def test_rows_move_whole_vectors(case, size, loads, stores):
    (binary,) = binaries(triton_support.SWEEP_TARGET, case)
    wide = rf"(?:\.\w+(?:::\w+)?)*\.(?:{WIDE[size]})"
    assert len(re.findall(r"ld\.global" + wide, binary.asm)) >= loads
    assert len(re.findall(r"st\.global" + wide, binary.asm)) >= stores


@pytest.mark.parametrize(
    ("case", "plain"),
    [
        ("norm-fp8-128", "norm-rms-gated-128"),
        ("norm-fp8-layer-groups-gate-first", "norm-layer-groups-gate-first"),
        ("norm-fp8-layer-16384-fp32", "norm-layer-16384-fp32"),
    ],
)
def test_the_quantised_norm_does_the_sums_of_the_norm(case, plain):
    """Its own are a maximum and quotients, of one product and two fused steps each. No product is fused into a sum:
    each kernel might choose another."""
    operations = []
    for name in (case, plain):
        (binary,) = binaries(triton_support.SWEEP_TARGET, name)
        operations.append(Counter(re.findall(r"\b(add|sub|mul|fma)(?:\.rn)?\.f32", binary.asm)))
    quantised, norm = operations
    assert quantised["add"] == norm["add"] > 0 == norm["fma"]
    assert quantised["fma"] == 2 * (quantised["mul"] - norm["mul"])


@pytest.mark.parametrize(
    "case, parts", [("chunk-bf16-64x64", 1), ("chunk-bf16-128x128", 1), ("chunk-bf16-128x128-32-of-128", 2)]
)
def test_products_on_hopper_run_beside_the_threads(case, parts):
    """All products of a chunk are wgmma, and the assembler does not wait for each of their instructions."""
    scan = [binary for binary in binaries(("cuda", 90), case) if binary.kernel == "hopper_scan_kernel"][-1]
    key_steps, chunk_steps = (4 if "64x64" in case else 8), 4
    if parts == 1:
        # one product with the state's operand and two with a chunk's; q S^T, P and P U by each of two others
        products = key_steps + 2 * chunk_steps + 2 * (2 * key_steps + chunk_steps)
    else:
        # two products with the state's operand, three with a chunk's, in each part; and P
        products = parts * (2 * key_steps + 3 * chunk_steps) + key_steps
    assert scan.asm.count("wgmma.mma_async") == products
    assert "serialized" not in scan.log, scan.log


@pytest.mark.parametrize("sweep", registry.SWEEP_CASES)
def test_one_binary_serves_every_token_count(sweep):
    swept = triton_support.compile_target(triton_support.SWEEP_TARGET).sweeps[sweep]
    assert swept.error is None, swept.error
    assert swept.binaries and set(swept.binaries.values()) == {1}, swept.binaries


def test_targets_are_those_that_launch_knows():
    for backend, arch in triton_support.TARGETS:
        assert arch in launch._SHARED_MEMORY, f"no shared memory limit for {backend} {arch}"
