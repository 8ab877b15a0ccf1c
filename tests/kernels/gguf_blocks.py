"""Matrices of GGUF types as a file holds them: blocks with codes and scales, and the numbers that the gguf
package reads in them. What formats.py is for the other methods.

    format = GgufFormat("Q4_K")
    matrix = format.random_matrix(rng, experts, rows, columns)    blocks of random codes and scales
    matrix.decoded(expert)                                        float64 [rows, columns], by gguf.quants
    exact_q8_0(values)                                            blocks that hold exactly these numbers

Types that layers keep as panels of integers (PANEL_TYPES), multiplied by int8 activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from formats import F32
from gguf import GGMLQuantizationType, quants

GGUF_METHOD = "LLAMAFILE"


@dataclass(frozen=True)
class BlockType:
    """Columns and bytes of a block; where its fp16 scale and its fp16 minimum (or scale of minimums) stand,
    and the largest code, whose half a minimum takes off; `exponent` is the place of a power of two instead.
    """

    columns: int
    bytes: int
    scale: int | None
    minimum: int | None = None
    largest: int = 0
    exponent: int | None = None
    group: int = 32


PANEL_TYPES = {
    "Q8_0": BlockType(32, 34, 0),
    "Q4_0": BlockType(32, 18, 0),
    "Q4_1": BlockType(32, 20, 0, 2, largest=-15),
    "Q5_0": BlockType(32, 22, 0),
    "Q5_1": BlockType(32, 24, 0, 2, largest=-31),
    "Q2_K": BlockType(256, 84, 80, 82, largest=3, group=16),
    "Q3_K": BlockType(256, 110, 108, group=16),
    "Q4_K": BlockType(256, 144, 0, 2, largest=15),
    "Q5_K": BlockType(256, 176, 0, 2, largest=31),
    "Q6_K": BlockType(256, 210, 208, group=16),
    "IQ4_NL": BlockType(32, 18, 0),
    "IQ4_XS": BlockType(256, 136, 0),
    "MXFP4": BlockType(32, 17, None, exponent=0),
}


def decode_blocks(type: str, blocks: np.ndarray) -> np.ndarray:
    """[..., bytes of a row] of a type -> float32 numbers as the gguf package reads them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return quants.dequantize(blocks, GGMLQuantizationType[type])


@dataclass(frozen=True)
class GgufFormat:
    """A panel type, and what its layer multiplies it with."""

    type: str
    activations: str = "int8"
    method: str = GGUF_METHOD
    group: int = 0
    scale_dtype: int = F32

    def __str__(self) -> str:
        return self.type

    @property
    def codes(self) -> str:
        """As in formats.py: e2m1 codes are halves."""
        return "e2m1" if self.type == "MXFP4" else "int8"

    @property
    def block(self) -> BlockType:
        return PANEL_TYPES[self.type]

    def fit(self, size: int) -> int:
        """`size` rounded up to a number of columns that the type can have."""
        return -(-size // self.block.columns) * self.block.columns

    def random_matrix(
        self, rng: np.random.Generator, experts: int, rows: int, columns: int, variance: float = 0.0
    ) -> GgufMatrix:
        """Random codes and scales; weights of about this variance, by default 1/columns."""
        size = np.sqrt(variance or 1 / columns) / self._deviation()
        blocks = self._random_blocks(rng, experts, rows, columns)
        spread = np.exp2(rng.uniform(-1, 1, blocks.shape[:-1]))
        return self._scaled(blocks, spread * size)

    def integer_matrix(self, rng: np.random.Generator, experts: int, rows: int, columns: int) -> GgufMatrix:
        """Random codes under scales of 1/2 or 1 times whole numbers: multiples of 1/2, of MXFP4 1/4."""
        blocks = self._random_blocks(rng, experts, rows, columns)
        # Sums of the largest of these would leave fp32.
        if self.type == "Q6_K":
            small = rng.integers(-9, 10, (*blocks.shape[:-1], 16)).astype(np.int8)
            blocks[..., 192:208] = small.view(np.uint8)
        if self.type == "IQ4_XS":
            blocks[..., 2:4] = 0xAA  # the high two bits of scales, which are 0 to 3 then
            blocks[..., 4:8] &= 0x33
        return self._scaled(blocks, rng.choice([0.5, 1.0], blocks.shape[:-1]), whole=True)

    def _random_blocks(self, rng, experts: int, rows: int, columns: int) -> np.ndarray:
        """uint8 [experts, rows, blocks, bytes]."""
        assert columns % self.block.columns == 0, (self.type, columns)
        shape = (experts, rows, columns // self.block.columns, self.block.bytes)
        return rng.integers(0, 256, shape, dtype=np.uint8)

    def _scaled(self, blocks: np.ndarray, scales: np.ndarray, whole: bool = False) -> GgufMatrix:
        """Blocks with these scales; minimums take half of the largest code off, so that numbers of either
        sign are as many."""
        kind = self.block
        if kind.exponent is not None:
            blocks[..., kind.exponent] = np.clip(np.round(np.log2(scales)) + 127, 1, 254)
        else:
            blocks[..., kind.scale : kind.scale + 2] = _halves(scales)
        if kind.minimum is not None:
            halved = scales * kind.largest / 2
            blocks[..., kind.minimum : kind.minimum + 2] = _halves(
                np.round(2 * halved) / 2 if whole else halved
            )
        experts, rows = blocks.shape[:2]
        columns = blocks.shape[2] * kind.columns
        return GgufMatrix(self, columns, np.ascontiguousarray(blocks.reshape(experts, rows, -1)))

    def _deviation(self) -> float:
        """Of the numbers of random blocks with scales of 1."""
        rng = np.random.default_rng(0)
        blocks = self._random_blocks(rng, 1, 64, 2 * self.block.columns)
        sample = self._scaled(blocks, np.ones(blocks.shape[:-1]))
        return float(sample.decoded(0).std())


def _halves(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype(np.float16))[..., None].view(np.uint8)


@dataclass
class GgufMatrix:
    """One projection of all experts: weight uint8 [experts, rows, bytes of a row]."""

    format: GgufFormat
    columns: int
    weight: np.ndarray
    scale: None = None

    @property
    def rows(self) -> int:
        return self.weight.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.weight), self.rows, self.columns

    def numbers(self, expert: int) -> np.ndarray:
        """float32 [rows, columns]."""
        return decode_blocks(self.format.type, self.weight[expert])

    def decoded(self, expert: int) -> np.ndarray:
        return self.numbers(expert).astype(np.float64)

    def pointers(self) -> list[tuple[int, int, float]]:
        return [(weight.ctypes.data, 0, 1.0) for weight in self.weight]

    def tensors(self) -> list[np.ndarray]:
        return [*self.weight]


def exact_q8_0(values: np.ndarray) -> GgufMatrix:
    """`values` [E, rows, columns], those of each 32 columns whole multiples of one power of two, up to 63."""
    experts, rows, columns = values.shape
    blocks = np.asarray(values, np.float64).reshape(experts, rows, columns // 32, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    scales = np.exp2(np.ceil(np.log2(np.where(largest > 0, largest, 1) / 127)))
    codes = blocks / scales
    assert np.array_equal(codes, np.round(codes))
    assert np.abs(codes).max() <= 127
    stored = [_halves(scales[..., 0]), codes.astype(np.int8).view(np.uint8)]
    weight = np.concatenate(stored, axis=-1).reshape(experts, rows, -1)
    return GgufMatrix(GgufFormat("Q8_0"), columns, weight)
