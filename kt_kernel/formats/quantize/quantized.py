"""What a quantiser gives back, and how values are cut into the groups that share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quantized:
    """A matrix in the layout of a checkpoint (csrc/bindings.cc): w = code * scale * global_scale."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    global_scale: float = 1.0


def in_groups(matrix: torch.Tensor, columns: int) -> torch.Tensor:
    """[N, K] -> [N, K / columns, columns], without a copy."""
    return matrix.unflatten(1, (-1, columns))


def divide(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values / scales, where a scale of zero, that of a group of zeros, gives zero."""
    return values / torch.where(scales == 0, torch.ones_like(scales), scales)
