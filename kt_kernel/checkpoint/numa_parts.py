"""Experts converted for a number of NUMA nodes by the original converter: read for any number of pools.

A matrix is cut into T parts, gate and up by rows, down by columns, and each part is stored on its own:

    blk.{layer}.ffn_{gate,up,down}_exps.{expert}.numa.{part}.weight    int8, bytes in the order of AMX tiles
    blk.{layer}.ffn_{gate,up,down}_exps.{expert}.numa.{part}.scale     float32, one per row of the part

csrc/formats/numa_parts.h has the picture of the bytes. The scale of an int4 part belongs to 16 times its
codes. They become AMXINT4 and AMXINT8 as the records say, exactly: the scales of down's parts make its
groups, gate's and up's are repeated.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import CheckpointError, MissingTensorError
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.record import WHOLE_ROW

_NAME = re.compile(r"ffn_(gate|up|down)_exps\.(\d+)\.numa\.(\d+)\.(weight|scale)")


@dataclass(frozen=True)
class _Packing:
    """`block`: what both sizes of a part are multiples of. `factor`: of the stored scales."""

    method: str
    block: int
    columns_per_byte: int
    codes: torch.dtype
    factor: int
    unpack: Callable[[int, int, int, int, int], None]


_PACKINGS = (
    _Packing("AMXINT8", 64, 1, torch.int8, 1, kt_kernel_ext.unpack_numa_part_int8),
    _Packing("AMXINT4", 128, 2, torch.uint8, 16, kt_kernel_ext.unpack_numa_part_int4),
)


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
    layer.check_sizes()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        gate = pool.map(lambda expert: layer.cut_by_rows("gate", expert), range(experts))
        up = pool.map(lambda expert: layer.cut_by_rows("up", expert), range(experts))
        down = pool.map(lambda expert: layer.cut_by_columns("down", expert), range(experts))
        return LayerExperts(list(gate), list(up), list(down), layer.group_size)


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

    def check_sizes(self) -> None:
        """Raise CheckpointError unless the parts are whole blocks."""
        for size in (self.share, self.hidden):
            if size % self.packing.block:
                raise CheckpointError(
                    f"parts in '{self.checkpoint.path}' would be {self.share} x {self.hidden}, expected "
                    f"multiples of {self.packing.block} for {self.packing.method}; take the weights and the "
                    "config.json from one model."
                )

    def cut_by_rows(self, projection: str, expert: int) -> ExpertMatrix:
        codes = self._empty(self.intermediate, self.hidden)
        places = codes.chunk(self.parts)
        scales = torch.cat(self._read(projection, expert, self.hidden, places))
        return self._matrix(projection, expert, codes, scales, self.hidden)

    def cut_by_columns(self, projection: str, expert: int) -> ExpertMatrix:
        codes = self._empty(self.hidden, self.intermediate)
        places = codes.chunk(self.parts, dim=1)
        scales = torch.cat(self._read(projection, expert, self.share, places), dim=1)
        return self._matrix(projection, expert, codes, scales, self.share)

    def _empty(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns // self.packing.columns_per_byte, dtype=self.packing.codes)

    def _matrix(
        self, projection: str, expert: int, codes: torch.Tensor, scales: torch.Tensor, columns: int
    ) -> ExpertMatrix:
        """`scales` [rows, n], each for so many columns -> one for each group."""
        if self.group_size:
            scales = scales.repeat_interleave(columns // self.group_size, 1)
        return ExpertMatrix(f"{self.base}.ffn_{projection}_exps.{expert}", codes, scales.contiguous())

    def _read(
        self, projection: str, expert: int, columns: int, places: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Writes each part, of so many columns, to its place; returns their scales [rows, 1]."""
        packing, scales = self.packing, []
        for part, place in enumerate(places):
            stem = f"{self.base}.ffn_{projection}_exps.{expert}.numa.{part}"
            rows = place.shape[0]
            packed = self._tensor(f"{stem}.weight", torch.int8, place.numel())
            packing.unpack(packed.data_ptr(), rows, columns, place.data_ptr(), place.stride(0))
            scales.append(self._tensor(f"{stem}.scale", torch.float32, rows).view(rows, 1) * packing.factor)
        return scales

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
