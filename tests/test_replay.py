"""Replay of recorded calls: pointers come from arguments and allocations, whatever they were when recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import types
import weakref

import operator_cases
import pytest
import replay_support
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gdn_kernels
from gdn_kernels import launch, replay
from gdn_kernels.ops import registry

# ---------------------------------------------------------------------------------------------------------------
# Without a GPU: a stand-in for the compiled kernel and for the device's stream
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    replay_support.stand_in_for_a_device(monkeypatch)


class Compiled:
    """Notes the arguments it is launched with."""

    def __init__(self):
        self.calls, self.function, self.packed_metadata = [], "function", "metadata"

    def run(self, *args):
        self.calls.append(args)


def record(x, y, compiled, result=None, **options):
    recording = replay.Recording("stand-in", [x, None, y])
    with recording:
        out = launch.empty(x, *x.shape, **options)
        part = launch.view(y[2:], y)
        recording.launched(compiled, (4,), (x, part, out, 3, None))
    return recording.replay(out if result is None else result(out)), out


def test_a_replay_puts_new_pointers_in(device):
    compiled = Compiled()
    repeat, _ = record(torch.zeros(8), torch.zeros(8), compiled)
    other_x, other_y = torch.zeros(8), torch.zeros(8)
    made = repeat(other_x.data_ptr(), None, other_y.data_ptr())
    expected = (4, 1, 1, 77, "function", "metadata", None, None, None)
    pointers = (other_x.data_ptr(), other_y.data_ptr() + 8, made.data_ptr(), 3, None)
    assert compiled.calls == [expected + pointers]
    assert made.shape == (8,)


class CudaLauncher:
    """As Triton 3.6 has it: arguments of its own before the kernel's."""

    launch_cooperative_grid, launch_pdl, global_scratch_size, profile_scratch_size = False, True, 0, 0

    def __init__(self):
        self.calls, self.through = [], []

    def launch(self, *args):
        self.calls.append(args)

    def __call__(self, *args):
        self.through.append(args)


@pytest.mark.parametrize("scratch", [0, 128])
def test_a_launcher_is_passed_by_where_it_has_nothing_to_add(device, scratch):
    launcher = CudaLauncher()
    launcher.global_scratch_size = scratch
    compiled = types.SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")
    x, y = torch.zeros(8), torch.zeros(8)
    repeat, _ = record(x, y, compiled)
    launcher.calls.clear()
    made = repeat(x.data_ptr(), None, y.data_ptr())
    own = (x.data_ptr(), y.data_ptr() + 8, made.data_ptr(), 3, None)
    if scratch:
        assert launcher.through == [(4, 1, 1, 77, "function", "metadata", None, None, None, *own)]
    else:
        flags = (False, True, None, None)
        assert launcher.calls == [(4, 1, 1, 77, "function", *flags, "metadata", None, None, None, *own)]


def test_two_launches_and_two_results_are_repeated_in_order(device):
    first, second = Compiled(), Compiled()
    x = torch.zeros(4, 6)
    recording = replay.Recording("stand-in", [x])
    with recording:
        a = launch.empty(x, 2, 3)
        b = launch.empty(x, 5, dtype=torch.int32, zero=True)
        recording.launched(first, (1, 2, 3), (x, a))
        recording.launched(second, (9,), (a, b, 2.5))
    found = recording.replay((b, a))(x.data_ptr())
    assert [(t.shape, t.dtype) for t in found] == [((5,), torch.int32), ((2, 3), torch.float32)]
    assert not found[0].any()
    assert first.calls[0][:3] == (1, 2, 3) and first.calls[0][9:] == (x.data_ptr(), found[1].data_ptr())
    assert second.calls[0][:3] == (9, 1, 1) and second.calls[0][9:] == (found[1].data_ptr(), found[0].data_ptr(), 2.5)


