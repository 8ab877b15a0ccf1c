"""One expert as `KTMoEWrapper` writes it for a device, decoded to matrices of numbers."""

from __future__ import annotations

import torch

from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.formats.records import RECORDS


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
    values = RECORDS[encoding.method].decode(codes, scales)
    return values if global_scales is None else values.mul_(global_scales[projection])
