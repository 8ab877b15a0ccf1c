"""The experts of a layer from tensors that hold all of them.

    gate_up_proj          [E, 2 I, H]           down_proj          [E, H, I]          Qwen3.5
    gate_up_proj          [E, H, 2 I]           down_proj          [E, I, H]          Llama-4, gpt-oss in bf16
    gate_up_proj_blocks   [E, 2 I, H/32, 16]    down_proj_blocks   [E, H, I/32, 16]   gpt-oss in MXFP4
    gate_up_proj_scales   [E, 2 I, H/32]        down_proj_scales   [E, H, I/32]
    gate_up_proj_bias     [E, 2 I]              down_proj_bias     [E, H]
    gate_proj, up_proj    [E, I, H]             down_proj          [E, H, I]          Step-3.5

Scales have the shapes of the format's record, behind E; gate and up must not share one. What stands in
another order than the kernels read, transposed or with alternating rows, is copied: the layer once more,
while it loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kt_kernel.checkpoint.checks import (
    FLOATS,
    as_kernels_read,
    check_dtype,
    check_extra,
    check_one_scale_dtype,
    check_shape,
    require_tensor,
    wrong_expert_count,
)
from kt_kernel.checkpoint.detect import Found
from kt_kernel.checkpoint.families import GateUpRows
from kt_kernel.checkpoint.group_size import find_group_size
from kt_kernel.checkpoint.packed_names import packed_name
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import CheckpointError
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.record import BIAS
from kt_kernel.formats.records import RECORDS
from kt_kernel.formats.shapes import Shape


def read_packed(
    checkpoint: Checkpoint, found: Found, num_experts: int, hidden: int, intermediate: int
) -> LayerExperts:
    """One layer's experts; raises MissingTensorError or CheckpointError, naming the tensor."""
    return _PackedLayer(checkpoint, found, num_experts, hidden, intermediate).read()


@dataclass(frozen=True)
class _Stack:
    """The matrices of all experts side by side; each tensor's first dimension counts them."""

    name: str
    weight: torch.Tensor
    scale: torch.Tensor | None
    global_scale: list[float]
    bias: torch.Tensor | None

    def matrices(self) -> list[ExpertMatrix]:
        nothing = [None] * len(self.weight)
        return [
            ExpertMatrix(self.name, *parts)
            for parts in zip(
                _each(self.weight),
                nothing if self.scale is None else _each(self.scale),
                self.global_scale,
                nothing if self.bias is None else _each(self.bias.float()),
                strict=True,
            )
        ]