def test_replays_of_one_form_share_their_code_and_nothing_else(device):
    compiled = Compiled(), Compiled()
    repeats = [record(torch.zeros(n), torch.zeros(n), c)[0] for n, c in zip((8, 16), compiled, strict=True)]
    assert repeats[0].__code__ is repeats[1].__code__
    assert [repeat(0, None, 0).shape for repeat in repeats] == [(8,), (16,)]
    assert [len(c.calls) for c in compiled] == [1, 1]


def test_a_replay_on_another_device_changes_to_its_own(device, monkeypatch):
    x, y, entered = torch.zeros(8), torch.zeros(8), []
    compiled = Compiled()
    repeat, _ = record(x, y, compiled)

    @contextlib.contextmanager
    def change(index):
        entered.append(index)
        now.append(index)
        yield
        now.pop()

    now = [3]
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: now[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "device", change)
    repeat, _ = record(x, y, compiled)
    repeat(x.data_ptr(), None, y.data_ptr())
    assert entered == [-1] and len(compiled.calls) == 1


def test_a_result_that_views_its_allocation_is_made_in_that_shape(device):
    x = torch.zeros(1, 8)
    recording = replay.Recording("stand-in", [x])
    with recording:
        out = launch.empty(x, *x.shape)
        result = launch.view(out.squeeze(0), out)
    assert recording.replay(result)(0).shape == (8,)
    assert recording.replay(out)(0).shape == (1, 8)


def test_a_replay_keeps_no_tensor_of_the_recorded_call_alive(device):
    x, y = torch.zeros(8), torch.zeros(8)
    repeat, out = record(x, y, Compiled())
    watched = [weakref.ref(tensor) for tensor in (x, y, out)]
    del x, y, out
    gc.collect()
    assert repeat is not None and [ref() for ref in watched] == [None] * 3


@pytest.mark.parametrize("stray", ["argument", "result", "triton"])
def test_what_cannot_be_traced_is_not_repeated(device, monkeypatch, stray):
    monkeypatch.setattr(replay, "_reasons", {})
    x = torch.zeros(8)
    recording = replay.Recording("stand-in", [x])
    with recording:
        out = launch.empty(x, 8)
        compiled = types.SimpleNamespace() if stray == "triton" else Compiled()
        recording.launched(compiled, (1,), (x.clone() if stray == "argument" else x, out))
    assert recording.replay(x.clone() if stray == "result" else out) is None
    assert list(replay.reasons()) == ["stand-in"]


def test_a_recording_ends_with_its_call_and_is_the_threads_own():
    recording = replay.Recording("stand-in", [torch.zeros(1)])
    with pytest.raises(ZeroDivisionError), recording:
        assert replay.current() is recording
        seen = []
        thread = threading.Thread(target=lambda: seen.append(replay.current()))
        thread.start()
        thread.join()
        assert seen == [None]
        _ = 1 / 0
    assert replay.current() is None


