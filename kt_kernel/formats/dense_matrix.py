"""The matrix of a dense layer as its checkpoint stores it: packed by the extension, or decoded for torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.calls.inputs import FLOAT_CODES
from kt_kernel.checkpoint.safetensors_file import TORCH_DTYPES
from kt_kernel.errors import CheckpointError
from kt_kernel.formats.dense_formats import DenseFormat, Parts, is_one_float8_scale
from kt_kernel.formats.record import WHOLE_ROW
from kt_kernel.formats.records import RECORDS
from kt_kernel.formats.shapes import (
    Shape,
    ShapeRule,
    eight_per_word,
    eight_per_word_down_k,
    plain,
    two_per_byte,
)

# (rows, columns) of a matrix from the shape of its codes, by the rule that gives the shape.
_SIZES: Mapping[ShapeRule, Callable[[int, int], tuple[int, int]]] = {
    plain: lambda rows, columns: (rows, columns),
    two_per_byte: lambda rows, bytes_: (rows, 2 * bytes_),
    eight_per_word: lambda rows, words: (rows, 8 * words),
    eight_per_word_down_k: lambda words, rows: (rows, 8 * words),
}


@dataclass(frozen=True)
class DenseMatrix:
    """[rows, columns] in a format that there are kernels for.

    `method`, `format`: a row of `kt_kernel_ext.dispatch_table()`. `weight`, `scale`: contiguous, laid out as
    for experts (`ExpertMatrix`). `numbers`: the same matrix in a dtype. `release`: to be called once it is no
    longer read.
    """

    name: str
    method: str
    format: str
    rows: int
    columns: int
    weight: torch.Tensor
    scale: torch.Tensor | None
    factor: float
    group_size: int
    numbers: Callable[[torch.dtype], torch.Tensor]
    release: Callable[[], None] = lambda: None

    @property
    def scale_code(self) -> int:
        """The extension's code of the scales' dtype; float32's where there is nothing to choose."""
        return FLOAT_CODES.get(getattr(self.scale, "dtype", torch.float32), FLOAT_CODES[torch.float32])

    def as_part(self) -> tuple[str, str, int, int, int, float, int, int]:
        """For `kt_kernel_ext.Linear`; the addresses are valid as long as this object."""
        scale = 0 if self.scale is None else self.scale.data_ptr()
        return (
            self.method,
            self.format,
            self.rows,
            self.weight.data_ptr(),
            scale,
            self.factor,
            self.group_size,
            self.scale_code,
        )


def has_kernels(method: str, name: str) -> bool:
    """Has the extension kernels for this format of the method, whatever they round activations to?"""
    return any((row["method"], row["format"]) == (method, name) for row in kt_kernel_ext.dispatch_table())


def checkpoint_matrix(name: str, row: DenseFormat, parts: Parts) -> DenseMatrix | None:
    """The matrix that a layer's quantised tensors are; None where no kernels compute with it as it is.

    Raises CheckpointError for scales of an impossible shape only when its numbers are asked for.
    """
    method, scale = row.format.method, parts[row.scale]
    codes = parts[row.format.weight]
    rows, columns = _sizes(row, codes)
    if is_one_float8_scale(codes, scale):
        method, scale = "FP8_PERCHANNEL", scale.float().reshape(1).expand(rows)
    elif scale.dtype is torch.float8_e8m0fnu and RECORDS[method].encoding.scales is torch.float32:
        scale = scale.float()  # the kernels of blocks take numbers, which hold powers of two exactly
    group = _group_size(row, scale, columns)
    if group is None or columns % RECORDS[method].columns_multiple or not has_kernels(method, method):
        return None
    if method == row.format.method and tuple(scale.shape) not in row.format.scale_shape(rows, columns, group):
        return None
    factor, scalar = 1.0, row.format.global_scale
    if scalar is not None:
        factor = float(parts[scalar.suffix].float().reshape(()) ** scalar.power)
    return DenseMatrix(
        name,
        method,
        method,
        rows,
        columns,
        codes.contiguous(),
        scale.contiguous(),
        factor,
        group,
        lambda dtype: decode_parts(name, row, parts).to(dtype),
    )


def plain_matrix(name: str, numbers: torch.Tensor) -> DenseMatrix:
    """bfloat16 [rows, columns]."""
    rows, columns = numbers.shape
    return DenseMatrix(
        name, "BF16", "BF16", rows, columns, numbers.contiguous(), None, 1.0, WHOLE_ROW, numbers.to
    )


def decode_parts(layer: str, row: DenseFormat, parts: Parts) -> torch.Tensor:
    """float32 [outputs, inputs]; raises CheckpointError with the layer's name."""
    try:
        return row.decode(parts)
    except CheckpointError as error:
        raise CheckpointError(f"layer '{layer}': {error}") from None


def _sizes(row: DenseFormat, codes: torch.Tensor) -> Shape:
    shapes = row.format.weight_shapes
    rule = next(rule for dtype, rule in shapes.items() if TORCH_DTYPES[dtype] is codes.dtype)
    return _SIZES[rule](*codes.shape)


def _group_size(row: DenseFormat, scale: torch.Tensor, columns: int) -> int | None:
    """Columns that share a scale, where that is free; None if groups of one size are no whole row."""
    axis = row.format.group_axis
    groups = 1 if axis is None or scale.dim() < 2 else scale.shape[axis]
    if groups == 1:
        return WHOLE_ROW
    return columns // groups if columns % groups == 0 else None
