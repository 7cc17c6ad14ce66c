"""What the tests of recorded calls need on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from gdn_kernels import replay


def stand_in_for_a_device(monkeypatch: Any) -> None:
    """The functions of a CUDA build that a replay asks; a CPU tensor's device has the number -1."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    monkeypatch.setattr(replay, "_empty_on_current_device", None)
    monkeypatch.setattr(replay, "_empty", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype))
    monkeypatch.setattr(replay, "_zeros", lambda shape, stride, dtype: torch.zeros(shape, dtype=dtype))


def say_on_gpu(monkeypatch: Any) -> None:
    """Tensors of a CPU say that they are a GPU's."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