# ---------------------------------------------------------------------------------------------------------------
# Without a GPU: tensor descriptors
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TensorDescriptor:
    """As Gluon has it."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: str = "swizzled"
    padding: str = "zero"


def descriptor(tensor, **options):
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [8, 16], **options)


def record_descriptors(compiled, kind=descriptor, **options):
    """A launch with descriptors of an argument, of a view of it and of an allocation, and what they describe."""
    x = torch.zeros(32, 16)
    recording = replay.Recording("stand-in", [x])
    with recording:
        out = launch.empty(x, 24, 16)
        part = launch.view(x[8:], x)
        arguments = kind(x), 5, kind(part, **options), x, kind(out), "constexpr"
        recording.launched(compiled, (4,), arguments)
    return recording.replay(out), (x, part, out)


def described(argument):
    return argument.base.data_ptr(), argument.shape, argument.strides, argument.padding, argument.round_f32_to_tf32


def test_a_replay_makes_descriptors_around_new_pointers(device):
    compiled, x = Compiled(), torch.zeros(32, 16)
    repeat, _ = record_descriptors(compiled, padding="nan")
    y = torch.zeros(32, 16)
    given = (x, x, y, x)
    made = [repeat(each.data_ptr()) for each in given]
    calls = [arguments[9:] for arguments in compiled.calls]
    for (first, n, second, pointer, third, constant), each, out in zip(calls, given, made, strict=True):
        assert (n, pointer, constant) == (5, each.data_ptr(), "constexpr")
        assert described(first) == (each.data_ptr(), (32, 16), (16, 1), "zero", False)
        assert described(second) == (each[8:].data_ptr(), (24, 16), (16, 1), "nan", False)
        assert described(third) == (out.data_ptr(), (24, 16), (16, 1), "zero", False)
    # made again for another pointer only, and never changed: another thread may be in a launch with it
    assert calls[1][0] is calls[0][0] and calls[1][2] is calls[0][2]
    assert not {id(calls[i][j]) for i in (0, 2) for j in (0, 2)} & {id(calls[3][j]) for j in (0, 2)}


def test_launches_share_what_is_made_of_one_pointer(device):
    compiled, x = Compiled(), torch.zeros(32, 16)
    recording = replay.Recording("stand-in", [x])
    with recording:
        out = launch.empty(x, 8)
        for padding in ("zero", "zero", "nan"):
            recording.launched(compiled, (1,), (descriptor(x, padding=padding), out))
    recording.replay(out)(x.data_ptr())
    first, second, other = (arguments[9] for arguments in compiled.calls)
    assert first is second and described(other) == (x.data_ptr(), (32, 16), (16, 1), "nan", False)


def test_what_is_no_result_is_part_of_one_allocation(device, monkeypatch):
    compiled, x, made, empty = Compiled(), torch.zeros(32, 16), [], replay._empty
    monkeypatch.setattr(replay, "_empty", lambda *options: (made.append(empty(*options)), made[-1])[1])
    recording = replay.Recording("stand-in", [x])
    with recording:
        first, out = launch.empty(x, 100, 3), launch.empty(x, 8)
        second = launch.empty(x, 5, dtype=torch.int32)
        arguments = first, out, second, launch.view(first[2:], first), descriptor(second)
        recording.launched(compiled, (1,), arguments)
    result = recording.replay(out)(x.data_ptr())
    first, out, second, part, described = compiled.calls[0][9:]
    scratch, given = made
    assert given is result and out == result.data_ptr() and scratch.nbytes == 1536 + 512
    assert (first, second, part) == tuple(scratch.data_ptr() + offset for offset in (0, 1536, 24))
    assert described.pointer == second


def test_a_replay_keeps_no_described_tensor_alive(device):
    repeat, tensors = record_descriptors(Compiled())
    watched = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    gc.collect()
    assert repeat is not None and [ref() for ref in watched] == [None] * 3


@pytest.mark.parametrize("stray", ["base", "im2col"])
def test_a_descriptor_that_cannot_be_traced_is_not_repeated(device, monkeypatch, stray):
    monkeypatch.setattr(replay, "_reasons", {})
    x = torch.zeros(32, 16)
    given = descriptor(x.clone() if stray == "base" else x)
    if stray == "im2col":
        given.pixel_box_lower_corner = [0]
    recording = replay.Recording("stand-in", [x])
    with recording:
        out = launch.empty(x, 8)
        recording.launched(Compiled(), (1,), (5, given, out))
    assert recording.replay(out) is None
    why = "the base of argument 1 of a launch is neither an argument nor an allocation"
    assert replay.reasons() == {
        "stand-in": "argument 1 of a launch is an im2col descriptor" if stray == "im2col" else why
    }


class Triton:
    """The installed Triton's own launcher for a kernel with descriptors, above stand-ins of what it has in C."""

    def __init__(self, monkeypatch):
        driver = pytest.importorskip("triton.backends.nvidia.driver")
        from triton.runtime.driver import driver as active

        self.launched = []
        fill = lambda *args: ("map", *(tuple(x) if isinstance(x, list) else x for x in args))  # noqa: E731
        utils = types.SimpleNamespace(fill_tma_descriptor_tiled=fill)
        if not hasattr(driver, "make_kernel_signature"):  # Triton 3.6
            utils.fill_tma_descriptor = fill
        monkeypatch.setattr(active, "_active", types.SimpleNamespace(utils=utils))
        monkeypatch.setattr(driver._allocation, "has_profile_allocator", lambda: True, raising=False)
        kind = "tensordesc<fp32[8,16],layout>"
        signature = dict(enumerate((kind, "i32", kind, "*fp32", kind, "constexpr")))
        meta = {"swizzle": 3, "elem_size": 4, "elem_type": 8, "block_size": [8, 16], "fp4_padded": False}
        metas = [{**meta, "swizzle": swizzle} for swizzle in (1, 2, 3)]
        self.run = object.__new__(driver.CudaLauncher)
        facts = {"launch_cooperative_grid": False, "launch_pdl": True, "num_ctas": 1, "gsan_enabled": False}
        facts |= {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in ("size", "align")}
        if hasattr(driver, "make_kernel_signature"):
            facts |= {"arg_annotations": "annotations", "kernel_signature": "signature"}
        vars(self.run).update(facts, launch=driver.wrap_handle_tensordesc(self.launch, signature, metas))
        self.function, self.packed_metadata = "function", "metadata"

    def launch(self, *args):
        self.launched.append([tuple(arg) if isinstance(arg, list) else arg for arg in args])


