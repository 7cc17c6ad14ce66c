"""Inputs for kernel tests, and the comparison with an fp64 oracle under a derived budget."""

from __future__ import annotations

import torch

# Half a unit in the last place, relative: what the final rounding alone may cost.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half the spacing of the smallest numbers.
SMALLEST = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers of ``dtype``, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def column_view(tensor: torch.Tensor, before: int = 16, after: int = 32) -> torch.Tensor:
    """The same ``[T, ...]`` numbers as a column slice of a wider matrix whose other columns are NaN."""
    flat = tensor.reshape(tensor.shape[0], -1)
    wide = torch.full((tensor.shape[0], before + flat.shape[1] + after), torch.nan, dtype=tensor.dtype)
    wide[:, before : before + flat.shape[1]] = flat
    return wide[:, before : before + flat.shape[1]].unflatten(1, tensor.shape[1:])


def quantised(y: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """The unfused quantisation of ``[T, ...]``: e4m3 values, and fp32 scales of each ``group`` columns of a token."""
    groups = y.float().reshape(y.shape[0], -1, group)
    # a tensor: by a number, torch multiplies with its reciprocal on a GPU
    largest_e4m3 = torch.full((), 448.0, device=y.device)
    scales = groups.abs().amax(dim=-1).clamp(min=1e-10) / largest_e4m3
    values = (groups / scales[..., None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return values.reshape(y.shape), scales


def assert_close(
    actual: torch.Tensor, oracle: torch.Tensor, fp32_roundings: float, magnitude: torch.Tensor | None = None
) -> None:
    """Fail where ``actual`` is further from the fp64 ``oracle`` than rounding explains.

    The budget is the final rounding to actual's dtype plus ``fp32_roundings`` roundings of fp32 at ``magnitude``
    (default: the oracle's own), the sum of the absolute values that were added up.
    """
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert oracle.dtype == torch.float64
    if actual.numel() == 0:
        return
    size = oracle.abs() if magnitude is None else magnitude.expand_as(oracle)
    budget = ROUNDING[actual.dtype] * oracle.abs() + SMALLEST[actual.dtype]
    # A bfloat16 or fp16 near a tie may round the other way: the fp32 error is then amplified by one rounding.
    budget = budget + fp32_roundings * 2.0**-24 * size * (1 + ROUNDING[actual.dtype])
    error = (actual.double() - oracle).abs()
    same = (actual.double() == oracle) | (actual.isnan() & oracle.isnan())
    excess = torch.where(same, -torch.inf, torch.where(error.isnan(), torch.inf, error - budget))
    worst = int(excess.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape)) if actual.dim() else ()
    detail = f"at {at}: {actual[at].item()!r}, oracle {oracle[at].item()!r}, budget {budget[at].item():.3g}"
    print(f"worst {detail}")
    assert excess[at] <= 0, detail
