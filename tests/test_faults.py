"""What serving does to state pools: padding, recycled slots, garbage counts, uneven drafts, roll-backs."""

from __future__ import annotations

import pytest
import torch
from fault_cases import CHECKS

import gdn_kernels


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CHECKS)
def test_serving_does_no_harm(name, device):
    if device == "cuda":
        # freed memory that is full of NaN: what a kernel leaves unwritten shows
        poison = torch.full((1 << 24,), torch.nan, device=device)
        del poison
    with torch.no_grad():
        CHECKS[name](gdn_kernels, device)
