"""Rows of numbers to codes and scales, by the extension's kernel (csrc/kernels/quantise.h).

Bit for bit what `formats.quantize` makes of the same numbers in float32. In torch that is seven passes, 0.3
GB/s of bfloat16 a core; the kernel reaches 6 to 11 GB/s, and 1.8 to 3.6 of float8 (AMD Zen 4, 2026-11-30).
"""

from __future__ import annotations

import threading

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.convert.matrix import Numbers, SourceMatrix
from kt_kernel.convert.targets import Target
from kt_kernel.errors import ConversionError

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}

# Rows of one call: a multiple of every block's rows. Inputs that torch decodes take a few times these 2**20
# numbers in float32 for each thread.
_BLOCK_ROWS = 128
_NUMBERS_AT_ONCE = 1 << 20

_own = threading.local()


def quantise_matrix(matrix: SourceMatrix, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) in the target's shapes, as bytes and float32; valid until this thread's next call.

    Raises ConversionError, naming the matrix, for infinite or NaN numbers.
    """
    rows, columns = matrix.shape
    codes = _buffer("codes", torch.uint8, target.code_shape(rows, columns))
    scales = _buffer("scales", torch.float32, target.scale_shape(rows, columns))
    step = max(1, _NUMBERS_AT_ONCE // columns // _BLOCK_ROWS) * _BLOCK_ROWS
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        _quantise(matrix, matrix.rows(begin, end), target, begin, codes[begin:end], scales[begin:end])
    return codes, scales


def _quantise(
    matrix: SourceMatrix,
    numbers: Numbers,
    target: Target,
    begin: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    values = numbers.values
    rows, columns = values.shape
    assert values.is_contiguous() and columns == matrix.shape[1], f"{matrix.name}: {list(values.shape)}"
    blocks = None
    if numbers.scales is not None:
        blocks = (numbers.scales.data_ptr(), numbers.first_row, *numbers.block)
    not_finite = kt_kernel_ext.quantise_rows(
        _DTYPES[values.dtype],
        values.data_ptr(),
        rows,
        columns,
        blocks,
        target.bits,
        target.group_columns(columns),
        codes.data_ptr(),
        scales.data_ptr(),
    )
    if not_finite >= 0:
        raise ConversionError(
            f"'{matrix.name}' holds an infinite or NaN weight in row {begin + not_finite}, which no integer "
            "represents; download the checkpoint again, or convert another."
        )


def _buffer(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """This thread's own, grown to the largest matrix seen."""
    size = shape[0] * shape[1]
    known = getattr(_own, name, None)
    if known is None or known.numel() < size:
        known = torch.empty(size, dtype=dtype)
        setattr(_own, name, known)
    return known[:size].view(shape)
