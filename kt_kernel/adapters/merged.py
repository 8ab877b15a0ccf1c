"""A LoRA in the weights themselves."""

from __future__ import annotations

import torch

from kt_kernel.adapters.backend import ExpertLora
from kt_kernel.adapters.layout import PROJECTIONS

UNQUANTISED = (torch.float32, torch.float16, torch.bfloat16)  # a float8 is a code, which has a scale


def lora_shape(lora: ExpertLora, projection: str) -> tuple[int, int]:
    """[out, in] of what `lora` adds to that projection of an expert."""
    place = 2 * PROJECTIONS.index(projection)
    return lora.tensors[place + 1].shape[1], lora.tensors[place].shape[2]


def merged_matrix(weight: torch.Tensor, lora: ExpertLora, expert: int, projection: str) -> torch.Tensor:
    """`weight` [out, in] of that expert plus scale * B A, in float32; `projection`: gate, up or down."""
    place = 2 * PROJECTIONS.index(projection)
    a, b = (matrices[expert].detach() for matrices in lora.tensors[place : place + 2])
    return weight.float() + lora.scale * (b @ a)
