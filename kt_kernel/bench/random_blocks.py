"""Experts of a ggml type for benchmarks: random blocks whose weights keep the size of what they multiply."""

from __future__ import annotations

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.bench.shapes import Shape
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts

TYPES = {row["name"]: row for row in kt_kernel_ext.GGUF_TYPES}

# Where a block keeps the fp16 numbers that all its values are multiplied with; MXFP4: the power of two.
_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
_POWER_OF_TWO = "MXFP4"
_BIAS = 127

BENCHED = (*_HALVES, _POWER_OF_TWO)


def random_blocks(ggml_type: str, shape: Shape) -> LayerExperts:
    """One expert of that type; raises KeyError for one that is not in BENCHED."""
    generator = torch.Generator().manual_seed(1)
    hidden, inner = shape.hidden, shape.intermediate
    gate, up, down = (
        [ExpertMatrix(name, random_matrix(ggml_type, rows, columns, generator))]
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner))
    )
    return LayerExperts(gate, up, down, formats=(ggml_type,) * 3)


def random_matrix(ggml_type: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 [rows, bytes of a row]."""
    row = TYPES[ggml_type]
    blocks = torch.randint(
        256, (rows * columns // row["columns"], row["bytes"]), dtype=torch.uint8, generator=generator
    )
    _set_scales(ggml_type, blocks, 1.0)
    decoded = torch.empty(1, columns)
    first_row = blocks[: columns // row["columns"]]
    kt_kernel_ext.gguf_decode(row["id"], first_row.data_ptr(), 1, columns, decoded.data_ptr(), "F32")
    _set_scales(ggml_type, blocks, columns**-0.5 / decoded.std().item())
    return blocks.view(rows, -1)


def _set_scales(ggml_type: str, blocks: torch.Tensor, scale: float) -> None:
    if ggml_type == _POWER_OF_TWO:
        blocks[:, 0] = round(torch.tensor(scale).log2().item()) + _BIAS
        return
    for place in _HALVES[ggml_type]:
        blocks[:, place : place + 2] = torch.tensor([scale]).half().view(torch.uint8)
