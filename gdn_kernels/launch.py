"""Launch configuration and capture safety: the lowest module of the package.

Every kernel is launched through :func:`run`, with a configuration that a pure function picks from a ladder of
numbers in this file. No ladder is indexed by a token count or a number of sequences, so a configuration, and with
it the binary, depends on static facts alone: head sizes, dtypes, group size, architecture. That holds in capture
mode and outside it.

Importing this module does not import Triton and does not touch a GPU.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gdn_kernels import replay

# ---------------------------------------------------------------------------------------------------------------
# Capture mode and debug checks
# ---------------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_capture_depth = 0
_debug_depth = 0


@contextlib.contextmanager
def capture_mode() -> Iterator[None]:
    """Switch capture mode on for every thread; nests. Engines enter it around warm-up and graph capture."""
    global _capture_depth
    with _lock:
        _capture_depth += 1
    try:
        yield
    finally:
        with _lock:
            _capture_depth -= 1


def is_capturing() -> bool:
    """True in :func:`capture_mode`, while Dynamo traces, under fake tensors, and while a CUDA stream captures.

    Under Dynamo this is the constant True and adds no guard. It never initialises CUDA.
    """
    if torch.compiler.is_compiling():
        return True
    if _capture_depth > 0:
        return True
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def debug_checks() -> Iterator[None]:
    """Add checks of tensor *values* (indices in range, offsets that rise, slots used once) to every operator.

    They copy small tensors to the host, so they synchronise: for debugging, never for serving. Raises what the
    operator's other checks raise. Inside capture mode they are skipped, since a capture cannot synchronise.
    """
    global _debug_depth
    with _lock:
        _debug_depth += 1
    try:
        yield
    finally:
        with _lock:
            _debug_depth -= 1


def debugging() -> bool:
    """True inside :func:`debug_checks` and outside capture mode."""
    return _debug_depth > 0 and not is_capturing()


# ---------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel is compiled for: ``("cuda", 90)``, ``("hip", "gfx942")`` or ``("interpreter", 0)``."""

    backend: str
    arch: int | str

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory one program may use."""
        return _SHARED_MEMORY.get(self.arch, 99 * 1024)


# Bytes of shared memory a block can opt in to, from the vendors' programming guides.
_SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}

_forced_target: Target | None = None


@functools.cache
def _device_target(index: int) -> Target:
    if torch.version.hip is not None:
        return Target("hip", torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor)


def target(device: torch.device) -> Target:
    """The target of ``device``. CPU tensors reach a kernel only in Triton's interpreter or when compiling ahead."""
    if _forced_target is not None:
        return _forced_target
    if device.type != "cuda":
        return Target("interpreter", 0)
    return _device_target(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """SMs of ``device``; an H100's where kernels are only compiled."""
    if _forced_target is not None or device.type != "cuda":
        return HOPPER_SMS
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


def has_fp8(target: Target) -> bool:
    """Whether kernels for ``target`` can write e4m3: from sm_89 on, and on gfx950; gfx942 has another format, fnuz."""
    if target.backend == "cuda":
        return target.arch >= 89
    return target.backend == "interpreter" or target.arch == "gfx950"


def has_descriptors(target: Target) -> bool:
    """Whether kernels for ``target`` can take a :func:`descriptor`: those written in Gluon for Hopper, so far."""
    return target.backend == "cuda" and target.arch == 90


# ---------------------------------------------------------------------------------------------------------------
# Configurations: frozen data, picked by pure functions from ladders
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Tile of one program: ``block_rows`` rows of ``block_cols`` columns; longer rows loop over column tiles."""

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int = 2


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """Elementwise work over rows: ``block_rows`` rows a program."""

    block_rows: int
    num_warps: int
    num_stages: int = 1


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """Causal conv: a run of ``block_t`` tokens (at most 32) of ``block_d`` channels a program, ``group`` at a time.

    At least 2 warps where windows have their columns side by side: within one, a gather becomes shuffles of registers.
    """

    block_t: int
    block_d: int
    num_warps: int
    group: int = 8
    num_stages: int = 1


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """Recurrent step: ``block_v`` rows of one head's ``[V, K]`` state a program."""

    block_v: int
    num_warps: int
    num_stages: int = 1


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Decode step: a sequence and a key head a program, which holds ``block_v`` rows of a value head's ``[V, K]`` state
    at a time. Where that is all of them, ``ahead`` value heads are loaded before the first is worked on."""

    block_v: int
    ahead: int
    num_warps: int
    num_stages: int = 1


@dataclasses.dataclass(frozen=True)
class PrepConfig:
    """Chunk preparation, two kernels: ``inverse_heads`` value heads of a chunk a program of one warp for the inverses
    by blocks, then ``heads`` a program for the products. Fewer where those of a key head do not divide by it."""

    inverse_heads: int
    heads: int
    num_warps: int
    num_stages: int = 1


@dataclasses.dataclass(frozen=True)
class HopperInverseConfig:
    """Inverses of the chunk preparation in Gluon: programs of one warp, ``registers`` a thread at most."""

    registers: int
    num_warps: int = 1


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """Chunk recurrence: ``block_v`` rows of one head's ``[V, K]`` state a program."""

    block_v: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class HopperScanConfig:
    """Chunk recurrence in Gluon: ``parts`` warpgroups a program, each with 64 rows of one head's ``[V, K]`` state;
    ``stages`` chunks in shared memory; registers a thread of the state's second warpgroup and of those that form P or
    o. The first warpgroup takes what is left."""

    parts: int
    stages: int
    state_registers: int
    auxiliary_registers: int
    num_warps: int = 4


# More tokens than a sequence has.
NEVER = 1 << 30


@dataclasses.dataclass(frozen=True)
class SegmentConfig:
    """Segments of a sequence of ``long_tokens`` or more: at most ``max_segments``, each of at least ``min_tokens``; 1
    leaves sequences whole. Where that makes more of them, at most ``most_segments`` of at least twice ``min_tokens``.
    A sequence of ``map_tokens`` or more is cut whatever its gates, a shorter one where they forget what came before.
    States join in programs of ``block_v`` rows of one head's ``[V, K]`` state."""

    max_segments: int
    min_tokens: int
    long_tokens: int
    map_tokens: int = NEVER
    most_segments: int = 1
    block_v: int = 16
    num_warps: int = 8
    num_stages: int = 3


# Largest group size -> tile; a row of more than 8,192 elements is walked in tiles of that. The rung of 128 is searched:
# RMS norm times silu(z), bf16, rotated buffers, H100, 2026-11-23, us for 32, 4,096, 16,384, 65,536 and 1,048,576 rows:
# 8 rows in 4 warps 0.9, 2.5, 5.7, 18.6, 263; 8 rows in 2 warps 1.2, 2.9, 5.9, 18.8, 263; 16 rows in 8 warps 1.1, 2.5,
# 5.7, 18.6, 263; 32 rows in 16 warps 1.5, 2.6, 5.7, 18.5, 261; 4 rows in 2 warps 0.9, 2.5, 5.7, 21.2, 316 (so many
# programs cannot be started faster). The others hold about 2,048 elements, 16 bytes a load.
NORM_LADDER = (
    (64, NormConfig(32, 64, 4)),
    (128, NormConfig(8, 128, 4)),
    (256, NormConfig(8, 256, 4)),
    (512, NormConfig(4, 512, 4)),
    (1024, NormConfig(2, 1024, 4)),
    (2048, NormConfig(1, 2048, 4)),
    (4096, NormConfig(1, 4096, 8)),
    (65536, NormConfig(1, 8192, 8)),
)


def _rung(ladder: tuple[tuple[int, Any], ...], size: int, name: str = "head_k_dim") -> Any:
    """The first of a ladder that holds ``size``, the fact of that ``name``."""
    for limit, config in ladder:
        if size <= limit:
            return config
    raise NotImplementedError(f"{name} must be at most {ladder[-1][0]}, got {size}")


def norm_config(group_size: int) -> NormConfig:
    """The smallest rung that holds a group of ``group_size`` elements."""
    return _rung(NORM_LADDER, group_size, "group_size")


# Rows a program for gating, l2norm and the projection split; first settings, not yet searched on a GPU.
GATING_CONFIG = RowsConfig(block_rows=32, num_warps=4)
SPLIT_CONFIG = RowsConfig(block_rows=4, num_warps=4)

# Four channels a thread (8 bytes of bf16). 8,192 channels of bf16, H100, 2026-11-23, us for 2,048, 8,192 and 32,768
# tokens (the bytes alone: 22.4, 89.5, 358): 8 tokens 24.5, 91.1, 356; 16 tokens in one group 24.9, 91.7, 357; 32 tokens
# in groups of 8 26.4, 95.4, 370, in groups of 4 29.4, 98.2, 381; 32 tokens of 1,024 channels 27.0, 98.3, 383.
CONV_CONFIG = ConvConfig(block_t=8, block_d=512, num_warps=4, group=8)

# Channels a program and warps of the update and the verify kernel. Four channels a thread take 32 registers for one new
# token, so that an SM holds all its warps. H100, 2026-11-23, us for 1, 32, 128 and 256 rows of 8,192 channels, and 64
# rows of 4 drafts verified: 256 channels in 2 warps 1.2, 3.0, 7.2, 13.6, 11.0; 512 in 4 1.3, 3.0, 7.2, 13.5, 11.1; 256
# in 4 1.1, 3.0, 7.6, 13.9, 10.6; 1,024 in 4 1.4, 3.0, 7.6, 13.5, 11.3.
CONV_UPDATE_CONFIG = ConvConfig(block_t=1, block_d=256, num_warps=2)

# Head size K -> rows of the state a program; 2,048 state elements in one warp, so that no barrier stands in the chain.
# packed_decode, HV 32, K = V = 128, H100, 2026-11-23, us for (N 1 and 256 with fp32, N 1, 32 and 256 with bf16 states;
# the first of each from rotated pools): 16 rows 4.0, 370, 3.0, 18.5, 189; 8 rows 3.6, 369, 2.8, 21.0, 191. Before the
# sums were fused: 4 rows 3.9, 369, 3.2, 40.8, 317; 32 rows in 4 warps 12 to 40 % slower than in 1 (the bytes alone:
# 1.4, 358, 0.7, 22, 179).
RECURRENT_LADDER = (
    (64, RecurrentConfig(block_v=32, num_warps=1)),
    (128, RecurrentConfig(block_v=16, num_warps=1)),
    (256, RecurrentConfig(block_v=8, num_warps=1)),
)


# The same for verification where it keeps fp32 states: many small programs. HV 32, K = V = 128, H100, 2026-11-26, us
# for 1, 8 and 256 rows of 4 drafts, and of trees: 16 rows of the state 9.0, 33.3, 950, 9.7, 35.6, 996; 8 rows 7.9,
# 32.3, 951, 8.8, 34.2, 964; 4 rows 6.4, 31.5, 948, 6.7, 32.1, 949. States of 16 bits, 1, 8 and 128 rows: 16 rows 6.2,
# 19.4, 246; 8 rows 5.6, 18.7, 250; 4 rows 4.7, 21.2, 291.
VERIFY_LADDER = (
    (64, RecurrentConfig(block_v=8, num_warps=1)),
    (128, RecurrentConfig(block_v=4, num_warps=1)),
    (256, RecurrentConfig(block_v=2, num_warps=1)),
)


def recurrent_config(head_k_dim: int) -> RecurrentConfig:
    """State rows a program for decode and the recurrent form."""
    return _rung(RECURRENT_LADDER, head_k_dim)


def verify_config(head_k_dim: int, itemsize: int) -> RecurrentConfig:
    """State rows a program for verification, which keeps states of ``itemsize`` bytes an element."""
    return _rung(VERIFY_LADDER if itemsize == 4 else RECURRENT_LADDER, head_k_dim)


# Elements K * V of a head's state -> configuration: at most 64 elements of state a thread in flight, what fits the 128
# registers of 16 warps; larger heads go by blocks of rows. Compiled for sm_90, not yet searched on a GPU.
STEP_LADDER = (
    (64 * 64, StepConfig(block_v=64, ahead=4, num_warps=8)),
    (64 * 128, StepConfig(block_v=128, ahead=2, num_warps=8)),
    (128 * 128, StepConfig(block_v=128, ahead=2, num_warps=8)),
    (256 * 256, StepConfig(block_v=64, ahead=1, num_warps=16)),
)


def step_config(head_k_dim: int, head_v_dim: int, target: Target) -> StepConfig:
    """The decode step's rung for head sizes K and V."""
    config = next((config for limit, config in STEP_LADDER if head_k_dim * head_v_dim <= limit), None)
    if config is None:
        raise NotImplementedError(f"head sizes must be at most 256, got {head_k_dim} and {head_v_dim}")
    # where warps have 64 lanes, half of them are as many threads
    num_warps = config.num_warps // (2 if target.backend == "hip" else 1)
    return dataclasses.replace(config, block_v=min(config.block_v, head_v_dim), num_warps=num_warps)


# Value heads -> configuration; the last serves more of them too. Few heads make few programs, which want one each; many
# want a key head's products shared. Bits do not depend on it. K = V = 128, H100, 2026-11-23, us for heads 2/8 1x2048,
# 2/8 1x8192, 8/32 8x1024, 16/64 1x8192: inverses of 4 heads a program 15.2, 17.8, 29, 60; 2 heads 9.4, 11.8, 40, 64;
# 1 head 6.5, 11.1, 43, 83; products of 4 heads 8.2, 13.1, 66, 130; 2 heads 6.1, 15, 72, 140; 1 head 5.2, 15.4, 64, 128.
PREP_LADDER = (
    (8, PrepConfig(inverse_heads=1, heads=1, num_warps=4)),
    (16, PrepConfig(inverse_heads=2, heads=1, num_warps=4)),
    (64, PrepConfig(inverse_heads=4, heads=1, num_warps=4)),
)

# Architecture, head size K -> state rows a program. H100, 2026-11-23, K = V = 128, the same cases with 8 warps in the
# preparation: 32 rows, 4 warps, 2 stages 363, 583, 1095; 3 stages 357, 680, 1289; 64 rows, 4 warps, 2 stages 509, 607,
# 1160; 128 rows, 8 warps, 2 stages 578, 533, 1240. Elsewhere what leaves no spills.
SCAN_LADDER = {
    90: (
        (64, ScanConfig(block_v=32, num_warps=4, num_stages=2)),
        (128, ScanConfig(block_v=32, num_warps=4, num_stages=2)),
        (256, ScanConfig(block_v=32, num_warps=8, num_stages=1)),
    ),
    "cuda": (
        (64, ScanConfig(block_v=32, num_warps=4, num_stages=2)),
        (128, ScanConfig(block_v=32, num_warps=8, num_stages=2)),
        (256, ScanConfig(block_v=32, num_warps=8, num_stages=1)),
    ),
    "hip": (
        (64, ScanConfig(block_v=32, num_warps=4, num_stages=1)),
        (128, ScanConfig(block_v=16, num_warps=4, num_stages=1)),
        (256, ScanConfig(block_v=16, num_warps=4, num_stages=1)),
    ),
}


def _family(target: Target, ladder: dict[Any, Any]) -> Any:
    """The architecture's own entry of a ladder, else its backend's; the interpreter takes CUDA's."""
    if target.arch in ladder:
        return ladder[target.arch]
    return ladder["hip" if target.backend == "hip" else "cuda"]


def prep_config(num_v_heads: int) -> PrepConfig:
    """Chunk preparation: the rung for HV value heads."""
    return next((config for limit, config in PREP_LADDER if num_v_heads <= limit), PREP_LADDER[-1][1])


# Inverses in Gluon. With 168 registers 12 warps share an SM; 128 spill more than the one warp gains that shared memory
# still has room for (H100, 2026-11-26: 16/64 8x1024 81 us, 74).
HOPPER_INVERSE_CONFIG = HopperInverseConfig(registers=168)


def scan_config(head_k_dim: int, target: Target) -> ScanConfig:
    """Chunk recurrence: the rung for head size K on the target's architecture."""
    return _rung(_family(target, SCAN_LADDER), head_k_dim)


# The scan in Gluon, for a state of 64 and of 128 rows a program; and its map pass, which has no output. H100,
# 2026-11-25, us of the scan: heads 4/16 1x8192 with o by the state's own warpgroup 168, by two others 157; with
# products of its own queued behind the chain's 181 to 230. 16/64 4x8192 with o copied by the state's warpgroups 602,
# by the auxiliary one 571; o by a third warpgroup of 136 registers 678. What bounds it is shared memory: 209 KB a chunk
# and 64 rows, 1,630 cycles.
HOPPER_SCAN_NARROW = HopperScanConfig(parts=1, stages=4, state_registers=0, auxiliary_registers=128)
HOPPER_SCAN_WIDE = HopperScanConfig(parts=2, stages=3, state_registers=192, auxiliary_registers=96)
HOPPER_MAP_NARROW = HopperScanConfig(parts=1, stages=3, state_registers=240, auxiliary_registers=0)
HOPPER_MAP_WIDE = HopperScanConfig(parts=2, stages=3, state_registers=232, auxiliary_registers=0)
# SMs that a narrow program each may fill; a 64th row's bits are the same in either program. H100, 2026-11-25, us of the
# whole, narrow and wide: 2/8 8x1024 53, 63; 16/48 1x2048 64, 87; 4/16 8x1024 73, 68; 16/32 8x1024 152, 149.
HOPPER_SMS = 132
# The scan takes sequences in order, longest first, while a program has at most so many of their heads; beyond, nothing
# was measured. 64 sequences of 37 to 769 tokens, throughput, H100, 2026-11-26, us without and with, heads 2/8 128, 121;
# 4/16 235, 233; 8/32 454, 448; and since items are found ahead 16/48 640, 612; 16/64 838, 779 (31 rounds).
ORDERED_ROUNDS = 32


def hopper_scan_config(head_v_dim: int, states: int) -> HopperScanConfig:
    """The scan in Gluon for ``states`` states of V rows at once: narrow programs while each has an SM of its own."""
    narrow = head_v_dim % 128 != 0 or states * (head_v_dim // 64) <= HOPPER_SMS
    return HOPPER_SCAN_NARROW if narrow else HOPPER_SCAN_WIDE


def map_config(head_k_dim: int, head_v_dim: int) -> HopperScanConfig:
    """The map pass of segments: its programs hold rows with values or rows without, never both."""
    return HOPPER_MAP_NARROW if head_k_dim % 128 or head_v_dim % 128 else HOPPER_MAP_WIDE


# Value heads -> segments of a long sequence; only the scan of sm_90 walks them. Joining in 8 warps: a map of 128
# columns, split for tf32x3, does not fit the registers of 4. K = V = 128, H100, 2026-11-26, us of the whole uncut, cut
# with gates that forget within 7 chunks, and cut without any decay: 2/8 1x8192 179, 60, 90; 1x32768 683, 155, 242;
# 4x8192 195, 172, 268; 4/16 1x8192 185, 78, 194; 1x32768 711, 233, 398; 4x8192 241, 312, 294; 8/32 1x8192 209, 144,
# 217; 1x32768 764, 489, 797; 4x8192 395, 422, 409; 16/32 1x8192 214, 151, 224; 16/48 1x32768 843, 781, 904; 28672+4096
# 1044, 832, 1113; 16/64 1x32768 963, 1011, 1028; 28672+4096 1082, 869, 1122.
SEGMENT_LADDER = (
    (8, SegmentConfig(max_segments=8, min_tokens=1024, long_tokens=8192, map_tokens=8192)),
    (16, SegmentConfig(max_segments=4, min_tokens=2048, long_tokens=8192, map_tokens=16384, most_segments=8)),
    (32, SegmentConfig(max_segments=2, min_tokens=4096, long_tokens=8192)),
    (48, SegmentConfig(max_segments=4, min_tokens=8192, long_tokens=16384)),
    (64, SegmentConfig(max_segments=2, min_tokens=8192, long_tokens=16384)),
)
NO_SEGMENTS = SegmentConfig(max_segments=1, min_tokens=1024, long_tokens=1024, num_stages=1)
# The same where the number of sequences may be looked at: value heads and sequences, at most.
THROUGHPUT_SEGMENT_LADDER = (
    (8, 1, SegmentConfig(max_segments=16, min_tokens=1024, long_tokens=8192, map_tokens=8192)),
    (8, 4, SegmentConfig(max_segments=8, min_tokens=4096, long_tokens=8192, map_tokens=8192)),
    (16, 1, SegmentConfig(max_segments=8, min_tokens=2048, long_tokens=8192, map_tokens=16384)),
    (16, 2, SegmentConfig(max_segments=8, min_tokens=4096, long_tokens=8192, map_tokens=16384)),
    (32, 1, SegmentConfig(max_segments=2, min_tokens=4096, long_tokens=8192)),
    (32, 2, SegmentConfig(max_segments=8, min_tokens=4096, long_tokens=8192)),
    (48, 2, SegmentConfig(max_segments=4, min_tokens=8192, long_tokens=16384)),
    (64, 1, NO_SEGMENTS),
    (64, 2, SegmentConfig(max_segments=2, min_tokens=8192, long_tokens=16384)),
)

POLICIES = ("invariant", "throughput")
_policy = POLICIES[0]


def prefill_policy() -> str:
    """The policy that long sequences are cut by: see :func:`use_prefill_policy`."""
    return _policy


def use_prefill_policy(policy: str) -> None:
    """Cut long sequences by ``policy`` from the next call on, in the whole process.

    ``invariant``, the default: by a sequence's own length and gates and by static facts, so that its bits are the same
    alone and in any batch. ``throughput``: also by the number of sequences that the call has offsets for (in a captured
    graph, the same in every replay), so that a batch that fills the GPU is left whole; cutting changes the rounding.

    Raises ValueError for another name. Graphs that are already captured keep what they were captured with.
    """
    global _policy
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    _policy = policy
    replay.forget()


def segment_config(
    num_v_heads: int, head_v_dim: int, target: Target, policy: str = POLICIES[0], states: int = 0
) -> SegmentConfig:
    """How long sequences are cut into segments; ``states``, sequences times heads, matters to ``throughput`` alone."""
    config = NO_SEGMENTS
    if has_descriptors(target):
        ladder = [(limit, states, config) for limit, config in SEGMENT_LADDER]
        if policy == "throughput":
            ladder = [(limit, count * num_v_heads, config) for limit, count, config in THROUGHPUT_SEGMENT_LADDER]
        found = (config for limit, most, config in ladder if num_v_heads <= limit and states <= most)
        config = next(found, NO_SEGMENTS)
    return dataclasses.replace(config, block_v=min(config.block_v, head_v_dim))


# Programmatic dependent launch: a kernel starts while its predecessor ends, and waits for that end before its first
# access to memory (kernels/_math.py), so bits do not change. H100, 2026-11-23, us without and with: gated norm of 4,096
# rows 3.2, 2.9; 16,384 rows 6.6, 6.1; 65,536 rows 19.6, 18.8; conv update + decode + norm of one sequence 7.7, 6.5, of
# 128 sequences 198, 197. The portable chunk kernels go without: programs of the scan that wait take registers and
# shared memory from the preparation (8,192 tokens of 16/32 heads: 478, 568). Hopper's, where a program fills an SM,
# gain: 1x512 of 8/32 heads 23.1, 20.8; 1x8192 of 2/8 62.0, 56.8 (2026-11-26).
PDL = True


def has_pdl(target: Target) -> bool:
    """Whether kernels are launched with programmatic dependent launch: on NVIDIA from sm_90 on."""
    return PDL and target.backend == "cuda" and target.arch >= 90


# ---------------------------------------------------------------------------------------------------------------
# Pinning
# ---------------------------------------------------------------------------------------------------------------

_CHOOSERS: dict[str, Callable[..., Any]] = {
    "layer_norm_gated": norm_config,
    "l2norm": norm_config,
    "gating": lambda: GATING_CONFIG,
    "split_qkvz_ba": lambda: SPLIT_CONFIG,
    "causal_conv1d": lambda: CONV_CONFIG,
    "causal_conv1d_update": lambda: CONV_UPDATE_CONFIG,
    "recurrent": recurrent_config,
    "verify": verify_config,
    "decode_step": step_config,
    "chunk_prep": prep_config,
    "chunk_scan": scan_config,
    "chunk_hopper_inverse": lambda: HOPPER_INVERSE_CONFIG,
    "chunk_hopper_scan": hopper_scan_config,
    "chunk_map": map_config,
    "chunk_segments": segment_config,
}
_pins: dict[str, Any] = {}


@functools.cache
def _choose(kernel: str, facts: tuple) -> Any:
    return _CHOOSERS[kernel](*facts)


def config(kernel: str, *facts: Any) -> Any:
    """The configuration of ``kernel`` for static ``facts``, or the pinned one."""
    return _pins[kernel] if kernel in _pins else _choose(kernel, facts)


def is_pinned(kernel: str) -> bool:
    """Whether ``kernel``'s configuration is pinned: it is then taken where there is a choice of kernels, too."""
    return kernel in _pins


@contextlib.contextmanager
def pinned(kernel: str, config: Any) -> Iterator[None]:
    """Use ``config`` for every launch of ``kernel`` in the block, whatever the ladder says.

    Raises ValueError for an unknown kernel name. The names are those of :func:`ladders`.
    """
    if kernel not in _CHOOSERS:
        raise ValueError(f"kernel must be one of {', '.join(_CHOOSERS)}, got {kernel!r}")
    before = _pins.get(kernel)
    _pins[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _pins[kernel]
        else:
            _pins[kernel] = before


# ---------------------------------------------------------------------------------------------------------------
# Launching: the one place that calls Triton
# ---------------------------------------------------------------------------------------------------------------

_kernels: dict[str, Any] = {}
_compiled: list[tuple[str, Any]] | None = None


def run(kernel: Any, grid: tuple[int, ...], *args: Any, config: Any, fp_fusion: bool = True, **constexprs: Any) -> None:
    """Launch ``kernel`` on the device of its first tensor or descriptor; an empty grid launches nothing.

    Gluon's kernels take the options of Triton's. Their stages are their own: a configuration need not name a number.

    FP fusion is pinned, because bits depend on it and Triton's default is about to change. Without it, two kernels of
    the same source have the same bits: which of two products a sum is fused with is the compiler's choice.
    """
    if 0 in grid:
        return
    _kernels[kernel.__name__] = kernel
    options = {"num_warps": config.num_warps, "enable_fp_fusion": fp_fusion}
    if hasattr(config, "num_stages"):
        options["num_stages"] = config.num_stages
    if hasattr(config, "registers"):
        options["maxnreg"] = config.registers
    bases = (getattr(arg, "base", arg) for arg in args)
    device = next(base.device for base in bases if isinstance(base, torch.Tensor))
    if "PDL" in kernel.arg_names:
        constexprs["PDL"] = has_pdl(target(device))
        if constexprs["PDL"]:  # not an option of every backend
            options["launch_pdl"] = True
    if _compiled is not None:
        _compiled.append((kernel.__name__, kernel.warmup(*args, grid=grid, **constexprs, **options)))
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = kernel[grid](*args, **constexprs, **options)
    else:
        compiled = kernel[grid](*args, **constexprs, **options)
    recording = replay.current()
    if recording is not None:
        rest = (constexprs[name] for name in kernel.arg_names[len(args) :])
        recording.launched(compiled, grid, (*args, *rest))


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None, zero: bool = False) -> torch.Tensor:
    """A fresh contiguous tensor beside ``like``, of its dtype unless another is given; zeros where asked."""
    make = like.new_zeros if zero else like.new_empty
    tensor = make(shape, dtype=dtype or like.dtype)
    recording = replay.current()
    if recording is not None:
        recording.allocated(tensor, zero)
    return tensor


def view(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``tensor``, which is a view of ``base``: said aloud, so that a replay knows where its pointer comes from."""
    recording = replay.current()
    if recording is not None:
        recording.viewed(tensor, base)
    return tensor


def descriptor(base: torch.Tensor, shape: Any, strides: Any, block_shape: Any, layout: Any) -> Any:
    """Gluon's tensor descriptor, an argument of a kernel that loads and stores blocks with TMA.

    ``base`` is an argument of the operator, what :func:`empty` gave, or a :func:`view` of one of them.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(base, list(shape), list(strides), list(block_shape), layout)


def replayable() -> bool:
    """True where a recorded call may stand for a new one: no pins, debug checks, compile-only mode, launch hooks, nor a
    recording under way, which has to see the launches."""
    if _pins or _debug_depth or _compiled is not None or replay.current() is not None:
        return False
    global _runtime
    if _runtime is None:
        import triton

        _runtime = triton.knobs.runtime
    return not (getattr(_runtime.launch_enter_hook, "calls", True) or getattr(_runtime.launch_exit_hook, "calls", True))


_runtime: Any = None


@contextlib.contextmanager
def compile_only(target: Target | None = None) -> Iterator[list[tuple[str, Any]]]:
    """Compile instead of launching, and collect ``(kernel name, compiled kernel)``.

    With ``target`` the configurations are those of that target, whatever the machine; Triton itself compiles for
    its active driver, so a test that has no GPU installs a stand-in driver first.
    """
    global _compiled, _forced_target
    before = _compiled, _forced_target
    _compiled, _forced_target = [], target if target is not None else _forced_target
    try:
        yield _compiled
    finally:
        _compiled, _forced_target = before


def binaries() -> int:
    """How many binaries this process holds for the package's kernels, over all devices."""
    return sum(len(cache[0]) for kernel in _kernels.values() for cache in getattr(kernel, "device_caches", {}).values())


# ---------------------------------------------------------------------------------------------------------------
# Warm-up
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelShapes:
    """Static facts of a model on one rank: head counts and sizes, conv width, dtypes.

    ``draft_tokens``: tokens a row that verification takes, 0 where the model is served without speculation.
    ``stochastic_rounding``: states of 16 bits are written with a ``rounding_seed``, an int64, too.
    """

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int = 128
    head_v_dim: int = 128
    conv_width: int = 4
    dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int32
    A_log_dtype: torch.dtype = torch.float32
    dt_bias_dtype: torch.dtype | None = None
    draft_tokens: int = 0
    stochastic_rounding: bool = False

    def gate_parameters(self, device: torch.device) -> dict[str, torch.Tensor]:
        """``A_log`` and ``dt_bias`` of zeros; ``dt_bias`` is in ``dtype`` unless the model says otherwise."""
        return {
            "A_log": torch.zeros(self.num_v_heads, dtype=self.A_log_dtype, device=device),
            "dt_bias": torch.zeros(self.num_v_heads, dtype=self.dt_bias_dtype or self.dtype, device=device),
        }

    def rounding_seeds(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """The seeds that warm-up calls with: none, and one where states are rounded stochastically."""
        if not self.stochastic_rounding:
            return (None,)
        return None, torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def conv_channels(self) -> int:
        return 2 * self.num_k_heads * self.head_k_dim + self.num_v_heads * self.head_v_dim


@dataclasses.dataclass(frozen=True)
class WarmupReport:
    """What :func:`warmup` did: binaries it made ready, how many of them Triton's disk cache held, seconds, calls."""

    built: int
    cached: int
    seconds: float
    operators: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.built} binaries ready, {self.cached} of them from the disk cache, "
            f"for {len(self.operators)} calls in {self.seconds:.1f} s"
        )


_warmups: dict[str, Callable[[ModelShapes, torch.device], None]] = {}


def register_warmup(name: str, call: Callable[[ModelShapes, torch.device], None]) -> None:
    """Have :func:`warmup` run ``call``, which calls one operator on small tensors of its own."""
    _warmups[name] = call


@contextlib.contextmanager
def _counting_disk_hits() -> Iterator[dict[str, bool]]:
    """Fills with the binaries that Triton makes, by their hash: whether its disk cache held it."""
    import triton

    found: dict[str, bool] = {}
    before = triton.knobs.compilation.listener

    def listener(**facts: Any) -> None:
        found.setdefault(facts["metadata"]["hash"], facts["cache_hit"])  # two threads may make one at once
        if before is not None:
            before(**facts)

    triton.knobs.compilation.listener = listener
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before


def warmup(
    shapes: ModelShapes,
    device: torch.device | str = "cuda",
    *,
    threads: int = 8,
    progress: Callable[[str], None] | None = None,
) -> WarmupReport:
    """Build every binary that a model of ``shapes`` needs on ``device``, before serving.

    Runs each operator in the forms that a layer uses, in capture mode, on small tensors of its own; no live state is
    touched. On a GPU ``threads`` of them build side by side (Triton's compiler leaves the interpreter lock).
    ``progress`` is called with the name of each call. Returns a :class:`WarmupReport`. On a CPU nothing is built.
    """
    device = torch.device(device)
    before, start = binaries(), time.perf_counter()
    on_gpu = device.type == "cuda"

    def call(name: str) -> None:
        if progress is not None:
            progress(name)
        with torch.no_grad(), torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            _warmups[name](shapes, device)

    with capture_mode(), _counting_disk_hits() if on_gpu else contextlib.nullcontext({}) as hits:
        if on_gpu:
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                for done in [pool.submit(call, name) for name in _warmups]:
                    done.result()
        else:
            for name in _warmups:
                call(name)
    if on_gpu:
        torch.cuda.synchronize(device)
    return WarmupReport(binaries() - before, sum(hits.values()), time.perf_counter() - start, tuple(_warmups))
