"""The quantised tensors of one linear layer, decoded to one float32 matrix [outputs, inputs].

A layer's tensors share their name up to the last dot; what follows it is called a part here. Layers are
stored in the ways of the methods' records, and in one that experts do not have: float8 with one scale for
all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kt_kernel.checkpoint.formats import FORMATS, Format
from kt_kernel.checkpoint.safetensors_file import TORCH_DTYPES
from kt_kernel.formats.records import RECORDS

Parts = Mapping[str, torch.Tensor]

# What else checkpoints hold of a quantised layer. Activations and the KV cache stay unquantised here, zero
# points of symmetric formats are constants, and shapes follow from the other parts.
NOT_NEEDED = frozenset(
    (
        "input_scale",
        "input_global_scale",
        "k_scale",
        "v_scale",
        "weight_shape",
        "qzeros",
        "g_idx",
    )
)

# Tensors that change what the codes mean, in ways that no record decodes.
REFUSED = frozenset(("weight_zero_point", "weight_g_idx"))

_QUANTISED = tuple(row for row in FORMATS if row.scales)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DenseFormat:
    """One way to store a layer, with the name its scales have in it."""

    format: Format
    scale: str

    def decode(self, parts: Parts) -> torch.Tensor:
        """float32 [outputs, inputs]; raises CheckpointError if there is another number of scales."""
        codes, scales, scalar = parts[self.format.weight], parts[self.scale], self.format.global_scale
        if is_one_float8_scale(codes, scales):
            return codes.float() * scales.float()
        if scalar is not None:
            scales = scales.float() * parts[scalar.suffix].float() ** scalar.power
        return RECORDS[self.format.method].decode(codes, scales)


def is_part(part: str, tensor: torch.Tensor) -> bool:
    """Does a tensor with this last name belong to a quantised layer?"""
    if part == "weight":
        return any(row.weight == part and tensor.dtype in _torch(row.weight_shapes) for row in _QUANTISED)
    return part in _PARTS


def matching_format(parts: Parts) -> DenseFormat | None:
    """The row that these parts are enough for; None while some are missing."""
    for row in _QUANTISED:
        scale = next((name for name in row.scales if name in parts), None)
        if scale is not None and _fits(row, scale, parts):
            return DenseFormat(row, scale)
    return None


def _fits(row: Format, scale: str, parts: Parts) -> bool:
    if row.weight not in parts or parts[row.weight].dtype not in _torch(row.weight_shapes):
        return False
    if row.global_scale is not None and row.global_scale.suffix not in parts:
        return False
    codes, scales = parts[row.weight], parts[scale]
    if is_one_float8_scale(codes, scales):
        return True
    return scales.dtype in _torch(row.scale_dtypes) and row.told_by(tuple(codes.shape), tuple(scales.shape))


def is_one_float8_scale(codes: torch.Tensor, scales: torch.Tensor) -> bool:
    """Is it the way that experts do not have?"""
    return codes.dtype is torch.float8_e4m3fn and scales.dtype in _FLOATS and scales.numel() == 1


def _torch(names: Mapping[str, object] | tuple[str, ...]) -> tuple[torch.dtype, ...]:
    return tuple(TORCH_DTYPES[name] for name in names)


_PARTS = (
    frozenset(
        part
        for row in _QUANTISED
        for part in (row.weight, *row.scales, *([row.global_scale.suffix] if row.global_scale else []))
    )
    - {"weight"}
    | NOT_NEEDED
)
