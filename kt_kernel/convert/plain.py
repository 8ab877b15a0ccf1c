"""Inputs whose experts are bfloat16, float16 or float32, one tensor each or packed into two."""

from __future__ import annotations

import torch

from kt_kernel.checkpoint.checks import require_tensor
from kt_kernel.checkpoint.families import ExpertNames, GateUpRows, PackedNames
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.convert.layout import LayerShape
from kt_kernel.convert.matrix import Numbers, SourceExpert, SourceMatrix
from kt_kernel.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32")


def plain_expert(
    checkpoint: Checkpoint, base: str, names: ExpertNames, shape: LayerShape, expert: int
) -> SourceExpert:
    """Views of expert number `expert` stored under `base`. Raises CheckpointError, naming the tensor."""

    def matrix(projection: str, n: int, k: int) -> SourceMatrix:
        name = f"{base}.{expert}.{projection}.weight"
        _check(checkpoint, name, (n, k))
        return _matrix(name, checkpoint.view(name), (name,))

    wide = (shape.intermediate, shape.hidden)
    return SourceExpert(matrix(names.gate, *wide), matrix(names.up, *wide), matrix(names.down, *wide[::-1]))


def packed_expert(
    checkpoint: Checkpoint, base: str, names: PackedNames, shape: LayerShape, expert: int
) -> SourceExpert:
    """The same of tensors [E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H], gate's rows before up's."""
    gate_up_name, down_name = f"{base}.{names.gate_up}", f"{base}.{names.down}"
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    if names.rows is GateUpRows.ALTERNATING:
        raise CheckpointError(
            f"tensor '{gate_up_name}' in '{checkpoint.path}' holds rows of gate and up in turn, which is not "
            "converted; its experts are read as they are."
        )
    if transposed(checkpoint, base, names):
        _check(checkpoint, gate_up_name, (e, h, 2 * i))
        _check(checkpoint, down_name, (e, i, h))
        gate_up = checkpoint.view(gate_up_name)[expert]
        down = checkpoint.view(down_name)[expert]
        halves, down_rows = gate_up.t(), down.t()
    else:
        _check(checkpoint, gate_up_name, (e, 2 * i, h))
        _check(checkpoint, down_name, (e, h, i))
        halves = gate_up = checkpoint.view(gate_up_name)[expert]
        down_rows = down = checkpoint.view(down_name)[expert]
    name = f"{gate_up_name}, expert {expert}"
    return SourceExpert(
        gate=_matrix(name, halves[:i], (gate_up_name,), (gate_up,)),
        up=_matrix(name, halves[i:], (gate_up_name,), ()),  # its bytes count with those of gate
        down=_matrix(f"{down_name}, expert {expert}", down_rows, (down_name,), (down,)),
    )


def packed_shape(checkpoint: Checkpoint, base: str, names: PackedNames, layer: int) -> LayerShape:
    """What the two tensors' own shapes say. Raises CheckpointError unless they fit each other."""
    gate_up = require_tensor(checkpoint, f"{base}.{names.gate_up}").shape
    down = require_tensor(checkpoint, f"{base}.{names.down}").shape
    if len(gate_up) == len(down) == 3 and gate_up[0] == down[0]:
        e, h, i = down
        if gate_up == (e, 2 * i, h):
            return LayerShape(layer, e, h, i)
        if gate_up == (e, i, 2 * h):
            return LayerShape(layer, e, i, h)
    raise CheckpointError(
        f"'{base}.{names.gate_up}' in '{checkpoint.path}' has shape {list(gate_up)} and '{names.down}' "
        f"{list(down)}, expected [E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H]; download the "
        "checkpoint again."
    )


def transposed(checkpoint: Checkpoint, base: str, names: PackedNames) -> bool:
    """Are inputs the rows, as in models whose experts are one batched product?"""
    gate_up = checkpoint.info(f"{base}.{names.gate_up}").shape
    _, h, i = checkpoint.info(f"{base}.{names.down}").shape
    return gate_up[1:] != (2 * i, h)


def _matrix(
    name: str, view: torch.Tensor, tensors: tuple[str, ...], parts: tuple[torch.Tensor, ...] | None = None
) -> SourceMatrix:
    def rows(begin: int, end: int) -> Numbers:
        return Numbers(view[begin:end].contiguous())

    return SourceMatrix(name, tuple(view.shape), (view,) if parts is None else parts, tensors, rows)


def _check(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    info = require_tensor(checkpoint, name)
    where = f"tensor '{name}' in '{checkpoint.file_of(name).path}'"
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{where} has dtype {info.dtype}, expected {' or '.join(FLOATS)} as the layer's first tensor; "
            "all experts of a layer must be stored alike."
        )
    if info.shape != shape:
        raise CheckpointError(
            f"{where} has shape {list(info.shape)}, expected {list(shape)} as the layer's other experts; "
            "download the checkpoint again."
        )
