"""One expert as bytes: what KTMoEWrapper writes for a device rank (doc/formats.md, "Copying experts out").

    buffer:  w13_weight | w13_scale | w2_weight | w2_scale | global scales, each at a multiple of 256

gate and up share w13: up's rows follow gate's (GPTQ_INT4, stored transposed: up's columns follow gate's).
Methods without scales, or without global scales, have no such part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from kt_kernel.errors import ConfigurationError
from kt_kernel.formats.record import Encoding
from kt_kernel.formats.records import RECORDS

# Page-locked memory, devices and vector loads all like it; the parts are megabytes long.
_ALIGNMENT = 256


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one part."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ExpertTensors(NamedTuple):
    """One rank's shard of one expert, as stored; the shapes are those of its `ExpertEncoding`.

    `global_scales`: float32 [3] for gate, up and down, factors of all their values (NVFP4).
    """

    w13_weight: torch.Tensor
    w13_scale: torch.Tensor | None
    w2_weight: torch.Tensor
    w2_scale: torch.Tensor | None
    global_scales: torch.Tensor | None = None

    def to(self, device: torch.device) -> ExpertTensors:
        """Copies on `device`, made in stream order; tensors that are there already stay themselves."""
        return ExpertTensors(*(part if part is None else part.to(device, non_blocking=True) for part in self))


# What is written for each method that can be read.
_ENCODINGS = {name: record.encoding for name, record in RECORDS.items() if record.encoding is not None}


@dataclass(frozen=True)
class ExpertEncoding:
    """How the experts of a layer are written for `ranks` devices.

    `hidden` and `intermediate` are the full sizes; a rank has `share` = intermediate / ranks. `group_size`
    (0 = whole rows) and `scale_dtype` are the checkpoint's where the method leaves them open. Raises
    ConfigurationError if the experts cannot be cut into that many parts, or the method is not known here.
    """

    method: str
    ranks: int
    hidden: int
    intermediate: int
    group_size: int = 0
    scale_dtype: torch.dtype | None = None
    w13_weight: TensorSpec = field(init=False)
    w13_scale: TensorSpec | None = field(init=False)
    w2_weight: TensorSpec = field(init=False)
    w2_scale: TensorSpec | None = field(init=False)
    global_scales: TensorSpec | None = field(init=False)

    def __post_init__(self) -> None:
        if self.method not in _ENCODINGS:
            raise ConfigurationError(
                f"experts of method {self.method} cannot be copied to a device; use one of "
                f"{', '.join(_ENCODINGS)}."
            )
        self._check_cut()
        share, hidden = self.share, self.hidden
        half_scales = self._scale(share, hidden)
        for name, spec in (
            ("w13_weight", self._weight(2 * share, hidden)),
            ("w13_scale", None if half_scales is None else _doubled(half_scales, self.up_follows_gate_along)),
            ("w2_weight", self._weight(hidden, share)),
            ("w2_scale", self._scale(hidden, share)),
            ("global_scales", TensorSpec((3,), torch.float32) if self._row.global_scales else None),
        ):
            object.__setattr__(self, name, spec)

    @property
    def share(self) -> int:
        """The intermediate size of one rank."""
        return self.intermediate // self.ranks

    @property
    def up_follows_gate_along(self) -> int:
        """The dimension of w13 and its scales whose first half is gate's."""
        return 1 if self._row.transposed else 0

    @property
    def is_bf16(self) -> bool:
        """See `Encoding.is_bf16`."""
        return self._row.is_bf16

    @property
    def scale_group(self) -> tuple[int, int] | None:
        """(rows, columns) of a matrix that share a scale; 0 columns = the whole row. None without scales."""
        if self._scale_dtype is None:
            return None
        return (self._row.rows_per_scale, self._columns_per_scale)

    @property
    def bytes(self) -> int:
        """Size of a buffer for one rank's shard of one expert; a multiple of the alignment."""
        return sum(_aligned(spec.bytes) for spec in self._specs if spec is not None)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(offset, bytes) of each part in a buffer; (0, 0) for one that the method does not have."""
        spans, offset = [], 0
        for spec in self._specs:
            spans.append((0, 0) if spec is None else (offset, spec.bytes))
            offset += 0 if spec is None else _aligned(spec.bytes)
        return spans

    def views(self, buffer: torch.Tensor) -> ExpertTensors:
        """The parts of a uint8 buffer of at least `bytes`."""
        return ExpertTensors(
            *(
                None if spec is None else buffer[offset : offset + size].view(spec.dtype).view(spec.shape)
                for spec, (offset, size) in zip(self._specs, self.spans, strict=True)
            )
        )

    # ---- how it is worked out -----------------------------------------------------------------

    @property
    def _row(self) -> Encoding:
        return _ENCODINGS[self.method]

    @property
    def _specs(self) -> tuple[TensorSpec | None, ...]:
        return (self.w13_weight, self.w13_scale, self.w2_weight, self.w2_scale, self.global_scales)

    @property
    def _scale_dtype(self) -> torch.dtype | None:
        return self.scale_dtype if self._row.scales_of_checkpoint else self._row.scales

    @property
    def _columns_per_scale(self) -> int:
        columns = self._row.columns_per_scale
        return self.group_size if columns is None else columns

    def _weight(self, rows: int, columns: int) -> TensorSpec:
        row = self._row
        stored = _pieces(columns, row.columns_per_code)
        return TensorSpec((stored, rows) if row.transposed else (rows, stored), row.codes)

    def _scale(self, rows: int, columns: int) -> TensorSpec | None:
        if self._scale_dtype is None:
            return None
        shape = (
            _pieces(rows, self._row.rows_per_scale),
            _pieces(columns, self._columns_per_scale or columns),
        )
        return TensorSpec(shape[::-1] if self._row.transposed else shape, self._scale_dtype)

    def _check_cut(self) -> None:
        """A rank must get whole words, and no scale of its own count may stand for two of the whole's."""
        row, size, ranks = self._row, self.intermediate, self.ranks
        if ranks == 1:
            return
        what = None
        if ranks < 1 or size % ranks:
            what = "parts of equal size"
        elif (size // ranks) % row.columns_per_code:
            what = f"whole words of {row.columns_per_code} codes"
        elif not _blocks_stay_whole(size, ranks, row.rows_per_scale) or not _blocks_stay_whole(
            size, ranks, self._columns_per_scale or size
        ):
            what = f"whole scale groups of {self.group_size or self._columns_per_scale}"
        if what is not None:
            raise ConfigurationError(
                f"{self.method} experts with an intermediate size of {size} cannot be cut for {ranks} "
                f"devices into {what}; use another number of devices."
            )


def _pieces(size: int, piece: int) -> int:
    return -(-size // piece)


def _aligned(size: int) -> int:
    return _pieces(size, _ALIGNMENT) * _ALIGNMENT


def _doubled(spec: TensorSpec, dim: int) -> TensorSpec:
    shape = list(spec.shape)
    shape[dim] *= 2
    return TensorSpec(tuple(shape), spec.dtype)


def _blocks_stay_whole(size: int, ranks: int, block: int) -> bool:
    """Does each block of a rank's own count lie in one block of the whole?"""
    share = size // ranks
    return share % block == 0 or all(
        first // block == (min(first + block, begin + share) - 1) // block
        for begin in range(0, size, share)
        for first in range(begin, begin + share, block)
    )
