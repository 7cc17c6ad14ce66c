"""The projection split in Triton's interpreter: every bit of its inputs in its place."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, column_view, normal

from gdn_kernels.kernels.split import split_qkvz_ba

pytestmark = pytest.mark.interpreter


def inputs(T, H, r, K, V, dtype=torch.float32):
    return normal(0, T, H * (2 * K + 2 * r * V), dtype=dtype), normal(1, T, H * 2 * r, dtype=dtype)


def check(qkvz, ba, H, r, K, V):
    T = qkvz.shape[0]
    q, k, v, z = qkvz.unflatten(1, (H, -1)).split([K, K, r * V, r * V], dim=2)
    b, a = ba.unflatten(1, (H, -1)).split([r, r], dim=2)
    expected = (
        torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1),
        z.reshape(T, H * r, V),
        b.flatten(1),
        a.flatten(1),
    )
    results = split_qkvz_ba(qkvz, ba, num_k_heads=H, num_v_heads=H * r, head_k_dim=K, head_v_dim=V)
    for result, wanted in zip(results, expected, strict=True):
        assert result.is_contiguous() and torch.equal(result, wanted)


@pytest.mark.parametrize("r", [1, 2, 3, 4], ids=lambda r: f"hv-{r}x-h")
def test_each_part_of_each_head_goes_to_its_place(r):
    check(*inputs(5, 2, r, 16, 32), 2, r, 16, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_copied_in_every_dtype(dtype):
    check(*inputs(3, 2, 2, 16, 16, dtype), 2, 2, 16, 16)


def test_head_sizes_need_not_be_powers_of_two():
    check(*inputs(3, 3, 3, 24, 40), 3, 3, 24, 40)


@pytest.mark.parametrize("before", [0, 3, 16], ids=lambda before: f"offset-{before}")
@pytest.mark.parametrize("T", [1, 6], ids=lambda T: f"{T}-tokens")
def test_strided_rows_are_read_in_place(T, before):
    qkvz, ba = inputs(T, 2, 2, 16, 16)
    check(column_view(qkvz, before), column_view(ba, before, 5), 2, 2, 16, 16)


def test_no_tokens_give_empty_results():
    check(torch.empty(0, 2 * (32 + 64)), torch.empty(0, 8), 2, 2, 16, 16)


def test_gates_may_have_another_dtype():
    qkvz, ba = inputs(3, 2, 2, 16, 16)
    check(qkvz.to(torch.float16), ba, 2, 2, 16, 16)
