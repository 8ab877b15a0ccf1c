"""The quantised tensors of one linear layer, decoded to one float32 matrix [outputs, inputs].

A layer's tensors share their name up to the last dot; what follows it is called a part here. One row of
FORMATS is one way to store a layer: the parts it needs with the types that tell it from the other rows, and
its decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kt_kernel.formats import decoding

Parts = Mapping[str, torch.Tensor]

_FLOAT8 = (torch.float8_e4m3fn,)
_FOUR_BIT = (torch.uint8, torch.int8)
_WORDS = (torch.int32,)
_REAL = (torch.float32, torch.bfloat16, torch.float16)
_POWERS_OF_TWO = (torch.uint8, torch.float8_e8m0fnu)

# What else checkpoints hold of a quantised layer. Activations and the KV cache stay unquantised here, zero
# points of symmetric formats are constants, and shapes follow from the other parts.
NOT_NEEDED = frozenset(
    (
        "input_scale",
        "input_global_scale",
        "k_scale",
        "v_scale",
        "weight_shape",
        "qzeros",
        "g_idx",
    )
)

# Tensors that change what the codes mean, in ways that no row decodes.
REFUSED = frozenset(("weight_zero_point", "weight_g_idx"))


@dataclass(frozen=True)
class DenseFormat:
    needs: Mapping[str, tuple[torch.dtype, ...]]
    decode: Callable[[Parts], torch.Tensor]

    def fits(self, parts: Parts) -> bool:
        return all(part in parts and parts[part].dtype in types for part, types in self.needs.items())


def is_part(part: str, tensor: torch.Tensor) -> bool:
    """Does a tensor with this last name belong to a quantised layer?"""
    if part == "weight":
        return tensor.dtype in (*_FLOAT8, *_FOUR_BIT)
    return part in _PARTS


def matching_format(parts: Parts) -> DenseFormat | None:
    """The row that these parts are enough for; None while some are missing."""
    return next((row for row in FORMATS if row.fits(parts)), None)


def _scale_of(parts: Parts) -> torch.Tensor:
    names = ("weight_scale_inv", "weight_scale", "scale", "scales")
    return next(parts[name] for name in names if name in parts)


def _codes_of(parts: Parts) -> torch.Tensor:
    return parts["weight_packed"] if "weight_packed" in parts else parts["weight"]


def _float8(parts: Parts) -> torch.Tensor:
    """One scale for the matrix, for each row, or for each block of 128 x 128: the shape says which."""
    weight, scales = parts["weight"], _scale_of(parts).float()
    rows = weight.shape[0]
    if scales.numel() == 1 or scales.shape in ((rows,), (rows, 1)):
        return weight.float() * scales.reshape(-1, 1)
    return decoding.float8(weight, scales, (128, 128))


def _float8_powers(parts: Parts) -> torch.Tensor:
    """A power of two per 32 inputs (MXFP8), or per block of 128 x 128: the shape says which."""
    weight, scales = parts["weight"], decoding.powers(_scale_of(parts))
    rows, columns = weight.shape
    block = (1, 32) if scales.shape == (rows, columns // 32) else (128, 128)
    return decoding.float8(weight, scales, block)


def _mxfp4(parts: Parts) -> torch.Tensor:
    return decoding.e2m1(_codes_of(parts), decoding.powers(_scale_of(parts)), 32)


def _nvfp4(parts: Parts) -> torch.Tensor:
    scales = parts["weight_scale"].float()
    if "weight_scale_2" in parts:
        scales = scales * parts["weight_scale_2"].float()
    else:
        scales = scales / parts["weight_global_scale"].float()
    return decoding.e2m1(_codes_of(parts), scales, 16)


def _packed_int4(parts: Parts) -> torch.Tensor:
    """int32 [outputs, inputs / 8] or bytes [outputs, inputs / 2], scales [outputs, groups]."""
    return decoding.packed_int4(parts["weight_packed"], parts["weight_scale"])


def _gptq_int4(parts: Parts) -> torch.Tensor:
    """int32 [inputs / 8, outputs], scales [groups, outputs]."""
    return decoding.gptq_int4(parts["qweight"], parts["scales"])


FORMATS = (
    # DeepSeek, Qwen3, MiniMax-M2: per block. compressed-tensors: per row, or one for all. Mistral: per block.
    DenseFormat({"weight": _FLOAT8, "weight_scale_inv": _REAL}, _float8),
    DenseFormat({"weight": _FLOAT8, "weight_scale": _REAL}, _float8),
    # MiniMax-M3, and compressed-tensors' MXFP8: per 32 inputs. DeepSeek-V4: per block.
    DenseFormat({"weight": _FLOAT8, "weight_scale_inv": _POWERS_OF_TWO}, _float8_powers),
    DenseFormat({"weight": _FLOAT8, "weight_scale": _POWERS_OF_TWO}, _float8_powers),
    DenseFormat({"weight": _FLOAT8, "scale": _POWERS_OF_TWO}, _float8_powers),
    # MXFP4 of DeepSeek-V4 and of compressed-tensors
    DenseFormat({"weight": _FOUR_BIT, "scale": _POWERS_OF_TWO}, _mxfp4),
    DenseFormat({"weight_packed": _FOUR_BIT, "weight_scale": _POWERS_OF_TWO}, _mxfp4),
    # NVFP4 of ModelOpt and, with the global scale's inverse, of compressed-tensors
    DenseFormat({"weight": _FOUR_BIT, "weight_scale": _FLOAT8, "weight_scale_2": _REAL}, _nvfp4),
    DenseFormat({"weight_packed": _FOUR_BIT, "weight_scale": _FLOAT8, "weight_global_scale": _REAL}, _nvfp4),
    # compressed-tensors' pack-quantized
    DenseFormat({"weight_packed": (*_WORDS, *_FOUR_BIT), "weight_scale": _REAL}, _packed_int4),
    # GPTQ without activation order
    DenseFormat({"qweight": _WORDS, "scales": _REAL}, _gptq_int4),
)

_PARTS = frozenset(part for row in FORMATS for part in row.needs) - {"weight"} | NOT_NEEDED
