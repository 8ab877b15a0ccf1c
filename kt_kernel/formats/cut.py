"""A share of a layer's experts (kt_kernel/cpu_share.py) from all of them, as checkpoints store them.

Rows of gate and up are parts of the mapped file; columns of down are no run of bytes, and are copied while
the layer loads. A cut falls between whole blocks of codes and scales. Where the size of a group is free, a
cut inside of one repeats the group's scale: the same numbers in smaller groups.
"""

from __future__ import annotations

import math

import torch

from kt_kernel.cpu_share import CpuShare
from kt_kernel.errors import ConfigurationError
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.record import WHOLE_ROW, Encoding
from kt_kernel.formats.records import RECORDS
from kt_kernel.gguf.types import TYPES_BY_NAME

# Rows of a panel, and the most columns of down that share a scale of rounded activations: a part that begins
# at a multiple of it rounds what the whole would.
PANEL_COLUMNS = 32
_LARGEST_GGUF_BLOCK = 256  # of the K- and IQ-types


def unit_of(method: str) -> int:
    """Good places to cut experts of this method: its multiples."""
    if RECORDS[method].computes_from_files:
        return _LARGEST_GGUF_BLOCK
    return math.lcm(PANEL_COLUMNS, _block(_encoding(method)))


def cut(experts: LayerExperts, method: str, share: CpuShare) -> LayerExperts:
    """The experts' `share`; views where they can be. Raises ConfigurationError if a block would be cut."""
    if share.is_whole:
        return experts
    encoding = _encoding(method)
    block = _block(encoding) if experts.formats is None else TYPES_BY_NAME[experts.formats[2]].columns
    if share.begin % block or (share.end % block and share.end != share.whole):
        raise ConfigurationError(
            f"{method} experts cannot be cut from {share.begin} to {share.end}: their blocks have {block} "
            "rows or columns; use multiples of that."
        )
    return _Cut(encoding, share, experts.group_size).layer(experts)


def _encoding(method: str) -> Encoding:
    encoding = RECORDS[method].encoding
    assert encoding is not None, method
    return encoding


def _block(encoding: Encoding) -> int:
    """What is never cut, where the format says it."""
    return math.lcm(encoding.columns_per_code, encoding.rows_per_scale, encoding.columns_per_scale or 1)


class _Cut:
    def __init__(self, encoding: Encoding, share: CpuShare, group_size: int) -> None:
        self._encoding = encoding
        self._share = share
        self._group = group_size
        # Of whole rows nothing is cut; what is fixed by the format is a divisor of the share's unit.
        self._finer = math.gcd(group_size, share.begin, share.end) if group_size else WHOLE_ROW

    def layer(self, experts: LayerExperts) -> LayerExperts:
        return LayerExperts(
            [self._rows(matrix) for matrix in experts.gate],
            [self._rows(matrix) for matrix in experts.up],
            [self._columns(matrix) for matrix in experts.down],
            self._finer,
            experts.formats,
        )

    def _rows(self, matrix: ExpertMatrix) -> ExpertMatrix:
        axis = 1 if self._encoding.transposed else 0
        scale = self._regrouped(matrix.scale)
        if scale is not None:
            rows = min(axis, scale.ndim - 1)
            scale = self._part(scale, rows, self._encoding.rows_per_scale)
        bias = None if matrix.bias is None else self._part(matrix.bias, 0, 1)
        return ExpertMatrix(matrix.name, self._part(matrix.weight, axis, 1), scale, matrix.global_scale, bias)

    def _columns(self, matrix: ExpertMatrix) -> ExpertMatrix:
        axis = 0 if self._encoding.transposed else 1
        scale = self._regrouped(matrix.scale)
        if scale is not None and scale.ndim > 1 and (columns := self._columns_per_scale):
            scale = self._part(scale, axis, columns)
        return ExpertMatrix(
            matrix.name,
            self._codes(matrix.weight, axis),
            scale,
            matrix.global_scale,
            matrix.bias if self._share.adds_biases else None,
        )

    @property
    def _columns_per_scale(self) -> int:
        fixed = self._encoding.columns_per_scale
        return self._finer if fixed is None else fixed

    def _codes(self, codes: torch.Tensor, axis: int) -> torch.Tensor:
        """Elements of the storage hold several columns, or, of GGUF, blocks of columns hold several bytes."""
        share, stored = self._share, codes.shape[axis]
        first, last = (edge * stored // share.whole for edge in (share.begin, share.end))
        return codes.narrow(axis, first, last - first).contiguous()

    def _part(self, tensor: torch.Tensor, axis: int, unit: int) -> torch.Tensor:
        """Of a dimension with an element for every `unit` rows or columns, the last of them perhaps fewer."""
        first, last = self._share.begin // unit, -(-self._share.end // unit)
        return tensor.narrow(axis, first, last - first).contiguous()

    def _regrouped(self, scale: torch.Tensor | None) -> torch.Tensor | None:
        if scale is None or scale.ndim < 2 or self._finer == self._group:
            return scale
        axis = 0 if self._encoding.transposed else 1
        return scale.repeat_interleave(self._group // self._finer, axis)
