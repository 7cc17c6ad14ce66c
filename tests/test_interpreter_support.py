"""The mended interpreter itself: bfloat16 behaves as on a GPU, and new tensors are poisoned."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from oracle import normal

pytestmark = pytest.mark.interpreter


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, less_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + SIZE + i, x * y)
    tl.store(out_ptr + 2 * SIZE + i, -x)
    tl.store(out_ptr + 3 * SIZE + i, tl.where(x < y, x, 0.0))
    tl.store(out_ptr + 4 * SIZE + i, (x.to(tl.float32) * 1.2345).to(tl.bfloat16))
    tl.store(out_ptr + 5 * SIZE + i, i.to(tl.bfloat16))
    tl.store(less_ptr + i, x < y)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    block = i[:, None] * SIZE + i[None, :]
    tl.store(out_ptr + block, tl.dot(tl.load(a_ptr + block), tl.load(b_ptr + block)))


@triton.jit
def sum_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE)), axis=0))


def test_bf16_arithmetic_rounds_to_nearest_even():
    x, y = normal(0, 256, dtype=torch.bfloat16), normal(1, 256, dtype=torch.bfloat16)
    out, less = torch.empty(6, 256, dtype=torch.bfloat16), torch.empty(256, dtype=torch.bool)
    arithmetic_kernel[(1,)](x, y, out, less, SIZE=256)
    scaled = (x.float() * torch.tensor(1.2345)).bfloat16()
    expected = [x + y, x * y, -x, torch.where(x < y, x, 0), scaled, torch.arange(256).bfloat16()]
    assert torch.equal(out, torch.stack(expected))
    assert torch.equal(less, x < y)


def test_dot_of_bf16_accumulates_in_fp32():
    a, b = normal(0, 32, 32, dtype=torch.bfloat16), normal(1, 32, 32, dtype=torch.bfloat16)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_sum_of_bf16_is_refused():
    with pytest.raises(Exception, match="cast to float32"):
        sum_kernel[(1,)](normal(0, 32, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16), SIZE=32)


def test_new_tensors_are_full_of_nan():
    assert torch.ones(2).new_empty(3, 4).isnan().all()
