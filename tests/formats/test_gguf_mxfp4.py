"""MXFP4 as gguf quantises and decodes it, in the layout of a safetensors checkpoint.

gguf keeps 32 values in 17 bytes: the scale, then 16 bytes whose low halves are values 0 to 15 and whose high
halves are values 16 to 31. A checkpoint keeps neighbours in one byte and the scales in a tensor of their own.
"""

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from observe import assert_same_numbers, observed

HIDDEN, INTERMEDIATE, EXPERTS = 320, 256, 2


def _as_checkpoint(packed: np.ndarray) -> dict[str, torch.Tensor]:
    blocks = torch.from_numpy(packed).reshape(HIDDEN, INTERMEDIATE // 32, 17)
    halves = blocks[..., 1:]
    codes = torch.cat([halves & 15, halves >> 4], dim=-1).reshape(HIDDEN, INTERMEDIATE)
    return {
        "weight": (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8),
        "scale": blocks[..., 0].contiguous().view(torch.float8_e8m0fnu),
    }


def test_mxfp4_of_gguf(tmp_path):
    numbers = np.random.default_rng(3)
    packed = [
        quantize(
            numbers.standard_normal((HIDDEN, INTERMEDIATE), dtype=np.float32), GGMLQuantizationType.MXFP4
        )
        for _ in range(EXPERTS)
    ]
    ours = observed(
        tmp_path / "model",
        "MXFP4",
        [_as_checkpoint(matrix) for matrix in packed],
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
    )
    for actual, matrix in zip(ours, packed, strict=True):
        assert_same_numbers(actual, torch.from_numpy(dequantize(matrix, GGMLQuantizationType.MXFP4)))
