"""Quantised matrices back to numbers: one function per way to store them, float32 [outputs, inputs].

Nothing is rounded before the last step: codes and powers of two are exact in float32, and so is their
product with a scale of 8 or 16 bits.
"""

from __future__ import annotations

from functools import cache

import torch

from kt_kernel.errors import CheckpointError
from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors

_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
_INT4_ZERO = 8


def float8(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """e4m3 [N, K] and one scale per block of (rows, columns)."""
    return codes.float() * stretched(scales, *codes.shape, block)


def e2m1(codes: torch.Tensor, scales: torch.Tensor, columns_per_scale: int) -> torch.Tensor:
    """Bytes [N, K/2], the even column in the low half, and scales [N, K/columns_per_scale]."""
    values = _e2m1_values(codes.device)[nibbles(codes).long()]
    return values.mul_(stretched(scales, *values.shape, (1, columns_per_scale)))


def packed_int4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int32 [N, K/8] or bytes [N, K/2], codes stored plus 8, and scales [N, groups]."""
    values = nibbles(codes).float().sub_(_INT4_ZERO)
    columns_per_scale = -(-values.shape[1] // scales.shape[1])
    return values.mul_(stretched(scales, *values.shape, (1, columns_per_scale)))


def gptq_int4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int32 [K/8, N], scales [groups, N]: a word holds eight inputs of one output."""
    return packed_int4(codes.t(), scales.t())


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


def decode_expert(
    tensors: ExpertTensors, encoding: ExpertEncoding, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One rank's shard of an expert, where `tensors` are: w13 [2 I/R, H], gate above up, and w2 [H, I/R]."""
    # gate and up are decoded apart: each has whole blocks of scales, and a global scale, of its own.
    gate, up = _halves(tensors.w13_weight, encoding)
    gate_scale, up_scale = _halves(tensors.w13_scale, encoding)
    w13 = torch.empty(2 * encoding.share, encoding.hidden, dtype=dtype, device=gate.device)
    for rows, codes, scales, place in (
        (w13[: encoding.share], gate, gate_scale, 0),
        (w13[encoding.share :], up, up_scale, 1),
    ):
        rows.copy_(_decode(codes, scales, encoding, tensors.global_scales, place))
    w2 = _decode(tensors.w2_weight, tensors.w2_scale, encoding, tensors.global_scales, 2)
    return w13, w2.to(dtype)


def _halves(
    part: torch.Tensor | None, encoding: ExpertEncoding
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    return (None, None) if part is None else part.chunk(2, dim=encoding.up_follows_gate_along)


def _decode(
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    encoding: ExpertEncoding,
    global_scales: torch.Tensor | None,
    projection: int,
) -> torch.Tensor:
    method = encoding.method
    if method == "BF16":
        return codes
    if method == "GPTQ_INT4":
        return gptq_int4(codes, scales)
    if method == "RAWINT4":
        return packed_int4(codes, scales)
    if method in ("MXFP4", "NVFP4"):
        values = e2m1(codes, scales, encoding.scale_group[1])
        return values if global_scales is None else values.mul_(global_scales[projection])
    rows, columns = encoding.scale_group
    scales = powers(scales) if method == "MXFP8" else scales
    return float8(codes, scales.reshape(scales.shape[0], -1), (rows, columns or codes.shape[1]))


@cache
def _e2m1_values(device: torch.device) -> torch.Tensor:
    return torch.tensor(_E2M1, device=device)
