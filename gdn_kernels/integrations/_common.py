"""What the drop-in modules share: the refusal of an option that is not built, rows that lie contiguously, and whether a
gradient is asked for."""

from __future__ import annotations

import torch


def not_built(function: str, **options: object) -> None:
    """Raises for the first option that is set; ``None`` and ``False`` are every option's default."""
    for name, value in options.items():
        if value is not None and value is not False:
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise NotImplementedError(
                f"{name} must be left at its default, got {shown}: {function} is built without it"
            )


def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with a contiguous last dimension, itself where it has one, else a copy."""
    if tensor is None or tensor.shape[-1] == 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def differentiates(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is done with the tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