def _each(stack: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous parts: half of a layer is not contiguous, but half of an expert is, and is not copied."""
    return [part.contiguous() for part in stack.unbind()]


class _PackedLayer:
    def __init__(
        self, checkpoint: Checkpoint, found: Found, num_experts: int, hidden: int, intermediate: int
    ) -> None:
        self._checkpoint = checkpoint
        self._found = found
        self._row = found.format
        self._encoding = RECORDS[self._row.method].encoding
        self._num_experts = num_experts
        self._hidden = hidden
        self._intermediate = intermediate
        self._group_size = find_group_size(checkpoint, found, hidden, intermediate)
        base, names = found.location.base, found.location.names
        # stem, rows and columns
        self._gate_up = (f"{base}.{names.gate_up}", intermediate if names.up else 2 * intermediate, hidden)
        self._up = (f"{base}.{names.up}", intermediate, hidden)
        self._down = (f"{base}.{names.down}", hidden, intermediate)
        self._is_transposed = self._fits_transposed()

    def read(self) -> LayerExperts:
        if self._found.location.names.up:
            gate, up = self._stack(*self._gate_up), self._stack(*self._up)
        else:
            gate, up = self._halves(self._stack(*self._gate_up))
        down = self._stack(*self._down)
        experts = LayerExperts(gate.matrices(), up.matrices(), down.matrices(), group_size=self._group_size)
        check_one_scale_dtype(self._checkpoint, experts)
        return experts

    # ---- tensors -----------------------------------------------------------------------------

    def _stack(self, stem: str, n: int, k: int) -> _Stack:
        row, group = self._row, self._group_size
        name = packed_name(self._checkpoint, stem, row.weight)
        info = require_tensor(self._checkpoint, name)
        check_dtype(self._checkpoint, row, name, info, tuple(row.weight_shapes))
        for extra in row.extras:
            check_extra(self._checkpoint, row, packed_name(self._checkpoint, stem, extra.suffix), extra)
        weight = self._view(name, row.weight_shapes[info.dtype](n, k, group))
        return _Stack(
            name,
            weight.flatten(2) if weight.ndim == 4 else weight,
            self._scales(stem, row.scale_shape(n, k, group)) if row.scales else None,
            self._global_scales(stem),
            self._bias(stem, n),
        )

    def _scales(self, stem: str, shapes: tuple[Shape, ...]) -> torch.Tensor:
        name = packed_name(self._checkpoint, stem, self._found.scale)
        info = require_tensor(self._checkpoint, name)
        check_dtype(self._checkpoint, self._row, name, info, self._row.scale_dtypes)
        return as_kernels_read(self._row, self._view(name, shapes))

    def _global_scales(self, stem: str) -> list[float]:
        scalar = self._row.global_scale
        if scalar is None:
            return [1.0] * self._num_experts
        name = packed_name(self._checkpoint, stem, scalar.suffix)
        info = require_tensor(self._checkpoint, name)
        check_dtype(self._checkpoint, self._row, name, info, ("F32",))
        count = self._num_experts
        check_shape(self._checkpoint, name, info, ((count,), (count, 1), (count, 1, 1), (), (1,)))
        values = self._checkpoint.view(name).reshape(-1) ** scalar.power
        return values.expand(count).tolist()

    def _bias(self, stem: str, n: int) -> torch.Tensor | None:
        name = packed_name(self._checkpoint, stem, BIAS)
        if name not in self._checkpoint:
            return None
        info = self._checkpoint.info(name)
        check_dtype(self._checkpoint, self._row, name, info, FLOATS)
        check_shape(self._checkpoint, name, info, ((self._num_experts, n),))
        return self._checkpoint.view(name)

    def _view(self, name: str, shapes: tuple[Shape, ...]) -> torch.Tensor:
        """[E, ...] as one of `shapes` says, transposed where the layer is."""
        info = self._checkpoint.info(name)
        if info.shape[:1] != (self._num_experts,) and len(info.shape) > 1:
            raise wrong_expert_count(
                self._checkpoint,
                self._found.location.base,
                in_file=info.shape[0],
                num_experts=self._num_experts,
            )
        stored = tuple(shape[::-1] for shape in shapes) if self._is_transposed else shapes
        check_shape(self._checkpoint, name, info, tuple((self._num_experts, *shape) for shape in stored))
        view = self._checkpoint.view(name)
        return view.transpose(1, 2) if self._is_transposed and view.ndim == 3 else view

    # ---- orders ------------------------------------------------------------------------------

    def _fits_transposed(self) -> bool:
        """Are the matrices stored [columns, rows]? Only where a code is an element of its own, and scales
        cover what the format says."""
        if self._encoding.columns_per_code > 1 or self._row.group_axis is not None:
            return False
        plain, transposed = (
            all(self._shape_of(stem) == shape for stem, shape in shapes)
            for shapes in (
                [(stem, (n, k)) for stem, n, k in (self._gate_up, self._down)],
                [(stem, (k, n)) for stem, n, k in (self._gate_up, self._down)],
            )
        )
        return transposed and not plain

    def _shape_of(self, stem: str) -> Shape:
        name = packed_name(self._checkpoint, stem, self._row.weight)
        return require_tensor(self._checkpoint, name).shape[1:]

    def _check_scales_apart(self, name: str) -> None:
        rows = self._encoding.rows_per_scale
        alternating = self._found.location.names.rows is GateUpRows.ALTERNATING
        if rows > 1 and (alternating or self._intermediate % rows):
            raise CheckpointError(
                f"'{name}' in '{self._checkpoint.path}' holds gate and up of {self._intermediate} rows each, "
                f"{'in turn' if alternating else 'one below the other'}, and a scale covers {rows} rows, of "
                "both; take a checkpoint that stores them apart."
            )

    def _halves(self, both: _Stack) -> tuple[_Stack, _Stack]:
        """gate's part and up's of the rows; GPTQ has them in the last dimension."""
        self._check_scales_apart(both.name)
        dimension = 2 if self._encoding.transposed else 1

        def half(tensor: torch.Tensor | None, dimension: int, which: int) -> torch.Tensor | None:
            if tensor is None:
                return None
            if self._found.location.names.rows is GateUpRows.ALTERNATING:
                return tensor.unflatten(dimension, (-1, 2)).select(dimension + 1, which)
            return tensor.chunk(2, dim=dimension)[which]

        gate, up = (
            _Stack(
                both.name,
                half(both.weight, dimension, which),
                half(both.scale, dimension if both.scale is not None and both.scale.ndim == 3 else 1, which),
                both.global_scale,
                half(both.bias, 1, which),
            )
            for which in (0, 1)
        )
        return gate, up
