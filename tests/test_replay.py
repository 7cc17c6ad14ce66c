"""Replay of recorded calls: pointers come from arguments and allocations, whatever they were when recorded."""

from __future__ import annotations

import contextlib
import gc
import threading
import types
import weakref

import operator_cases
import pytest
import torch

import gdn_kernels
from gdn_kernels import launch, replay

# ---------------------------------------------------------------------------------------------------------------
# Without a GPU: a stand-in for the compiled kernel and for the device's stream
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """The functions of a CUDA build that a replay asks; a CPU tensor's device has the number -1."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    monkeypatch.setattr(replay, "_empty_on_current_device", None)
    monkeypatch.setattr(replay, "_empty", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype))
    monkeypatch.setattr(replay, "_zeros", lambda shape, stride, dtype: torch.zeros(shape, dtype=dtype))


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
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="must not require grad"):
        norm(x, weight.detach().requires_grad_(), None)


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
def test_signatures_are_bounded(ordinary, monkeypatch):
    monkeypatch.setattr(replay, "MAX_SIGNATURES", 3)
    weight = normal(128, seed=1)
    for rows in (*range(40, 50), *range(40, 50)):
        x = normal(rows, 128)
        assert torch.equal(norm(x, weight, None), norm(x, weight, None))
