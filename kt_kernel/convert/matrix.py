"""A matrix of the input, as the quantiser takes it: numbers of a few rows at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from kt_kernel.checkpoint.reader import Checkpoint

# A page at the start and one every 16 MiB: enough to tell another model or a fine-tuned one, and 0.02 % of
# the bytes, so that continuing a conversion does not read everything again.
_SAMPLE_BYTES = 4096
_SAMPLE_EVERY = 16 << 20


@dataclass(frozen=True)
class Numbers:
    """Rows [r, K] of a float type, contiguous.

    float8_e4m3fn has `scales` float32 [row blocks, column blocks] for blocks of `block` (rows, columns);
    `first_row` is the place of these rows in the matrix that the blocks divide.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    block: tuple[int, int] = (1, 1)
    first_row: int = 0


@dataclass(frozen=True)
class SourceMatrix:
    """One matrix [N, K]. `parts`: stored tensors, or contiguous slices of them; `tensors`: their names."""

    name: str
    shape: tuple[int, int]
    parts: tuple[torch.Tensor, ...]
    tensors: tuple[str, ...]
    rows: Callable[[int, int], Numbers]  # [begin, end) of rows; begin is a multiple of 128


@dataclass(frozen=True)
class SourceExpert:
    gate: SourceMatrix
    up: SourceMatrix
    down: SourceMatrix

    def matrices(self) -> tuple[tuple[str, SourceMatrix], ...]:
        """(name of the projection in the output, matrix), in the output's order."""
        return (("gate_proj", self.gate), ("up_proj", self.up), ("down_proj", self.down))


def content_hash(matrix: SourceMatrix) -> bytes:
    """Of the matrix as it is stored: shapes, types and all bytes."""
    state = hashlib.sha256()
    for part in matrix.parts:
        state.update(_kind(part))
        state.update(_bytes_of(part))
    return state.digest()


def sample_hash(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Of what a few pages of the stored tensors hold, hexadecimal."""
    state = hashlib.sha256()
    for name in names:
        view = checkpoint.view(name)
        stored = _bytes_of(view)
        state.update(_kind(view))
        for begin in range(0, len(stored), _SAMPLE_EVERY):
            state.update(stored[begin : begin + _SAMPLE_BYTES])
    return state.hexdigest()


def _kind(part: torch.Tensor) -> bytes:
    return f"{part.dtype} {list(part.shape)};".encode()


def _bytes_of(part: torch.Tensor) -> memoryview:
    return memoryview(part.reshape(-1).view(torch.uint8).numpy())
