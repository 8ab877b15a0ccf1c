"""Experts converted for a number of NUMA nodes by the original converter: read for any number of pools.

A matrix is cut into T parts, gate and up by rows, down by columns, and each part is stored on its own:

    blk.{layer}.ffn_{gate,up,down}_exps.{expert}.numa.{part}.weight    int8, bytes in the order of AMX tiles
    blk.{layer}.ffn_{gate,up,down}_exps.{expert}.numa.{part}.scale     float32, one per row of the part

N and K are multiples of 64 (int8) or 128 (int4). The bytes of a part [N, K] are blocks of so many rows; in
them blocks of 3584 columns; in them steps of 32 rows; in them steps of 64 or 128 columns, each a tile:

    tile:   16 rows | 16 rows                 each half: 16 x 16 words, [word of the row][row]
    word:   int8: 4 columns; int4: columns j to j + 3 in the low nibbles, 64 + j to 64 + j + 3 in the high

int4 nibbles are two's complement, and the scale belongs to 16 times their value. They become AMXINT4 and
AMXINT8 as the records say, exactly: the scales of down's parts make its groups, gate's and up's are repeated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import CheckpointError, MissingTensorError
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.record import WHOLE_ROW

_NAME = re.compile(r"ffn_(gate|up|down)_exps\.(\d+)\.numa\.(\d+)\.(weight|scale)")
_COLUMN_BLOCK = 3584
_TILE_ROWS, _TILE_WORDS = 32, 16  # words: of each row
_INT4_FACTOR = 16


@dataclass(frozen=True)
class _Packing:
    """How many rows a block and columns a tile has, and columns to a byte."""

    method: str
    block: int
    columns_per_byte: int


_PACKINGS = (_Packing("AMXINT8", 64, 1), _Packing("AMXINT4", 128, 2))


def stored_method(checkpoint: Checkpoint, base: str) -> tuple[str, str]:
    """(AMXINT4 or AMXINT8, the tensors that say so) of the layer `base`, "blk.3".

    Raises MissingTensorError or CheckpointError.
    """
    names = [f"{base}.ffn_{part}" for part in ("up_exps.0.numa.0.weight", "up_exps.0.numa.0.scale")]
    names.append(f"{base}.ffn_down_exps.0.numa.0.scale")
    bytes_, rows, columns = (_elements(checkpoint, name) for name in names)
    for packing in _PACKINGS:
        if bytes_ * packing.columns_per_byte == rows * columns:
            return packing.method, f"'{names[0]}' has {bytes_} bytes for {rows} x {columns} weights"
    raise CheckpointError(
        f"tensor '{names[0]}' in '{checkpoint.path}' has {bytes_} bytes, expected {rows * columns} (int8) or "
        f"{rows * columns // 2} (int4) for {rows} x {columns} weights; convert the model again."
    )


def read_experts(
    checkpoint: Checkpoint, base: str, method: str, num_experts: int, hidden: int, intermediate: int
) -> LayerExperts:
    """One layer's experts, decoded into new tensors as a checkpoint for `method` would hold them.

    Raises MissingTensorError or CheckpointError, naming the tensor.
    """
    packing = next(row for row in _PACKINGS if row.method == method)
    experts, parts = _counts(checkpoint, base)
    if experts != num_experts:
        raise CheckpointError(
            f"num_experts is {num_experts}, but '{checkpoint.path}' holds {experts} experts under '{base}'; "
            "take the weights and the config.json from the same model."
        )
    if intermediate % parts:
        raise CheckpointError(
            f"'{checkpoint.path}' was converted for {parts} NUMA nodes, which do not divide "
            f"moe_intermediate_size, {intermediate}; take weights and config.json from the same model."
        )
    layer = _Layer(checkpoint, base, packing, parts, hidden, intermediate)
    return LayerExperts(
        gate=[layer.cut_by_rows("gate", expert) for expert in range(experts)],
        up=[layer.cut_by_rows("up", expert) for expert in range(experts)],
        down=[layer.cut_by_columns("down", expert) for expert in range(experts)],
        group_size=layer.group_size,
    )


@dataclass(frozen=True)
class _Layer:
    checkpoint: Checkpoint
    base: str
    packing: _Packing
    parts: int
    hidden: int
    intermediate: int

    @property
    def share(self) -> int:
        """Rows of gate and up, and columns of down, in one part."""
        return self.intermediate // self.parts

    @property
    def group_size(self) -> int:
        """Columns that share a scale in every matrix of the layer."""
        return WHOLE_ROW if self.parts == 1 else math.gcd(self.share, self.hidden)

    def cut_by_rows(self, projection: str, expert: int) -> ExpertMatrix:
        codes, scales = zip(*self._read(projection, expert, self.share, self.hidden), strict=True)
        return self._matrix(projection, expert, torch.cat(codes), torch.cat(scales), self.hidden)

    def cut_by_columns(self, projection: str, expert: int) -> ExpertMatrix:
        codes, scales = zip(*self._read(projection, expert, self.hidden, self.share), strict=True)
        return self._matrix(projection, expert, torch.cat(codes, 1), torch.cat(scales, 1), self.share)

    def _matrix(
        self, projection: str, expert: int, codes: torch.Tensor, scales: torch.Tensor, columns: int
    ) -> ExpertMatrix:
        """`scales` [rows, n], each for so many columns -> one for each group."""
        if self.group_size:
            scales = scales.repeat_interleave(columns // self.group_size, 1)
        return ExpertMatrix(f"{self.base}.ffn_{projection}_exps.{expert}", codes, scales.contiguous())

    def _read(
        self, projection: str, expert: int, rows: int, columns: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Codes and scales [rows, 1] of each part, a matrix of so many rows and columns."""
        packing = self.packing
        if rows % packing.block or columns % packing.block:
            raise CheckpointError(
                f"parts in '{self.checkpoint.path}' would be {rows} x {columns}, expected multiples of "
                f"{packing.block} for {packing.method}; take the weights and the config.json from one model."
            )
        for part in range(self.parts):
            stem = f"{self.base}.ffn_{projection}_exps.{expert}.numa.{part}"
            size = rows * columns // packing.columns_per_byte
            packed = self._tensor(f"{stem}.weight", torch.int8, size).view(torch.uint8)
            scales = self._tensor(f"{stem}.scale", torch.float32, rows).view(rows, 1)
            if packing.columns_per_byte == 2:
                yield _int4_rows(packed, rows, columns, packing), scales * _INT4_FACTOR
            else:
                yield _rows_of_tiles(packed, rows, columns, packing).view(torch.int8), scales

    def _tensor(self, name: str, dtype: torch.dtype, size: int) -> torch.Tensor:
        if name not in self.checkpoint:
            raise MissingTensorError(
                f"tensor '{name}' is not in the checkpoint '{self.checkpoint.path}'; the conversion is "
                "incomplete, convert the model again."
            )
        tensor = self.checkpoint.view(name)
        if tensor.numel() != size or tensor.dtype not in (dtype, torch.uint8):
            raise CheckpointError(
                f"tensor '{name}' in '{self.checkpoint.path}' is {tensor.dtype} of {tensor.numel()}, "
                f"expected {dtype} of {size} from the model's description; take the weights and the "
                "config.json from the same model."
            )
        return tensor.reshape(-1)


