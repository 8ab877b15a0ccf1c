"""Numbers to ggml's Q8_0, the type of GGUF that is nearest to numbers of 16 bits.

block of 32 columns, 34 bytes:   | scale, float16 | 32 codes, int8 |       w = scale * code
"""

from __future__ import annotations

import torch

from kt_kernel.errors import InputError
from kt_kernel.formats.quantize.quantized import Quantized, divide, in_groups

COLUMNS, BYTES = 32, 34
_LARGEST = 127


def to_q8_0(values: torch.Tensor, group_size: int) -> Quantized:
    """float32 [N, K] -> uint8 [N, K/32 * 34]; scales are absmax / 127, and codes are for the scale as stored.

    Raises InputError if K is no multiple of 32. The groups have one size, whatever `group_size` says.
    """
    rows, columns = values.shape
    if columns % COLUMNS:
        raise InputError(f"a matrix has {columns} columns, but Q8_0 needs a multiple of {COLUMNS}.")
    blocks = in_groups(values, COLUMNS)
    scales = (blocks.abs().amax(dim=-1, keepdim=True) / _LARGEST).half()
    codes = divide(blocks, scales.float()).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    stored = torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], dim=-1)
    return Quantized(stored.reshape(rows, columns // COLUMNS * BYTES), None)
