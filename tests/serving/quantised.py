"""Random matrices as checkpoints store them: the quantised tensors, and the matrix that they mean.

One function per way of storing, written from the definitions of the formats alone: codes and scales are
drawn, not fitted, so that a mistake in a quantiser cannot hide one in a decoder. `deviation` is about the
standard deviation of the decoded matrix. Every decoded value is exact in float32, or rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
Maker = Callable[..., tuple[Tensors, torch.Tensor]]  # rows, columns, deviation

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp8_blocks(scale_dtype: torch.dtype) -> Maker:
    """`weight` and `weight_scale_inv`: one scale per 128 x 128, blocks at the edges cut off."""

    def make(rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
        codes, spread = _float8_codes(rows, columns)
        scales = _scales(-(-rows // 128), -(-columns // 128), deviation / spread).to(scale_dtype)
        per_element = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        decoded = codes.float() * per_element[:rows, :columns]
        return {"weight": codes, "weight_scale_inv": scales}, decoded

    return make


def fp8_rows(rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' float-quantized: `weight` and `weight_scale` [rows, 1] in bfloat16."""
    codes, spread = _float8_codes(rows, columns)
    scales = _scales(rows, 1, deviation / spread).bfloat16()
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def mxfp8(rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
    """`weight` and `weight_scale_inv` uint8 [rows, columns / 32]: the power of two plus 127."""
    codes, spread = _float8_codes(rows, columns)
    exponents, scales = _powers_of_two(rows, columns // 32, deviation / spread)
    decoded = codes.float() * scales.repeat_interleave(32, 1)
    return {"weight": codes, "weight_scale_inv": exponents}, decoded


def mxfp4(rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek-V4's `weight` int8 [rows, columns / 2] and `scale` float8_e8m0fnu [rows, columns / 32]."""
    codes = _e2m1_codes(rows, columns)
    exponents, scales = _powers_of_two(rows, columns // 32, deviation / E2M1[codes].std().item())
    decoded = E2M1[codes] * scales.repeat_interleave(32, 1)
    stored = {"weight": _pairs(codes).view(torch.int8), "scale": exponents.view(torch.float8_e8m0fnu)}
    return stored, decoded


def mxfp4_blocks(experts: int, rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
    """gpt-oss's `_blocks` uint8 [experts, rows, columns / 32, 16] and `_scales` uint8 [experts, rows,
    columns / 32] of all experts.
    """
    parts, decoded = mxfp4(experts * rows, columns, deviation)
    blocks = parts["weight"].view(torch.uint8).reshape(experts, rows, columns // 32, 16)
    scales = parts["scale"].view(torch.uint8).reshape(experts, rows, columns // 32)
    return {"_blocks": blocks, "_scales": scales}, decoded.reshape(experts, rows, columns)


def mxfp4_packed(rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' `weight_packed` uint8 [rows, columns / 2] and `weight_scale` uint8 [rows, columns /
    32]."""
    parts, decoded = mxfp4(rows, columns, deviation)
    codes, scales = (parts[name].view(torch.uint8) for name in ("weight", "scale"))
    return {"weight_packed": codes, "weight_scale": scales}, decoded


def nvfp4_packed(rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' `weight_packed`, `weight_scale` and `weight_global_scale`, a divisor."""
    parts, _ = nvfp4(rows, columns, deviation)
    divisor = 1 / parts["weight_scale_2"]
    scales = parts["weight_scale"].float().repeat_interleave(16, 1) / divisor
    low, high = parts["weight"].int() & 15, parts["weight"].int() >> 4
    decoded = E2M1[torch.stack((low, high), -1).flatten(1)] * scales
    return {
        "weight_packed": parts["weight"],
        "weight_scale": parts["weight_scale"],
        "weight_global_scale": divisor.reshape(1),
    }, decoded


def nvfp4(rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
    """ModelOpt's `weight` uint8 [rows, columns / 2], `weight_scale` e4m3 [rows, columns / 16] and the global
    `weight_scale_2`.
    """
    codes = _e2m1_codes(rows, columns)
    scales = (torch.rand(rows, columns // 16) * 200 + 20).to(torch.float8_e4m3fn)
    global_scale = torch.tensor(deviation / (E2M1[codes].std() * scales.float().mean()).item())
    decoded = E2M1[codes] * (scales.float().repeat_interleave(16, 1) * global_scale)
    stored = {
        "weight": _pairs(codes),
        "weight_scale": scales,
        "weight_scale_2": global_scale,
        "input_scale": torch.tensor(0.01),
    }
    return stored, decoded


def packed_int4(group: int) -> Maker:
    """compressed-tensors' pack-quantized: `weight_packed` int32 [rows, columns / 8], scales in bfloat16."""

    def make(rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
        codes = _int4_codes(rows, columns)
        scales = _scales(rows, columns // group, deviation / codes.float().std().item()).bfloat16()
        stored = {
            "weight_packed": _words(codes + 8),
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, columns], dtype=torch.int32),
        }
        return stored, codes * scales.float().repeat_interleave(group, 1)

    return make


def gptq_int4(group: int) -> Maker:
    """GPTQ without activation order: `qweight` int32 [columns / 8, rows], `scales` float16 [groups, rows]."""

    def make(rows: int, columns: int, deviation: float) -> tuple[Tensors, torch.Tensor]:
        codes = _int4_codes(rows, columns)
        scales = _scales(rows, columns // group, deviation / codes.float().std().item()).half()
        stored = {
            "qweight": _words(codes + 8).t().contiguous(),
            "qzeros": torch.full((columns // group, rows // 8), 0x77777777, dtype=torch.int32),
            "scales": scales.t().contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // group,
        }
        return stored, codes * scales.float().repeat_interleave(group, 1)

    return make


def _float8_codes(rows: int, columns: int) -> tuple[torch.Tensor, float]:
    codes = (torch.randn(rows, columns) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, 60.0


def _e2m1_codes(rows: int, columns: int) -> torch.Tensor:
    """int64 in 0..15: all sixteen codes, small magnitudes more often."""
    magnitude = (torch.randn(rows, columns) * 3).abs().long().clamp(max=7)
    return magnitude + 8 * torch.randint(0, 2, (rows, columns))


def _int4_codes(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * 3).round().clamp(-8, 7).long()


def _scales(rows: int, columns: int, typical: float) -> torch.Tensor:
    """Positive, within a factor of two around `typical`, their root mean square."""
    scales = torch.exp2(torch.rand(rows, columns) * 2 - 1)
    return scales * (typical / scales.square().mean().sqrt())


def _powers_of_two(rows: int, columns: int, typical: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of ue8m0 for the powers of two nearest to `typical` and below, and the scales that they mean."""
    exponents = torch.tensor(typical).log2().round().int() - torch.randint(0, 2, (rows, columns))
    return (exponents + 127).to(torch.uint8), torch.exp2(exponents.float())


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes a byte, the even column in the low half."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit codes an int32, the first in the lowest bits."""
    return _pairs(codes).view(torch.int32)
