"""Replay of recorded calls: pointers come from arguments and allocations, whatever they were when recorded."""

from __future__ import annotations

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
    """The two functions of a CUDA build that a replay asks."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    monkeypatch.setattr(replay, "_empty_on_current_device", lambda *args: torch.empty_strided(args[0], args[1]))


class Compiled:
    """Notes the arguments it is launched with."""

    def __init__(self):
        self.calls, self.function, self.packed_metadata = [], "function", "metadata"

    def run(self, *args):
        self.calls.append(args)


def record(x, y, compiled, result=None, **options):
    recording = replay.Recording("stand-in", [x, y])
    with recording:
        out = launch.empty(x, *x.shape, **options)
        part = launch.view(y[2:], y)
        recording.launched(compiled, (4,), (x, part, out, 3, None))
    return recording.replay(out if result is None else result(out)), out


def test_a_replay_puts_new_pointers_in(device):
    compiled = Compiled()
    x, y = torch.zeros(8), torch.zeros(8)
    repeat, _ = record(x, y, compiled)
    repeat.device = -1
    other_x, other_y = torch.zeros(8), torch.zeros(8)
    made = repeat([other_x.data_ptr(), other_y.data_ptr()])
    expected = (4, 1, 1, 77, "function", "metadata", None, None, None)
    pointers = (other_x.data_ptr(), other_y.data_ptr() + 8, made.data_ptr(), 3, None)
    assert compiled.calls == [expected + pointers]
    assert made.shape == x.shape


def test_a_replay_does_not_change_what_it_repeats(device):
    compiled = Compiled()
    x, y = torch.zeros(8), torch.zeros(8)
    repeat, _ = record(x, y, compiled)
    repeat.device = -1
    for _ in range(3):
        repeat([x.data_ptr(), y.data_ptr()])
    first, *rest = [call[9:11] for call in compiled.calls]
    assert all(call == first for call in rest)


def test_a_result_that_views_its_allocation_is_made_in_that_shape(device):
    x, y = torch.zeros(1, 8), torch.zeros(8)
    repeat, _ = record(x, y, Compiled(), result=lambda out: out)
    assert repeat.allocations[0][0] == (1, 8)
    recording = replay.Recording("stand-in", [x, y])
    with recording:
        out = launch.empty(x, *x.shape)
        result = launch.view(out.squeeze(0), out)
    assert recording.replay(result).allocations[0][0] == (8,)


def test_a_replay_keeps_no_tensor_of_the_recorded_call_alive(device):
    x, y = torch.zeros(8), torch.zeros(8)
    repeat, out = record(x, y, Compiled())
    watched = [weakref.ref(tensor) for tensor in (x, y, out)]
    del x, y, out
    gc.collect()
    assert repeat is not None and [ref() for ref in watched] == [None] * 3


def test_zeros_are_zeros_again(device, monkeypatch):
    repeat, _ = record(torch.zeros(8), torch.zeros(8), Compiled(), zero=True)
    assert repeat.allocations[0][3]


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


def key_of(*values):
    key, pointers = [], []
    replay.signature(values, key, pointers)
    return tuple(key), pointers


def test_a_signature_holds_what_decides_a_call():
    x = torch.zeros(4, 8)
    same, pointers = key_of(x, None, 1.0)
    assert pointers == [x.data_ptr()]
    assert key_of(torch.ones(4, 8), None, 1.0)[0] == same
    unaligned = torch.zeros(33)[1:].view(4, 8)
    different = [
        key_of(x.half(), None, 1.0),
        key_of(x[:3], None, 1.0),
        key_of(torch.zeros(8, 4).t(), None, 1.0),
        key_of(unaligned, None, 1.0),
        key_of(x, x, 1.0),
        key_of(x, None, 2.0),
        key_of(None, x, 1.0),
    ]
    assert same not in [key for key, _ in different]
    assert len({key for key, _ in different}) == len(different)


# ---------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def replayed(monkeypatch):
    """Counts the calls that a replay answers."""
    count = []
    plain = replay.Replay.__call__
    monkeypatch.setattr(replay.Replay, "__call__", lambda self, pointers: (count.append(1), plain(self, pointers))[1])
    with torch.no_grad():
        yield count


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def norm(x, weight, z, **options):
    return gdn_kernels.layer_norm_gated(x, weight, None, z, norm_before_gate=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [call.id for call in operator_cases.calls(dtype=torch.bfloat16)])
def test_every_call_is_replayed_with_the_same_bits(name, replayed):
    def fresh(seed):
        calls = operator_cases.all_calls(operator_cases.Inputs("cuda", torch.bfloat16, seed))
        return next(call for call in calls if call.id == name)

    def outcome(call):
        found = call.run()
        found = found if isinstance(found, (tuple, list)) else () if found is None else (found,)
        return [x.clone() for x in (*found, *call.tensors)]

    fresh(0).run()
    count = len(replayed)
    again = outcome(fresh(1))
    assert len(replayed) == count + 1, replay.reasons()
    with launch.pinned("gating", launch.GATING_CONFIG):  # a pin takes the ordinary path
        plain = outcome(fresh(1))
    assert len(replayed) == count + 1
    for found, wanted in zip(again, plain, strict=True):
        assert found.shape == wanted.shape and found.stride() == wanted.stride()
        assert found.dtype is wanted.dtype
        assert torch.equal(found.double().nan_to_num(), wanted.double().nan_to_num())


@pytest.mark.gpu
def test_one_tensor_given_twice_and_two_tensors_are_one_signature(replayed):
    x, z, weight = normal(5, 128), normal(5, 128, seed=1), normal(128, seed=2)
    norm(x, weight, x)
    found = norm(x, weight, z)
    assert replayed
    with launch.pinned("gating", launch.GATING_CONFIG):
        assert torch.equal(found, norm(x, weight, z))
        assert not torch.equal(found, norm(x, weight, x))


@pytest.mark.gpu
def test_views_of_one_storage_and_of_several_are_one_signature(replayed):
    wide, other, weight = normal(6, 512), normal(6, 512, seed=1), normal(128, seed=2)
    norm(wide[:, :128], weight, wide[:, 256:384])
    found = norm(wide[:, 128:256], weight, other[:, :128])
    assert replayed
    with launch.pinned("gating", launch.GATING_CONFIG):
        assert torch.equal(found, norm(wide[:, 128:256], weight, other[:, :128]))


@pytest.mark.gpu
def test_results_are_fresh_each_time(replayed):
    x, weight = normal(9, 128), normal(128, seed=1)
    first, second, third = (norm(x, weight, None) for _ in range(3))
    assert len({t.data_ptr() for t in (first, second, third, x)}) == 4
    assert torch.equal(first, third)


@pytest.mark.gpu
def test_a_wrong_call_raises_after_a_right_one(replayed):
    x, weight = normal(9, 128), normal(128, seed=1)
    for _ in range(2):
        norm(x, weight, None)
    with pytest.raises(TypeError, match="z must have the dtype of x"):
        norm(x, weight, x.float())
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="must not require grad"):
        norm(x, weight.detach().requires_grad_(), None)


@pytest.mark.gpu
def test_debug_checks_and_launch_hooks_take_the_ordinary_path(replayed):
    import triton

    x, weight = normal(9, 128), normal(128, seed=1)
    for _ in range(2):
        norm(x, weight, None)
    count, seen = len(replayed), []
    with launch.debug_checks():
        norm(x, weight, None)
    hooks = triton.knobs.runtime.launch_enter_hook
    hook = lambda metadata: seen.append(metadata)  # noqa: E731
    hooks.add(hook)
    try:
        norm(x, weight, None)
    finally:
        hooks.remove(hook)
    assert len(replayed) == count
    assert len(seen) == 1
    norm(x, weight, None)
    assert len(replayed) == count + 1


@pytest.mark.gpu
def test_a_replay_runs_on_the_current_stream(replayed):
    x, weight = normal(9, 128), normal(128, seed=1)
    wanted = norm(x, weight, None)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = norm(late, weight, None)
    # had it run on another stream, it would have read zeros
    stream.synchronize()
    assert replayed and torch.equal(found, wanted)


@pytest.mark.gpu
def test_threads_replay_side_by_side(replayed):
    weight = normal(128, seed=1)
    xs = [normal(33, 128, seed=seed) for seed in range(8)]
    wanted = [norm(x, weight, x) for x in xs]
    wrong = []

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
    assert len(replayed) > 300 and not wrong


@pytest.mark.gpu
def test_signatures_are_bounded(replayed, monkeypatch):
    monkeypatch.setattr(replay, "MAX_SIGNATURES", 3)
    weight = normal(128, seed=1)
    for rows in (*range(40, 50), *range(40, 50)):
        x = normal(rows, 128)
        assert torch.equal(norm(x, weight, None), norm(x, weight, None))
