"""Inputs in a format that the kernels read themselves: float8, 4-bit floats and integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kt_kernel.checkpoint.checks import require_tensor
from kt_kernel.checkpoint.experts import layer_experts
from kt_kernel.checkpoint.families import ExpertNames
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.convert.layout import LayerShape
from kt_kernel.convert.matrix import Numbers, SourceExpert, SourceMatrix
from kt_kernel.errors import CheckpointError
from kt_kernel.formats.matrices import ExpertMatrix
from kt_kernel.formats.records import RECORDS
from kt_kernel.formats.shapes import BLOCK
from kt_kernel.formats.values import scale_values

# Rows and columns that share a scale; 0 = all columns.
_FLOAT8_BLOCKS = {"FP8": (BLOCK, BLOCK), "FP8_PERCHANNEL": (1, 0), "MXFP8": (1, 32)}


@contextmanager
def coded_experts(
    checkpoint: Checkpoint, method: str, base: str, shape: LayerShape
) -> Iterator[Callable[[int], SourceExpert]]:
    """Expert number -> its matrices, valid inside the `with` block. Raises CheckpointError."""
    with layer_experts(
        checkpoint,
        shape.index,
        method,
        num_experts=shape.experts,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
    ) as experts:
        beside = _names_by_stem(checkpoint, base)

        def matrix(stored: ExpertMatrix, projection: str) -> SourceMatrix:
            parts = (stored.weight,) if stored.scale is None else (stored.weight, stored.scale)
            names = beside[stored.name.rpartition(".")[0]]
            return SourceMatrix(stored.name, shape.matrix(projection), parts, names, _rows_of(method, stored))

        yield lambda expert: SourceExpert(
            matrix(experts.gate[expert], "gate_proj"),
            matrix(experts.up[expert], "up_proj"),
            matrix(experts.down[expert], "down_proj"),
        )


def coded_shape(
    checkpoint: Checkpoint, method: str, base: str, names: ExpertNames, layer: int, experts: int
) -> LayerShape:
    """What the numbers of rows say, which every format keeps."""

    def rows(projection: str) -> int:
        stem = f"{base}.0.{projection}"
        suffixes = ("qweight", "weight_packed", "weight")
        name = next(
            (name for name in (f"{stem}.{s}" for s in suffixes) if name in checkpoint), f"{stem}.weight"
        )
        extents = require_tensor(checkpoint, name).shape
        if len(extents) != 2:
            raise CheckpointError(
                f"tensor '{name}' in '{checkpoint.path}' has shape {list(extents)}, expected a matrix; "
                "download the checkpoint again."
            )
        return extents[1 if method == "GPTQ_INT4" else 0]

    return LayerShape(layer, experts, hidden=rows(names.down), intermediate=rows(names.gate))


def _rows_of(method: str, stored: ExpertMatrix) -> Callable[[int, int], Numbers]:
    if stored.weight.dtype is torch.float8_e4m3fn:
        return _float8_rows(stored, _FLOAT8_BLOCKS[method])
    decode = RECORDS[method].decode
    # GPTQ stores inputs down the rows.
    axis = 1 if method == "GPTQ_INT4" else 0
    scale = stored.scale if stored.scale.dim() == 2 else stored.scale.unsqueeze(1 - axis)

    def rows(begin: int, end: int) -> Numbers:
        count = end - begin
        values = decode(stored.weight.narrow(axis, begin, count), scale.narrow(axis, begin, count))
        return Numbers(values.mul_(stored.global_scale).contiguous())

    return rows


def _float8_rows(stored: ExpertMatrix, block: tuple[int, int]) -> Callable[[int, int], Numbers]:
    """The quantiser decodes these itself."""
    columns = stored.weight.shape[1]
    scales = scale_values(stored.scale).contiguous()

    def rows(begin: int, end: int) -> Numbers:
        return Numbers(stored.weight[begin:end], scales, (block[0], block[1] or columns), begin)

    return rows


def _names_by_stem(checkpoint: Checkpoint, base: str) -> dict[str, tuple[str, ...]]:
    """Name up to the last dot -> all tensors of that matrix."""
    names: dict[str, tuple[str, ...]] = {}
    for tail in checkpoint.expert_groups()[base]:
        stem = f"{base}.{tail}".rpartition(".")[0]
        names[stem] = (*names.get(stem, ()), f"{base}.{tail}")
    return names
