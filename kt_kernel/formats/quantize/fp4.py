"""E2M1 codes, two to a byte with the even column in the low half, and a scale per 32 (MXFP4) or 16
(NVFP4) inputs."""

from __future__ import annotations

import torch

from kt_kernel.formats.quantize.powers_of_two import shared_powers
from kt_kernel.formats.quantize.quantized import Quantized, divide, in_groups

_LARGEST = 6.0
_LARGEST_EXPONENT = 2  # 6 = 1.5 * 2**2
_MX_GROUP, _NV_GROUP = 32, 16
_LARGEST_FP8 = 448.0


def to_mxfp4(matrix: torch.Tensor) -> Quantized:
    """float32 [N, K] -> bytes [N, K/2] and ue8m0 bytes [N, K/32]."""
    groups = in_groups(matrix, _MX_GROUP)
    bytes_, powers = shared_powers(groups, _LARGEST_EXPONENT)
    return Quantized(_pack(_codes(groups / powers), matrix), bytes_)


def to_nvfp4(matrix: torch.Tensor) -> Quantized:
    """float32 [N, K] -> bytes [N, K/2], float8_e4m3fn scales [N, K/16] and a global scale.

    The global scale makes the largest group's scale 448, the largest float8, and its largest code 6.
    """
    groups = in_groups(matrix, _NV_GROUP)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    global_scale = largest.max() / (_LARGEST_FP8 * _LARGEST)
    scales = divide(largest / _LARGEST, global_scale).clamp(max=_LARGEST_FP8).to(torch.float8_e4m3fn)
    codes = _codes(divide(groups, scales.float() * global_scale))
    return Quantized(_pack(codes, matrix), scales.squeeze(-1), float(global_scale))


def _codes(values: torch.Tensor) -> torch.Tensor:
    """Nearest codes 0 to 15 (8 is the sign), ties to even; larger values saturate.

    Magnitudes 0, 0.5, 1, 1.5 | 2, 3 | 4, 6 are evenly spaced between the bars, and there an even multiple of
    the spacing has an even code.
    """
    magnitudes = values.abs().clamp(max=_LARGEST)
    above_2 = torch.where(magnitudes < 4, magnitudes.round() + 2, (magnitudes / 2).round() + 4)
    codes = torch.where(magnitudes < 2, (2 * magnitudes).round(), above_2)
    return codes.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


def _pack(codes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    pairs = in_groups(codes.reshape(matrix.shape), 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)
