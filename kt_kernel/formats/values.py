"""Quantised matrices back to numbers: one function per way to store them, float32 [outputs, inputs].

Nothing is rounded before the last step: codes and powers of two are exact in float32, and so is their
product with a scale of 8 or 16 bits.
"""

from __future__ import annotations

from functools import cache

import torch

from kt_kernel.errors import CheckpointError
from kt_kernel.formats.shapes import BLOCK

_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
_INT4_ZERO = 8


def float8(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """e4m3 [N, K] and one scale per block of (rows, columns): numbers, or ue8m0 bytes."""
    return codes.float() * stretched(scale_values(scales), *codes.shape, block)


def float8_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """e4m3 [N, K] and one scale per block of 128 x 128."""
    return float8(codes, scales, (BLOCK, BLOCK))


def float8_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """e4m3 [N, K] and scales [N] or [N, 1]."""
    return float8(codes, scales.reshape(-1, 1), (1, codes.shape[1]))


def float8_groups(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """e4m3 [N, K] and one scale per 32 columns."""
    return float8(codes, scales, (1, 32))


def mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Bytes [N, K/2] and one scale per 32 columns."""
    return e2m1(codes, scales, 32)


def nvfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Bytes [N, K/2] and one scale per 16 columns."""
    return e2m1(codes, scales, 16)


def e2m1(codes: torch.Tensor, scales: torch.Tensor, columns_per_scale: int) -> torch.Tensor:
    """Bytes [N, K/2], the even column in the low half, and scales per so many columns: numbers, or bytes."""
    values = _e2m1_values(codes.device)[nibbles(codes).long()]
    return values.mul_(stretched(scale_values(scales), *values.shape, (1, columns_per_scale)))


def packed_int4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int32 [N, K/8] or bytes [N, K/2], codes stored plus 8, and scales [N, groups] or [N]."""
    values = nibbles(codes).float().sub_(_INT4_ZERO)
    scales = scales.reshape(scales.shape[0], -1)
    columns_per_scale = -(-values.shape[1] // scales.shape[1])
    return values.mul_(stretched(scales, *values.shape, (1, columns_per_scale)))


def int8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] and scales [N, groups] or [N]."""
    scales = scales.reshape(scales.shape[0], -1)
    return codes.float() * stretched(scales, *codes.shape, (1, -(-codes.shape[1] // scales.shape[1])))


def gptq_int4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int32 [K/8, N], scales [groups, N]: a word holds eight inputs of one output."""
    return packed_int4(codes.t(), scales.t())


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Scales of any dtype as float32; bytes are powers of two."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return powers(scales)
    return scales.float()


def powers(exponents: torch.Tensor) -> torch.Tensor:
    """ue8m0 as float32: 2 ** (byte - 127), exactly; the byte 0 is a subnormal number, 255 is no number."""
    return exponents.view(torch.float8_e8m0fnu).float()


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Any integers [rows, n] -> uint8 [rows, 2 * bytes]: low nibbles are even columns."""
    octets = packed.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def stretched(scales: torch.Tensor, rows: int, columns: int, block: tuple[int, int]) -> torch.Tensor:
    """One scale per block -> one per element, float32 [rows, columns]; blocks at the edges may be cut off.

    Raises CheckpointError if there is another number of scales.
    """
    expected = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scales.shape) != expected:
        raise CheckpointError(
            f"a weight of {rows} x {columns} in blocks of {block[0]} x {block[1]} has scales of shape "
            f"{list(scales.shape)}, expected {list(expected)}; download the checkpoint again."
        )
    scales = scales.float().repeat_interleave(block[0], 0)[:rows]
    return scales.repeat_interleave(block[1], 1)[:, :columns]


@cache
def _e2m1_values(device: torch.device) -> torch.Tensor:
    return torch.tensor(_E2M1, device=device)
