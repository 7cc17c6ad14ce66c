"""Capture mode, configurations as tables, pinning, launching and warm-up, all without a GPU."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import threading
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gdn_kernels
from gdn_kernels import launch, replay
from gdn_kernels.launch import Target

TARGETS = [
    *(Target("cuda", arch) for arch in (80, 86, 89, 90, 100, 103, 120)),
    *(Target("hip", arch) for arch in ("gfx942", "gfx950")),
    Target("interpreter", 0),
]
HEAD_DIMS = (64, 128, 256)


def elsewhere(function):
    """What ``function`` returns in another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


# ---------------------------------------------------------------------------------------------------------------
# Capture mode and debug checks
# ---------------------------------------------------------------------------------------------------------------


def test_capture_mode_nests() -> None:
    assert not launch.is_capturing()
    with launch.capture_mode():
        with launch.capture_mode():
            assert launch.is_capturing()
        assert launch.is_capturing()
    assert not launch.is_capturing()


def test_capture_mode_is_seen_by_every_thread() -> None:
    assert elsewhere(launch.is_capturing) is False
    with launch.capture_mode():
        assert elsewhere(launch.is_capturing) is True
    assert elsewhere(launch.is_capturing) is False


def test_capture_modes_of_two_threads_overlap() -> None:
    inside, done = threading.Event(), threading.Event()

    def worker() -> None:
        with launch.capture_mode():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=worker)
    with launch.capture_mode():
        thread.start()
        assert inside.wait(10)
    # this thread has left it, the worker has not
    assert launch.is_capturing()
    done.set()
    thread.join()
    assert not launch.is_capturing()


def test_an_exception_leaves_capture_mode() -> None:
    with pytest.raises(KeyError), launch.capture_mode():
        raise KeyError("inside")
    assert not launch.is_capturing()


def test_fake_tensors_are_capture_mode() -> None:
    with FakeTensorMode():
        assert launch.is_capturing()
    assert not launch.is_capturing()


def test_dynamo_sees_capture_mode_as_constant() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1 if launch.is_capturing() else x, backend="eager", fullgraph=True)
    x = torch.zeros(3)
    assert torch.equal(compiled(x), x + 1)
    with torch.compiler.set_stance("fail_on_recompile"), launch.capture_mode():
        assert torch.equal(compiled(x), x + 1)


def test_reading_capture_mode_initialises_no_gpu() -> None:
    before = torch.cuda.is_initialized()
    launch.is_capturing()
    assert torch.cuda.is_initialized() == before


def test_debug_checks_nest_and_an_exception_leaves_them() -> None:
    with launch.debug_checks():
        with launch.debug_checks():
            assert launch.debugging()
        assert launch.debugging()
        assert elsewhere(launch.debugging) is True
    assert not launch.debugging()
    with pytest.raises(KeyError), launch.debug_checks():
        raise KeyError("inside")
    assert not launch.debugging()


def test_capture_mode_silences_debug_checks() -> None:
    with launch.debug_checks():
        with launch.capture_mode():
            assert not launch.debugging()
        with FakeTensorMode():
            assert not launch.debugging()
        assert launch.debugging()


# ---------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------

