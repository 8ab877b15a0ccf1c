"""Symmetric 4-bit integers, stored plus 8, eight to a 32-bit word: along the rows or down the columns."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from kt_kernel.formats.quantize.quantized import Quantized, divide, in_groups

_LARGEST = 7
_PER_WORD = 8


def to_packed_int4(matrix: torch.Tensor, group_size: int) -> Quantized:
    """float32 [N, K] -> int32 [N, ceil(K/8)] and bfloat16 scales [N, K/g], as compressed-tensors packs them.

    A `group_size` of 0 is a whole row.
    """
    codes, scales = _codes(matrix, group_size)
    return Quantized(_words(pad(codes, (0, -codes.shape[1] % _PER_WORD))), scales)


def to_gptq_int4(matrix: torch.Tensor, group_size: int) -> Quantized:
    """float32 [N, K] -> int32 [K/8, N] and bfloat16 scales [K/g, N]; a `group_size` of 0 is a whole row."""
    codes, scales = _codes(matrix, group_size)
    return Quantized(_words(codes).t().contiguous(), scales.t().contiguous())


def _codes(matrix: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 to 15 [N, K] for the scales [N, K/g] as they will be stored: absmax / 7.

    bfloat16 has the range of the weights; its rounding is far below that of the codes.
    """
    groups = in_groups(matrix, group_size or matrix.shape[1])
    scales = (groups.abs().amax(dim=-1, keepdim=True) / _LARGEST).bfloat16()
    codes = divide(groups, scales.float()).round().clamp(-_LARGEST - 1, _LARGEST) + _LARGEST + 1
    return codes.reshape(matrix.shape).to(torch.int32), scales.squeeze(-1)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """int32 codes [N, K] -> int32 words [N, K/8], column 8j + i in bits 4i to 4i + 3 of word j."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return (in_groups(codes, _PER_WORD) << shifts).sum(dim=-1, dtype=torch.int32)