def _int4_rows(packed: torch.Tensor, rows: int, columns: int, packing: _Packing) -> torch.Tensor:
    """uint8 [rows, columns / 2]: code + 8, the even column in the low half."""
    tiles = _rows_of_tiles(packed, rows, columns, packing).view(rows, -1, packing.block // 2) ^ 0x88
    halves = torch.stack((tiles & 15, tiles >> 4), dim=2)  # [rows, tiles, first or second 64 columns, 64]
    return (halves[..., 0::2] | halves[..., 1::2] << 4).reshape(rows, -1)


def _rows_of_tiles(packed: torch.Tensor, rows: int, columns: int, packing: _Packing) -> torch.Tensor:
    """The bytes of a part with each row's together, tile after tile: uint8 [rows, bytes of a row]."""
    words = packed.view(torch.int32)
    words_per_row = columns // packing.columns_per_byte // 4
    result = torch.empty(rows, words_per_row, dtype=torch.int32)
    words_per_block = _COLUMN_BLOCK // packing.columns_per_byte // 4
    blocks = words.view(-1, packing.block * words_per_row)
    for begin in range(0, words_per_row, words_per_block):
        width = min(words_per_block, words_per_row - begin)
        tiles = blocks[:, packing.block * begin : packing.block * (begin + width)]
        # [block, step of rows, step of columns, half, word of the row, row]
        tiles = tiles.view(len(blocks), packing.block // _TILE_ROWS, width // _TILE_WORDS, 2, 16, 16)
        result[:, begin : begin + width] = tiles.permute(0, 1, 3, 5, 2, 4).reshape(rows, width)
    return result.view(torch.uint8)


def _counts(checkpoint: Checkpoint, base: str) -> tuple[int, int]:
    """How many experts and parts of each there are."""
    found = [match for tail in checkpoint.expert_groups()[base] if (match := _NAME.fullmatch(tail))]
    return 1 + max(int(match[2]) for match in found), 1 + max(int(match[3]) for match in found)


def _elements(checkpoint: Checkpoint, name: str) -> int:
    if name not in checkpoint:
        raise MissingTensorError(
            f"tensor '{name}' is not in the checkpoint '{checkpoint.path}'; the conversion is incomplete, "
            "convert the model again."
        )
    return math.prod(checkpoint.info(name).shape)