@pytest.mark.parametrize("wrapper", ["known", "unknown"])
def test_a_replay_hands_over_what_tritons_launcher_does(device, monkeypatch, wrapper):
    hopper = pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from triton.experimental.gluon.language import NVMMASharedLayout

    layout = NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=2)
    kind = lambda x, **options: hopper.TensorDescriptor(x, x.shape, x.stride(), [8, 16], layout, **options)  # noqa: E731
    triton, sources, factory = Triton(monkeypatch), [], replay._factory
    through = triton.run.launch
    if wrapper == "unknown":
        triton.run.launch = lambda *args: through(*args)
    monkeypatch.setattr(replay, "_factory", lambda source: (sources.append(source), factory(source))[1])
    repeat, _ = record_descriptors(triton, kind, padding="nan")
    x = torch.zeros(32, 16)
    out = repeat(x.data_ptr())
    arguments = kind(x), 5, kind(x[8:], padding="nan"), x.data_ptr(), kind(out), "constexpr"
    triton.run(4, 1, 1, 77, "function", "metadata", None, None, None, *arguments)
    assert triton.launched[0] == triton.launched[1]
    # Triton 3.6's wrapper is passed by, and its arguments before the kernel's are four more
    is_36 = not hasattr(triton.run, "kernel_signature")
    constants = dict(zip(repeat.__code__.co_freevars, repeat.__closure__, strict=True))
    assert (constants["start0"].cell_contents == triton.launch) is (is_36 and wrapper == "known")
    assert "d0 = m[1] if m[0] == p0 else renew(memo, 0, p0, make0, given0_0" in sources[0]


@pytest.fixture
def operator(device):
    """An operator whose calls are noted, and the kernel that its calls launch."""
    calls, compiled = [], Compiled()

    def call(x, y=None, *, scale=1.0):
        calls.append((x, y, scale))
        out = launch.empty(x, *x.shape)
        replay.current() and replay.current().launched(compiled, (1,), (x, y, out, scale))
        return out

    schema = "gdn::stand_in(Tensor x, Tensor? y=None, *, float scale=1.0) -> Tensor"
    return replay.dispatcher(schema, call, lambda: True), calls, compiled