LADDERS = {
    "norm": launch.NORM_LADDER,
    "recurrent": launch.RECURRENT_LADDER,
    "verify": launch.VERIFY_LADDER,
    "step": launch.STEP_LADDER,
    "prep": launch.PREP_LADDER,
    **{f"scan-{family}": ladder for family, ladder in launch.SCAN_LADDER.items()},
}
CONFIGS = {
    "gating": launch.GATING_CONFIG,
    "split": launch.SPLIT_CONFIG,
    "conv": launch.CONV_CONFIG,
    "conv-update": launch.CONV_UPDATE_CONFIG,
    "hopper-inverse": launch.HOPPER_INVERSE_CONFIG,
    "no-segments": launch.NO_SEGMENTS,
    **{name: getattr(launch, name) for name in dir(launch) if name.startswith(("HOPPER_SCAN_", "HOPPER_MAP_"))},
    **{f"segments-{limit}": config for limit, config in launch.SEGMENT_LADDER},
    **{f"{name}-{limit}": config for name, ladder in LADDERS.items() for limit, config in ladder},
}
TYPES = {type(config) for config in CONFIGS.values()}


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("kind", sorted(TYPES, key=lambda kind: kind.__name__))
def test_configurations_are_frozen_and_hashable(kind: type) -> None:
    config = next(config for config in CONFIGS.values() if type(config) is kind)
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert hash(config) == hash(dataclasses.replace(config)) and config == dataclasses.replace(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_warps = 1


def test_every_kind_of_configuration_is_in_the_tables() -> None:
    declared = {kind for name, kind in vars(launch).items() if inspect.isclass(kind) and name.endswith("Config")}
    assert declared == TYPES


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rung_is_well_formed(name: str) -> None:
    config = CONFIGS[name]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        assert isinstance(value, int)
        if field.name == "num_stages":
            assert 1 <= value <= 4
        elif "registers" in field.name:
            assert value % 8 == 0 and value <= 256
        elif field.name == "stages":
            assert 2 <= value <= 4
        else:
            assert power_of_two(value), f"{field.name} = {value}"
    assert 1 <= config.num_warps <= 16


@pytest.mark.parametrize("name", LADDERS)
def test_the_limits_of_a_ladder_rise(name: str) -> None:
    limits = [limit for limit, _ in LADDERS[name]]
    assert limits == sorted(set(limits)) and all(map(power_of_two, limits))


@pytest.mark.parametrize("name", [name for name in LADDERS if name not in ("norm", "step", "prep")])
def test_a_ladder_covers_every_head_size(name: str) -> None:
    assert tuple(limit for limit, _ in LADDERS[name]) == HEAD_DIMS
    for limit, config in LADDERS[name]:
        # V is never below 64, and a tile of state rows must divide it
        assert config.block_v <= 64, f"K = {limit}"


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("head_v_dim", HEAD_DIMS)
@pytest.mark.parametrize("head_k_dim", HEAD_DIMS)
def test_the_decode_steps_rows_divide_a_head(head_k_dim: int, head_v_dim: int, target: Target) -> None:
    config = launch.step_config(head_k_dim, head_v_dim, target)
    assert head_v_dim % config.block_v == 0 and power_of_two(config.num_warps)
    # 128 elements a thread in flight
    lanes = 64 if target.backend == "hip" else 32
    assert config.block_v * head_k_dim * config.ahead <= 128 * lanes * config.num_warps


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(
    "heads, wanted",
    [(heads, (8, 1024, 8192, 8192, 1)) for heads in (1, 8)]
    + [(heads, (4, 2048, 8192, 16384, 8)) for heads in (9, 16)]
    + [(heads, (2, 4096, 8192, launch.NEVER, 1)) for heads in (17, 32)]
    + [(heads, (4, 8192, 16384, launch.NEVER, 1)) for heads in (33, 48)]
    + [(heads, (2, 8192, 16384, launch.NEVER, 1)) for heads in (49, 64)]
    + [(heads, (1, 1024, 1024, launch.NEVER, 1)) for heads in (65, 128)],
)
def test_long_sequences_are_cut_on_hopper_alone(heads: int, wanted: tuple[int, ...], target: Target) -> None:
    config = launch.segment_config(heads, 128, target)
    found = config.max_segments, config.min_tokens, config.long_tokens, config.map_tokens, config.most_segments
    assert found == (wanted if target.arch == 90 else (1, 1024, 1024, launch.NEVER, 1))
    assert 128 % config.block_v == 0 and config.min_tokens % 64 == 0


@pytest.mark.parametrize(
    "places, num_v_heads, ratio, wanted",
    [
        (1, 64, 4, (1, 1, 1)),
        (16, 64, 4, (1, 16, 1)),
        (17, 64, 4, (2, 17, 2)),
        (23, 48, 3, (3, 23, 3)),
        (34, 40, 5, (5, 34, 5)),
        (41, 64, 4, (2, 41, 2)),
        (42, 64, 4, (4, 42, 4)),
        (99, 64, 4, (4, 99, 4)),
        (100, 64, 4, (4, 99, 2)),
        (517, 64, 4, (4, 495, 2)),
        (517, 48, 3, (3, 495, 1)),
        (517, 32, 2, (2, 495, 1)),
        (517, 128, 8, (4, 490, 2)),
        (1 << 14, 16, 1, (1, 16335, 1)),
    ],
)
def test_inverses_share_keys_in_whole_rounds(
    places: int, num_v_heads: int, ratio: int, wanted: tuple[int, int, int]
) -> None:
    from gdn_kernels.kernels import chunk_hopper_inverse

    assert chunk_hopper_inverse.shares(places, num_v_heads, ratio) == wanted


def test_states_are_copied_as_tiles_where_slots_lie_on_16_bytes() -> None:
    from gdn_kernels.kernels.chunk_hopper import fits_tiles

    pool = torch.zeros(3, 2, 64, 64)
    for states in (
        pool,
        pool[:1],
        pool[1:],
        pool.bfloat16(),
        pool.half(),
        torch.zeros(3, 8196)[:, :8192].view(pool.shape),
    ):
        assert fits_tiles(states)
    unaligned = torch.zeros(3 * 8193)[1:8193].view(1, 2, 64, 64)
    apart = torch.zeros(3, 8193)[:, :8192].view(pool.shape)
    for states in (None, pool[:0], pool.double(), pool[:1].expand(3, -1, -1, -1), unaligned, apart):
        assert not fits_tiles(states)


# Configurations of the scan in Gluon have 64 rows of the state a part.
@pytest.mark.parametrize(
    "head_v_dim, states, parts",
    [(64, 1, 1), (64, 4096, 1), (128, 1, 1), (128, 66, 1), (128, 67, 2), (128, 4096, 2), (256, 33, 1), (256, 34, 2)],
)
def test_narrow_scans_while_each_program_has_an_sm(head_v_dim: int, states: int, parts: int) -> None:
    config = launch.hopper_scan_config(head_v_dim, states)
    assert config is {1: launch.HOPPER_SCAN_NARROW, 2: launch.HOPPER_SCAN_WIDE}[parts]
    assert config.parts == parts and head_v_dim % (64 * parts) == 0


@pytest.mark.parametrize("head_v_dim", HEAD_DIMS)
@pytest.mark.parametrize("head_k_dim", HEAD_DIMS)
def test_programs_of_the_map_pass_divide_values_and_keys(head_k_dim: int, head_v_dim: int) -> None:
    config = launch.map_config(head_k_dim, head_v_dim)
    assert config is (launch.HOPPER_MAP_NARROW if 64 in (head_k_dim, head_v_dim) else launch.HOPPER_MAP_WIDE)
    assert head_k_dim % (64 * config.parts) == head_v_dim % (64 * config.parts) == 0


@pytest.mark.parametrize("group", [1, 63, 64, 65, 97, 128, 1000, 1024, 4096, 8192, 20000, 65536])
def test_the_norm_rung_is_the_smallest_that_holds_the_group(group: int) -> None:
    config = launch.norm_config(group)
    assert config.block_cols >= min(group, 8192)
    smaller = [limit for limit, _ in launch.NORM_LADDER if limit >= group]
    assert config is dict(launch.NORM_LADDER)[min(smaller)]
    # a thread holds at most 64 fp32 elements of a tile
    assert config.block_rows * config.block_cols <= 64 * 32 * config.num_warps


@pytest.mark.parametrize(("heads", "inverse_heads"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (64, 4), (128, 4)])
def test_many_value_heads_share_programs_of_the_inverse(heads: int, inverse_heads: int) -> None:
    assert launch.prep_config(heads).inverse_heads == inverse_heads


def test_throughput_looks_at_the_number_of_sequences() -> None:
    hopper = Target("cuda", 90)
    for heads, sequences, segments in (
        (8, 1, 16),
        (8, 4, 8),
        (8, 5, 1),
        (16, 2, 8),
        (16, 3, 1),
        (48, 1, 4),
        (64, 1, 1),
        (64, 2, 2),
        (64, 3, 1),
    ):
        config = launch.segment_config(heads, 128, hopper, "throughput", sequences * heads)
        assert config.max_segments == segments, (heads, sequences)
    assert launch.segment_config(8, 128, hopper, "throughput", 8).min_tokens == 1024
    assert launch.segment_config(8, 128, hopper, "throughput", 9).min_tokens == 4096
    assert launch.segment_config(8, 128, hopper, "invariant", 33) == launch.segment_config(8, 128, hopper)
    assert launch.segment_config(8, 128, Target("cuda", 80), "throughput", 1).max_segments == 1


@pytest.mark.parametrize("head_v_dim, items", [(64, 1), (128, 1), (256, 2)])
def test_sequences_are_in_order_where_programs_take_several_of_them(head_v_dim: int, items: int) -> None:
    from gdn_kernels.kernels import chunk_segments

    found = [count for count in range(1, 5000) if chunk_segments.in_order(count, 1, head_v_dim, 132)]
    assert found == list(range(132 // items + 1, 32 * 132 // items + 1))
    assert found == [c for c in range(1, 5000) if chunk_segments.in_order(1, c, head_v_dim, 132)]


@pytest.mark.parametrize("policy", launch.POLICIES)
@pytest.mark.parametrize("heads", [1, 8, 9, 16, 17, 32, 33, 48, 64, 65, 128])
def test_warmup_meets_every_binary_of_prefill(heads: int, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gdn_kernels.kernels import chunk_segments
    from gdn_kernels.ops import chunk

    hopper = Target("cuda", 90)
    monkeypatch.setattr(launch, "target", lambda _: hopper)
    monkeypatch.setattr(launch, "_policy", policy)

    def binaries(count: int, tokens: int) -> tuple:
        """What of a call with offsets decides which kernels run, and which of their binaries."""
        segments = launch.segment_config(heads, 128, hopper, policy, count * heads)
        offsets = torch.empty(count + 1)
        cut, mapped = (
            chunk_segments.num_places(count, tokens, offsets, segments, bound) > 0
            for bound in (segments.long_tokens, segments.map_tokens)
        )
        states = chunk_segments.num_states(count, tokens, heads, segments)
        return segments if cut else None, mapped, launch.hopper_scan_config(128, states)

    shapes = launch.ModelShapes(heads, heads, 128, 128)
    warm = {binaries(*plan) for plan in chunk._warm_plans(shapes, torch.device("cuda"))}
    sizes = [1, 64, 4095, *(bound + more for bound in (8192, 16384, 20000, 32768, 65536) for more in (-1, 0, 1, 1100))]
    met = {binaries(count, tokens) for count in (*range(1, 8), 16, 33, 67, 132, 133, 500) for tokens in sizes}
    assert met <= warm and len(met) > (heads <= 64)


def test_a_policy_is_named_and_forgets_what_was_recorded() -> None:
    with pytest.raises(ValueError, match=r"^policy must be one of invariant, throughput, got 'fast'$"):
        launch.use_prefill_policy("fast")
    assert launch.prefill_policy() == "invariant"
    calls: list[str] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        calls.append(launch.prefill_policy())
        return x

    run = replay.dispatcher("twice(Tensor x) -> Tensor", call, lambda: True)
    known, last = replay._recorded[-1]
    try:
        known[("a key",)] = call
        last[0] = (("a key",), call)
        launch.use_prefill_policy("throughput")
        assert launch.prefill_policy() == "throughput"
        assert not known and last == [(None, None, None)]
        run(torch.zeros(1))
        assert calls == ["throughput"]
    finally:
        launch.use_prefill_policy("invariant")
        replay._recorded.pop()


def test_a_group_past_the_ladder_names_the_limit() -> None:
    with pytest.raises(NotImplementedError, match=r"^group_size must be at most 65536, got 65537$"):
        launch.norm_config(65537)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
@pytest.mark.parametrize("size", HEAD_DIMS)
def test_every_target_and_head_size_has_its_rungs(size: int, target: Target) -> None:
    def family(ladder: dict) -> object:
        """The architecture's own entry, or its vendor's; the interpreter stands for a GPU of the first."""
        return target.arch if target.arch in ladder else "hip" if target.backend == "hip" else "cuda"

    assert launch.scan_config(size, target) is dict(launch.SCAN_LADDER[family(launch.SCAN_LADDER)])[size]
    assert launch.recurrent_config(size) is dict(launch.RECURRENT_LADDER)[size]
    assert launch.verify_config(size, 4) is dict(launch.VERIFY_LADDER)[size]
    assert launch.verify_config(size, 2) is launch.recurrent_config(size)


def test_a_head_size_past_the_ladders_names_the_limit() -> None:
    hopper = Target("cuda", 90)
    for call, *facts in (launch.recurrent_config,), (launch.verify_config, 4), (launch.scan_config, hopper):
        with pytest.raises(NotImplementedError, match=r"^head_k_dim must be at most 256, got 512$"):
            call(512, *facts)


def test_shared_memory_of_an_unknown_architecture_is_the_smallest() -> None:
    assert Target("cuda", 90).shared_memory == 227 * 1024
    assert Target("cuda", 87).shared_memory == 99 * 1024


def test_no_chooser_takes_a_token_count() -> None:
    # states: sequences times heads, which a captured plan fixes too
    static = {"group_size", "num_v_heads", "head_k_dim", "head_v_dim", "target", "states", "policy", "itemsize"}
    for name, chooser in launch._CHOOSERS.items():
        assert set(inspect.signature(chooser).parameters) <= static, name


FACTS = {
    "layer_norm_gated": [(128,), (20000,)],
    "l2norm": [(64,)],
    "gating": [()],
    "split_qkvz_ba": [()],
    "causal_conv1d": [()],
    "causal_conv1d_update": [()],
    "recurrent": [(size,) for size in HEAD_DIMS],
    "verify": [(size, itemsize) for size in HEAD_DIMS for itemsize in (2, 4)],
    "decode_step": [(size, size, target) for size in HEAD_DIMS for target in TARGETS],
    "chunk_prep": [(heads,) for heads in (1, 8, 32)],
    "chunk_scan": [(size, target) for size in HEAD_DIMS for target in TARGETS],
    "chunk_hopper_inverse": [()],
    "chunk_hopper_scan": [(size, states) for size in HEAD_DIMS for states in (1, 66, 67, 4096)],
    "chunk_map": [(size, other) for size in HEAD_DIMS for other in HEAD_DIMS],
    "chunk_segments": [(heads, 128, target) for heads in (1, 8, 9, 16, 17, 64) for target in TARGETS],
}


def test_a_configuration_is_the_same_in_capture_mode_and_outside() -> None:
    assert FACTS.keys() == launch._CHOOSERS.keys()
    for name, all_facts in FACTS.items():
        for facts in all_facts:
            outside = launch.config(name, *facts)
            with launch.capture_mode():
                assert launch.config(name, *facts) is outside
            assert launch._CHOOSERS[name](*facts) == outside


def test_a_cpu_tensor_has_the_interpreters_target() -> None:
    assert launch.target(torch.device("cpu")) == Target("interpreter", 0)


# ---------------------------------------------------------------------------------------------------------------
# Pinning
# ---------------------------------------------------------------------------------------------------------------


def test_a_pin_holds_nests_and_is_undone() -> None:
    own = launch.config("gating")
    first, second = launch.RowsConfig(1, 1), launch.RowsConfig(2, 2)
    with launch.pinned("gating", first):
        assert launch.config("gating") is first
        with launch.pinned("gating", second):
            assert launch.config("gating") is second
        assert launch.config("gating") is first
        assert launch.config("split_qkvz_ba") is launch.SPLIT_CONFIG
    assert launch.config("gating") is own


def test_a_pin_ignores_the_facts() -> None:
    pin = launch.RecurrentConfig(8, 1)
    with launch.pinned("recurrent", pin):
        assert {launch.config("recurrent", size) for size in HEAD_DIMS} == {pin}


def test_an_exception_undoes_a_pin() -> None:
    own = launch.config("gating")
    with pytest.raises(KeyError), launch.pinned("gating", launch.RowsConfig(1, 1)):
        raise KeyError("inside")
    assert launch.config("gating") is own


def test_an_unknown_kernel_cannot_be_pinned() -> None:
    message = r"^kernel must be one of layer_norm_gated, .*chunk_segments, got 'chunk'$"
    with pytest.raises(ValueError, match=message), launch.pinned("chunk", launch.GATING_CONFIG):
        pass
    assert not launch._pins


# ---------------------------------------------------------------------------------------------------------------
# Launching, with a stand-in kernel
# ---------------------------------------------------------------------------------------------------------------


class Kernel:
    """Records what it is launched and compiled with, as a Triton kernel would be."""

    __name__ = "stand_in"

    def __init__(self) -> None:
        self.arg_names = ["x_ptr", "n", "BLOCK"]
        self.launched, self.warmed, self.device_caches = [], [], {}

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((grid, args, options))

    def warmup(self, *args, **options):
        self.warmed.append((args, options))
        return "binary"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch, "_kernels", {})
    return Kernel()


CONFIG = launch.RowsConfig(block_rows=4, num_warps=2)


def test_run_launches_with_the_configuration_and_pinned_fusion(kernel: Kernel) -> None:
    x = torch.zeros(3)
    launch.run(kernel, (5,), x, 7, config=CONFIG, BLOCK=4)
    ((grid, args, options),) = kernel.launched
    assert grid == (5,) and args[0] is x and args[1] == 7
    assert options == {"BLOCK": 4, "num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}


@pytest.mark.parametrize(
    ("target", "dependent"),
    [
        (launch.Target("cuda", 90), True),
        (launch.Target("cuda", 120), True),
        (launch.Target("cuda", 80), False),
        (launch.Target("hip", "gfx942"), False),
        (launch.Target("interpreter", 0), False),
    ],
    ids=str,
)
def test_a_kernel_that_waits_is_launched_early_where_the_architecture_can(kernel, target, dependent) -> None:
    kernel.arg_names = [*kernel.arg_names, "PDL"]
    with launch.compile_only(target):
        launch.run(kernel, (5,), torch.zeros(3), config=CONFIG, BLOCK=4)
    ((_, options),) = kernel.warmed
    assert options["PDL"] is dependent
    # backends without it refuse the option
    assert options.get("launch_pdl", False) is dependent and ("launch_pdl" in options) is dependent


def test_run_turns_fusion_off_where_a_kernel_asks(kernel: Kernel) -> None:
    launch.run(kernel, (5,), torch.zeros(3), config=CONFIG, fp_fusion=False)
    with launch.compile_only():
        launch.run(kernel, (5,), torch.zeros(3), config=CONFIG, fp_fusion=False)
    assert kernel.launched[0][2]["enable_fp_fusion"] is kernel.warmed[0][1]["enable_fp_fusion"] is False


@pytest.mark.parametrize("grid", [(0,), (0, 3), (3, 0)], ids=str)
def test_an_empty_grid_launches_and_compiles_nothing(kernel: Kernel, grid: tuple[int, ...]) -> None:
    launch.run(kernel, grid, torch.zeros(0), config=CONFIG)
    with launch.compile_only() as compiled:
        launch.run(kernel, grid, torch.zeros(0), config=CONFIG)
    assert not kernel.launched and not kernel.warmed and not compiled


def test_compile_only_collects_and_launches_nothing(kernel: Kernel) -> None:
    with launch.compile_only() as compiled:
        launch.run(kernel, (5,), torch.zeros(3), config=CONFIG, BLOCK=4)
    assert compiled == [("stand_in", "binary")] and not kernel.launched
    assert kernel.warmed[0][1] == {
        "grid": (5,),
        "BLOCK": 4,
        "num_warps": 2,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    launch.run(kernel, (5,), torch.zeros(3), config=CONFIG)
    assert len(kernel.launched) == 1 and len(compiled) == 1


def test_compile_only_forces_its_target_and_restores(kernel: Kernel) -> None:
    cpu, target = torch.device("cpu"), Target("hip", "gfx942")
    with launch.compile_only(target) as outer:
        assert launch.target(cpu) == target
        with launch.compile_only(Target("cuda", 80)) as inner:
            assert launch.target(cpu) == Target("cuda", 80)
            launch.run(kernel, (1,), torch.zeros(1), config=CONFIG)
        with launch.compile_only():
            assert launch.target(cpu) == target
        assert launch.target(cpu) == target
    assert len(inner) == 1 and not outer
    with pytest.raises(KeyError), launch.compile_only(target):
        raise KeyError("inside")
    assert launch.target(cpu) == Target("interpreter", 0)


def test_a_descriptor_names_the_device_and_stages_are_optional(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(launch, "target", lambda device: asked.append(device) or Target("cuda", 90))
    kernel.arg_names = [*kernel.arg_names, "PDL"]
    descriptor = types.SimpleNamespace(base=torch.zeros(3, device="meta"))
    launch.run(kernel, (5,), 3, descriptor, torch.zeros(3), config=types.SimpleNamespace(num_warps=4))
    ((_, _, options),) = kernel.launched
    assert asked == [torch.device("meta")]
    assert options == {"num_warps": 4, "enable_fp_fusion": True, "PDL": True, "launch_pdl": True}


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_descriptors_are_hoppers(target: Target) -> None:
    assert launch.has_descriptors(target) is (target == Target("cuda", 90))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compile_only_builds_one_binary_of_a_kernel_with_descriptors(device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    import gluon_copy
    import triton_support
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver, "_active", triton_support.StandInDriver("cuda", 90))
    monkeypatch.setattr(launch, "_kernels", {})
    caches = collections.defaultdict(gluon_copy.copy_rows.create_binder)
    monkeypatch.setattr(gluon_copy.copy_rows, "device_caches", caches)
    with launch.compile_only(Target("cuda", 90)) as compiled:
        for tokens in (9, 72, 100, 500):
            gluon_copy.copy(torch.zeros(tokens, gluon_copy.COLS, dtype=torch.bfloat16, device=device))
    assert len(compiled) == 4 and launch.binaries() == 1
    assert "cp.async.bulk.tensor" in compiled[0][1].asm["ptx"]


def test_binaries_counts_what_the_kernels_hold(kernel: Kernel) -> None:
    assert launch.binaries() == 0
    launch.run(kernel, (1,), torch.zeros(1), config=CONFIG)
    assert launch.binaries() == 0
    kernel.device_caches = {0: ({"a": 1, "b": 2}, {}), 1: ({"a": 1}, {})}
    assert launch.binaries() == 3


# ---------------------------------------------------------------------------------------------------------------
# Warm-up
# ---------------------------------------------------------------------------------------------------------------


def test_warmup_runs_every_operator_in_capture_mode_and_builds_nothing_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def watched(name, call):
        def run(shapes, device):
            seen[name] = launch.is_capturing(), torch.is_grad_enabled(), device
            call(shapes, device)

        return run

    monkeypatch.setattr(launch, "_warmups", {name: watched(name, call) for name, call in launch._warmups.items()})
    named = []
    report = launch.warmup(launch.ModelShapes(1, 2, 64, 64), "cpu", progress=named.append)
    assert report.built == 0 and report.seconds > 0
    assert tuple(named) == report.operators == tuple(launch._warmups) == tuple(seen)
    assert set(seen.values()) == {(True, False, torch.device("cpu"))}
    assert not launch.is_capturing()


def test_warmup_reaches_every_operator_a_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "gdn":
                called.add(func._schema.name.removeprefix("gdn::"))
            return func(*args, **(kwargs or {}))

    with Watch():
        launch.warmup(launch.ModelShapes(1, 2, 64, 64), "cpu")
    layer = {"split_qkvz_ba", "causal_conv1d", "causal_conv1d_update", "chunk_gated_delta_rule_paged", "packed_decode"}
    assert called >= layer | {"layer_norm_gated", "gating", "l2norm", "recurrent_gated_delta_rule"}


@pytest.mark.parametrize("rounding", [False, True], ids=["to-nearest", "stochastic"])
def test_warmup_rounds_states_stochastically_where_the_model_does(rounding: bool) -> None:
    seeded = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if (kwargs or {}).get("rounding_seed") is not None:
                assert kwargs["rounding_seed"].dtype is torch.int64
                seeded.add(func._schema.name.removeprefix("gdn::"))
            return func(*args, **(kwargs or {}))

    shapes = launch.ModelShapes(1, 2, 64, 64, state_dtype=torch.bfloat16, draft_tokens=2, stochastic_rounding=rounding)
    with Watch():
        launch.warmup(shapes, "cpu")
    recurrent = {"recurrent_gated_delta_rule_paged", "recurrent_gated_delta_rule_verify"}
    operators = recurrent | {"packed_decode", "decode_step"}
    assert seeded == (operators if rounding else set())


def test_warmup_touches_no_state_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call makes its own tensors: it is given shapes and a device, nothing else."""
    for name, call in launch._warmups.items():
        assert len(inspect.signature(call).parameters) == 2, name
    monkeypatch.setattr(launch, "_warmups", {"broken": lambda shapes, device: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        launch.warmup(launch.ModelShapes(1, 1), "cpu")
    assert not launch.is_capturing()


def test_a_model_has_the_conv_channels_of_its_heads() -> None:
    shapes = launch.ModelShapes(num_k_heads=2, num_v_heads=6, head_k_dim=64, head_v_dim=128)
    assert shapes.conv_channels == 2 * 2 * 64 + 6 * 128
    assert hash(shapes) == hash(dataclasses.replace(shapes))


def test_the_package_exports_what_it_lists() -> None:
    assert all(hasattr(gdn_kernels, name) for name in gdn_kernels.__all__)
    assert isinstance(gdn_kernels.launch, types.ModuleType)
