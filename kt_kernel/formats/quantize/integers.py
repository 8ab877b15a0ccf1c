"""Symmetric integers with float32 scales: signed bytes, or two 4-bit codes, stored plus 8, to a byte.

The scale of a group is its largest magnitude / 127 or / 7, a code the nearest integer to weight / scale,
ties to even; nothing else is rounded. A group of zeros has a scale of zero.
"""

from __future__ import annotations

import torch

from kt_kernel.formats.quantize.quantized import Quantized, divide, in_groups

_LARGEST_INT8, _LARGEST_INT4 = 127, 7


def to_int8(matrix: torch.Tensor, group_size: int) -> Quantized:
    """float32 [N, K] -> int8 [N, K] and float32 scales [N, K/g]; a `group_size` of 0 is a whole row."""
    codes, scales = _codes(matrix, group_size, _LARGEST_INT8)
    return Quantized(codes.to(torch.int8), scales)


def to_int4(matrix: torch.Tensor, group_size: int) -> Quantized:
    """float32 [N, K] -> bytes [N, K/2], the even column in the low half, and float32 scales [N, K/g]."""
    codes, scales = _codes(matrix, group_size, _LARGEST_INT4)
    pairs = in_groups((codes + (_LARGEST_INT4 + 1)).to(torch.uint8), 2)
    return Quantized(pairs[..., 0] | (pairs[..., 1] << 4), scales)


def _codes(matrix: torch.Tensor, group_size: int, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = in_groups(matrix, group_size or matrix.shape[1])
    scales = groups.abs().amax(dim=-1, keepdim=True) / largest
    codes = divide(groups, scales).round().clamp(-largest, largest)
    return codes.reshape(matrix.shape), scales.squeeze(-1)