def test_a_signature_holds_what_decides_a_call(operator):
    run, calls, compiled = operator
    x = torch.zeros(4, 8)
    unaligned = torch.zeros(33)[1:].view(4, 8)
    different = [
        (x,),
        (x.half(),),
        (x[:3],),
        (torch.zeros(8, 4).t(),),
        (unaligned,),
        (x, x),
        (x, x.half()),
        (x, x[:3]),
        (x, unaligned),
    ]
    for number, args in enumerate(different, start=1):
        run(*args)
        run(*args)
        run(*[torch.ones_like(arg) if arg.storage_offset() == 0 else arg for arg in args])
        assert len(calls) == number, "recorded once"
        assert len(compiled.calls) == 2 * number, "and repeated"
    run(x, scale=2.0)
    assert len(calls) == len(different) + 1
    for args in different:
        run(*args)
    assert len(calls) == len(different) + 1
    assert compiled.calls[-1][9:11] == (x.data_ptr(), unaligned.data_ptr())


def test_a_tensor_in_the_place_of_none_is_another_signature(operator):
    run, calls, compiled = operator
    x, y = torch.zeros(4, 8), torch.empty(0)
    for _ in range(3):
        run(x)
        run(x, y)  # as the tensor that stands for none
    assert len(calls) == 2 and len(compiled.calls) == 4


def test_a_signature_is_recorded_once_whatever_mode_it_is_called_in(operator):
    run, calls, compiled = operator
    x = torch.zeros(4, 8)
    for number in range(12):
        with torch.inference_mode(number % 2 == 1), torch.set_grad_enabled(number % 3 == 0):
            run(torch.zeros(4, 8) if number % 4 else x)
    assert len(calls) == 1 and len(compiled.calls) == 11


def test_one_tensor_in_two_places_replays_as_two(device):
    compiled, calls = Compiled(), []

    def call(x, out, z):
        calls.append(1)
        recording = replay.current()
        if recording is not None:
            recording.launched(compiled, (1,), (x, out, z))

    run = replay.dispatcher("gdn::f(Tensor x, Tensor(a!) out, Tensor z) -> ()", call, lambda: True)
    apart = [torch.zeros(4) for _ in range(3)]
    for args in ((apart[0], apart[0], apart[1]), (apart[0], apart[1], apart[0]), tuple(apart)) * 6:
        run(*args)
        if compiled.calls:
            assert compiled.calls[-1][9:] == tuple(tensor.data_ptr() for tensor in args)
    assert len(calls) == 1 and len(compiled.calls) == 17


@pytest.mark.parametrize("how", ["absent", "made-otherwise"])
def test_without_dynamos_guards_signatures_are_compared_in_python(how, operator, monkeypatch):
    run, calls, compiled = operator
    monkeypatch.setattr(replay, "_TensorGuards", None if how == "absent" else type("Guards", (), {}))
    for size in (4, 5, 4, 5, 4, 4):
        assert run(torch.zeros(size, 8)).shape == (size, 8)
    assert len(calls) == 2 and len(compiled.calls) == 4


def test_guards_keep_no_tensor_alive(operator):
    run, _, compiled = operator
    run(torch.zeros(4, 8))
    x = torch.zeros(4, 8)
    run(x)  # its guards are made of these
    watched = weakref.ref(x)
    del x
    gc.collect()
    assert len(compiled.calls) == 1 and watched() is None


def test_a_call_that_raises_is_not_recorded_and_a_gradient_is_not_replayed(operator):
    run, calls, compiled = operator
    x = torch.zeros(4, 8)
    with pytest.raises(AttributeError):
        run(x, 3)
    run(x)
    run(x)
    assert len(calls) == len(compiled.calls) == 1
    run(x.requires_grad_())
    assert len(calls) == 2 and len(compiled.calls) == 1
    with torch.no_grad():
        run(x)
    assert len(calls) == len(compiled.calls) == 2


def test_what_is_not_replayable_takes_the_ordinary_path(device):
    calls = []
    run = replay.dispatcher("gdn::f(Tensor x, int n=3) -> Tensor", lambda *args: calls.append(args), lambda: False)
    x = torch.zeros(2)
    run(x)
    run(x, 4)
    assert calls == [(x, 3), (x, 4)]


