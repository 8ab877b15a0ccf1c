"""float8_e4m3fn codes with scales per block, per row, or per 32 inputs."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from kt_kernel.formats.quantize.powers_of_two import shared_powers
from kt_kernel.formats.quantize.quantized import Quantized, divide, in_groups

_LARGEST = 448.0
_LARGEST_EXPONENT = 8  # 448 = 1.75 * 2**8
_BLOCK = 128
_MX_GROUP = 32


def to_fp8_blocks(matrix: torch.Tensor) -> Quantized:
    """float32 [N, K] -> codes [N, K] and float32 scales [ceil(N/128), ceil(K/128)]: absmax / 448."""
    n, k = matrix.shape
    padded = pad(matrix, (0, -k % _BLOCK, 0, -n % _BLOCK))
    blocks = padded.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))  # [N/128, 128, K/128, 128]
    scales = blocks.abs().amax(dim=(1, 3)) / _LARGEST
    codes = _codes(divide(blocks, scales[:, None, :, None])).reshape(padded.shape)
    return Quantized(codes[:n, :k].contiguous(), scales)


def to_fp8_rows(matrix: torch.Tensor) -> Quantized:
    """float32 [N, K] -> codes [N, K] and float32 scales [N]: absmax / 448."""
    scales = matrix.abs().amax(dim=1) / _LARGEST
    return Quantized(_codes(divide(matrix, scales[:, None])), scales)


def to_mxfp8(matrix: torch.Tensor) -> Quantized:
    """float32 [N, K] -> codes [N, K] and ue8m0 bytes [N, K/32]."""
    groups = in_groups(matrix, _MX_GROUP)
    bytes_, powers = shared_powers(groups, _LARGEST_EXPONENT)
    return Quantized(_codes(groups / powers).reshape(matrix.shape), bytes_)


def _codes(values: torch.Tensor) -> torch.Tensor:
    """Nearest codes, ties to even; larger values saturate."""
    return values.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
