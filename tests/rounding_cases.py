"""What tests of stochastic rounding share: values that are hard to round, and the states that a seed must give."""

from __future__ import annotations

import torch

from gdn_kernels.reference import _math


def _hard_values() -> torch.Tensor:
    """fp32 near every boundary of bf16 and fp16: zeros, subnormals, powers of two, the largest, not finite."""
    random = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    largest = torch.tensor([65504.0, 65504.1, 65519.0, 65520.0, 65535.9, 65536.0, 3.3895313e38, 3.4e38, 3.4028235e38])
    near = torch.cat([powers * factor for factor in (1.0, 1 - 2.0**-9, 1 + 2.0**-9, 1.5, 1.999)])
    few = torch.randn(256, generator=random, dtype=torch.float64)
    small = few * 2.0**-15
    finite = torch.cat([near, largest.double(), few, small, small * 2.0**-9, torch.tensor([0.0]).double()]).float()
    other = torch.tensor([torch.inf, torch.nan])
    return torch.cat([finite, -finite, other, -other])


HARD_VALUES = _hard_values()


def expected(state: torch.Tensor, dtype: torch.dtype, seed: int, slot: int, token: int) -> torch.Tensor:
    """The fp32 ``state`` [HV, V, K] as it must be stored."""
    bits = _math.Draw(seed, slot, token).bits(state.shape)
    return _math.round_stochastically(state.detach().cpu().float(), bits, dtype)


def octets_differ(bits: torch.Tensor) -> bool:
    """Whether no two of the groups of eight that one call of Philox fills are the same."""
    groups = bits.reshape(-1, 8)
    return len(groups.unique(dim=0)) == len(groups)