# ---------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ordinary(monkeypatch):
    """Counts the launches that take Triton's path: those that no replay answers."""
    count = []
    plain = launch.run
    monkeypatch.setattr(launch, "run", lambda *args, **options: (count.append(1), plain(*args, **options))[1])
    with torch.no_grad():
        yield count


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def norm(x, weight, z, **options):
    return gdn_kernels.layer_norm_gated(x, weight, None, z, norm_before_gate=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [call.id for call in operator_cases.calls(dtype=torch.bfloat16)])
def test_every_call_is_replayed_with_the_same_bits(name, ordinary):
    def fresh(seed):
        calls = operator_cases.all_calls(operator_cases.Inputs("cuda", torch.bfloat16, seed))
        return next(call for call in calls if call.id == name)

    def outcome(call):
        found = call.run()
        found = found if isinstance(found, (tuple, list)) else () if found is None else (found,)
        return [x.clone() for x in (*found, *call.tensors)]

    fresh(0).run()
    count = len(ordinary)
    again = outcome(fresh(1))
    assert len(ordinary) == count, replay.reasons()
    with launch.pinned("gating", launch.GATING_CONFIG):  # a pin takes the ordinary path
        plain = outcome(fresh(1))
    assert len(ordinary) > count or not plain[0].numel()
    for found, wanted in zip(again, plain, strict=True):
        assert found.shape == wanted.shape and found.stride() == wanted.stride()
        assert found.dtype is wanted.dtype
        assert torch.equal(found.double().nan_to_num(), wanted.double().nan_to_num())


@pytest.mark.gpu
def test_one_tensor_given_twice_and_two_tensors_are_one_signature(ordinary):
    x, z, weight = normal(5, 128), normal(5, 128, seed=1), normal(128, seed=2)
    norm(x, weight, x)
    count = len(ordinary)
    found = norm(x, weight, z)
    assert len(ordinary) == count
    with launch.pinned("gating", launch.GATING_CONFIG):
        assert torch.equal(found, norm(x, weight, z))
        assert not torch.equal(found, norm(x, weight, x))


@pytest.mark.gpu
def test_views_of_one_storage_and_of_several_are_one_signature(ordinary):
    wide, other, weight = normal(6, 512), normal(6, 512, seed=1), normal(128, seed=2)
    norm(wide[:, :128], weight, wide[:, 256:384])
    count = len(ordinary)
    found = norm(wide[:, 128:256], weight, other[:, :128])
    assert len(ordinary) == count
    with launch.pinned("gating", launch.GATING_CONFIG):
        assert torch.equal(found, norm(wide[:, 128:256], weight, other[:, :128]))


@pytest.mark.gpu
def test_results_are_fresh_each_time(ordinary):
    x, weight = normal(9, 128), normal(128, seed=1)
    first, second, third = (norm(x, weight, None) for _ in range(3))
    assert len({t.data_ptr() for t in (first, second, third, x)}) == 4
    assert torch.equal(first, third)


@pytest.mark.gpu
def test_a_wrong_call_raises_after_a_right_one(ordinary):
    x, weight = normal(9, 128), normal(128, seed=1)
    for _ in range(2):
        norm(x, weight, None)
    with pytest.raises(TypeError, match="z must have the dtype of x"):
        norm(x, weight, x.float())
    with torch.enable_grad():
        assert norm(x, weight.detach().requires_grad_(), None).requires_grad


@pytest.mark.gpu
def test_debug_checks_and_launch_hooks_take_the_ordinary_path(ordinary):
    import triton

    x, weight = normal(9, 128), normal(128, seed=1)
    for _ in range(2):
        norm(x, weight, None)
    count, seen = len(ordinary), []
    with launch.debug_checks():
        norm(x, weight, None)
    hooks = triton.knobs.runtime.launch_enter_hook
    hook = lambda metadata: seen.append(metadata)  # noqa: E731
    hooks.add(hook)
    try:
        norm(x, weight, None)
    finally:
        hooks.remove(hook)
    assert len(ordinary) == count + 2
    assert len(seen) == 1
    norm(x, weight, None)
    assert len(ordinary) == count + 2


@pytest.mark.gpu
def test_a_replay_runs_on_the_current_stream(ordinary):
    x, weight = normal(9, 128), normal(128, seed=1)
    wanted = norm(x, weight, None)
    count, stream = len(ordinary), torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = norm(late, weight, None)
    # had it run on another stream, it would have read zeros
    stream.synchronize()
    assert len(ordinary) == count and torch.equal(found, wanted)


@pytest.mark.gpu
def test_threads_replay_side_by_side(ordinary):
    weight = normal(128, seed=1)
    xs = [normal(33, 128, seed=seed) for seed in range(8)]
    wanted = [norm(x, weight, x) for x in xs]
    count, wrong = len(ordinary), []

    def work(x, expected):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(50):
                if not torch.equal(norm(x, weight, x), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ordinary) == count and not wrong


@pytest.mark.gpu
def test_a_kernel_with_descriptors_is_replayed(ordinary):
    if not launch.has_descriptors(launch.target(torch.device("cuda"))):
        pytest.skip("needs a GPU of compute capability 9.0")
    import gluon_copy

    copy = replay.dispatcher("gdn::copy(Tensor x) -> Tensor", gluon_copy.copy, launch.replayable)
    xs = [normal(500, gluon_copy.COLS, seed=seed) for seed in range(4)]
    found = [copy(x) for x in xs]
    assert len(ordinary) == 1, replay.reasons()
    for x, out in zip(xs, found, strict=True):
        assert torch.equal(out, x[8:])


@pytest.mark.gpu
def test_signatures_are_bounded(ordinary, monkeypatch):
    monkeypatch.setattr(replay, "MAX_SIGNATURES", 3)
    weight = normal(128, seed=1)
    for rows in (*range(40, 50), *range(40, 50)):
        x = normal(rows, 128)
        assert torch.equal(norm(x, weight, None), norm(x, weight, None))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_direct_call_leaves_out_the_dispatcher_only_where_nothing_is_between(monkeypatch):
    # a CPU's tensors that say they are a GPU's, and an implementation that only counts
    calls = []
    replay_support.say_on_gpu(monkeypatch)
    monkeypatch.setitem(registry._on_gpu, "l2norm", lambda *args, **kwargs: calls.append((args, kwargs)))
    l2norm, x = registry.direct("l2norm"), torch.ones(2, 64)

    class Subclass(torch.Tensor):
        pass

    with torch.no_grad():
        assert l2norm(x, eps=1e-5) is None and calls == [((x,), {"eps": 1e-5})]
        l2norm(torch.nn.Parameter(x))
        assert len(calls) == 2
        for mode in (torch.enable_grad(), Dispatched(), Function()):
            with mode:
                assert l2norm(x).shape == x.shape
        assert l2norm(x.as_subclass(Subclass)).shape == x.shape
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert l2norm(x).shape == x.shape
    assert len(calls) == 2


@pytest.fixture
def prepared(device, monkeypatch):
    """A function that prepares an operator call, on CPU tensors that say they are a GPU's; its calls; the kernel; and
    the operator."""
    replay_support.say_on_gpu(monkeypatch)
    monkeypatch.setattr(replay, "_reasons", {})
    compiled, calls = Compiled(), []

    def recorded_alone():
        return replay.current() is None

    def operate(x, state, indices, out):
        made = launch.empty(x, *x.shape) if out is None else None
        if replay.current() is not None:
            replay.current().launched(compiled, (1,), (x, state, indices, made if out is None else out))
        return made

    schema = "gdn::stand_in(Tensor x, Tensor state, Tensor? indices, Tensor(a!)? out) -> Tensor?"
    operator = replay.dispatcher(schema, operate, recorded_alone)

    @replay.repeatable(recorded_alone)
    def prepare(
        x: torch.Tensor,
        state: torch.Tensor,
        indices: torch.Tensor | None,
        out: torch.Tensor | None = None,
        *,
        size: int,
    ):
        calls.append(size)
        if size < 0:
            return "less than nothing"
        made = operator(x.mT, state[:, 1:], None if indices is None else indices[:size], out)
        return made if made is None or size == 0 else made.mT[:size]

    with torch.no_grad():
        yield prepare, calls, compiled, operator


def made_of(compiled):
    return compiled.calls[-1][9:]


def test_what_prepares_a_call_is_repeated_with_it(prepared):
    prepare, calls, compiled, _ = prepared
    state = torch.zeros(3, 4)
    for indices in (torch.arange(8), None):
        for x in (torch.zeros(4, 8), torch.ones(4, 8)):
            found = prepare(x, state, indices, size=4)
            assert found.shape == (4, 8) and found.stride() == (1, 4)
        given = None if indices is None else indices.data_ptr()
        assert made_of(compiled) == (x.data_ptr(), state.data_ptr() + 4, given, found.data_ptr())
    out = torch.zeros(8, 4)
    assert prepare(x, state, None, out, size=2) is None is prepare(x, state, None, out, size=2)
    assert made_of(compiled) == (x.data_ptr(), state.data_ptr() + 4, None, out.data_ptr())
    assert calls == [4, 4, 2] and len(compiled.calls) == 3, "each recorded once, then repeated"


def test_a_prepared_call_has_its_own_recording_where_its_operators_is_known(prepared):
    prepare, calls, compiled, operator = prepared
    x, state = torch.zeros(4, 8), torch.zeros(3, 4)
    for _ in range(2):
        operator(x.mT, state[:, 1:], None, None)
    assert len(compiled.calls) == 1
    for number in range(2, 5):
        prepare(x, state, None, size=4)
        assert len(compiled.calls) == number - 1
    assert calls == [4]


def test_a_reason_is_returned_each_time_and_not_noted(prepared):
    prepare, calls, compiled, _ = prepared
    for _ in range(3):
        assert prepare(torch.zeros(4, 8), torch.zeros(3, 4), None, size=-1) == "less than nothing"
    assert calls == [-1] * 3 and not compiled.calls and not replay.reasons()


@pytest.mark.parametrize("case", ["between-two-arguments", "one-argument-twice", "part-of-an-allocation"])
def test_what_could_be_another_arguments_is_not_repeated(prepared, case):
    prepare, calls, compiled, _ = prepared
    x, state, size = torch.zeros(4, 8), torch.zeros(4, 8), 4
    if case == "between-two-arguments":
        x, state = torch.zeros(8, 8).split(4)
    elif case == "one-argument-twice":
        state = x[:, :1].expand(4, 8)
    else:
        size = 3
    for number in range(1, 4):
        assert prepare(x, state, None, size=size).shape == (size, 8)
        assert len(calls) == number
    assert len(compiled.calls) == 1, "the operator is recorded by itself in the second call, and repeated in the third"
    why = "a result is not an allocation" if size == 3 else "neither an argument nor an allocation"
    assert why in replay.reasons()["prepare"]


def test_a_prepared_call_takes_the_ordinary_path_where_something_stands_between(prepared, monkeypatch):
    prepare, calls, compiled, _ = prepared
    x, state = torch.zeros(4, 8), torch.zeros(3, 4)
    prepare(x, state, None, size=4)
    prepare(x, state, None, size=4)
    assert len(calls) == len(compiled.calls) == 1

    for number, mode in enumerate((torch.enable_grad(), Dispatched(), Function()), start=2):
        with mode:
            assert prepare(x, state, None, size=4).shape == (4, 8)
        assert len(calls) == number
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: False))
    prepare(x, state, None, size=4)
    assert len(calls) == 5


@pytest.mark.gpu
def test_a_direct_call_has_the_operators_bits(ordinary):
    x, weight = normal(9, 128), normal(128, seed=1)
    with torch.no_grad():
        options = {"norm_before_gate": True, "eps": 1e-5}
        direct = registry.direct("layer_norm_gated")(x, weight, None, **options)
        assert torch.equal(direct, torch.ops.gdn.layer_norm_gated(x, weight, None, **options))
