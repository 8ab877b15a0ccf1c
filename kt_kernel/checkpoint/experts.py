"""One layer's experts as addresses in the mapped checkpoint, checked tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kt_kernel.checkpoint.checks import (
    check_dtype,
    check_extra,
    check_one_scale_dtype,
    check_said_shape,
    check_shape,
    require_tensor,
    wrong_expert_count,
)
from kt_kernel.checkpoint.detect import Found, require_format
from kt_kernel.checkpoint.families import NumaPartNames, PackedNames, check_expert_count
from kt_kernel.checkpoint.formats import Format
from kt_kernel.checkpoint.group_size import find_group_size
from kt_kernel.checkpoint.numa_parts import read_experts
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.record import GlobalScale
from kt_kernel.formats.records import RECORDS


@contextmanager
def layer_experts(
    checkpoint: Checkpoint, layer_idx: int, method: str, *, num_experts: int, hidden: int, intermediate: int
) -> Iterator[LayerExperts]:
    """Views of one layer's experts, valid inside the `with` block; their pages are given back at its end.

    Raises MissingTensorError or CheckpointError, naming the tensor, if the layer is not stored as `method`
    reads it or anything is absent or of another dtype or shape.
    """
    found = require_format(checkpoint, layer_idx, method)
    names = _tensor_names(checkpoint, found)
    checkpoint.will_need(names)
    try:
        yield _reader_of(found)(checkpoint, found, num_experts, hidden, intermediate)
    finally:
        checkpoint.drop_pages(names)


def _reader_of(found: Found) -> Callable[..., LayerExperts]:
    if isinstance(found.location.names, PackedNames):
        return _read_packed
    if isinstance(found.location.names, NumaPartNames):
        return _read_numa_parts
    return _read_one_by_one


def _tensor_names(checkpoint: Checkpoint, found: Found) -> list[str]:
    base = found.location.base
    return [f"{base}.{tail}" for tail in checkpoint.expert_groups()[base]]


def _read_one_by_one(
    checkpoint: Checkpoint, found: Found, num_experts: int, hidden: int, intermediate: int
) -> LayerExperts:
    base, names = found.location.base, found.location.names
    check_expert_count(checkpoint, base, num_experts)
    group_size = find_group_size(checkpoint, found, hidden, intermediate)
    experts = LayerExperts(group_size=group_size)
    for expert in range(num_experts):
        for projection, n, k, matrices in (
            (names.gate, intermediate, hidden, experts.gate),
            (names.up, intermediate, hidden, experts.up),
            (names.down, hidden, intermediate, experts.down),
        ):
            matrices.append(_matrix(checkpoint, found, f"{base}.{expert}.{projection}", n, k, group_size))
    check_one_scale_dtype(checkpoint, experts)
    return experts


def _matrix(checkpoint: Checkpoint, found: Found, stem: str, n: int, k: int, group_size: int) -> ExpertMatrix:
    row = found.format
    weight = f"{stem}.{row.weight}"
    info = require_tensor(checkpoint, weight)
    check_dtype(checkpoint, row, weight, info, tuple(row.weight_shapes))
    check_shape(checkpoint, weight, info, row.weight_shapes[info.dtype](n, k, group_size))
    for extra in row.extras:
        check_extra(checkpoint, row, f"{stem}.{extra.suffix}", extra)
    check_said_shape(checkpoint, f"{stem}.weight_shape", (n, k))
    return ExpertMatrix(
        weight,
        checkpoint.view(weight),
        _scales(checkpoint, row, f"{stem}.{found.scale}", n, k, group_size) if row.scales else None,
        _global_scale(checkpoint, row.global_scale, row, stem) if row.global_scale else 1.0,
    )


def _scales(checkpoint: Checkpoint, row: Format, name: str, n: int, k: int, group_size: int) -> torch.Tensor:
    info = require_tensor(checkpoint, name)
    check_dtype(checkpoint, row, name, info, row.scale_dtypes)
    remark = "" if row.group_axis is None or not group_size else f" and groups of {group_size} columns"
    check_shape(checkpoint, name, info, row.scale_shape(n, k, group_size), remark)
    scale = checkpoint.view(name)
    # Powers of two where the kernels take numbers, as of float8 blocks: float32 holds them exactly.
    as_numbers = info.dtype == "F8_E8M0" and RECORDS[row.method].encoding.scales is torch.float32
    return scale.float() if as_numbers else scale


def _global_scale(checkpoint: Checkpoint, scalar: GlobalScale, row: Format, stem: str) -> float:
    name = f"{stem}.{scalar.suffix}"
    info = require_tensor(checkpoint, name)
    check_dtype(checkpoint, row, name, info, ("F32",))
    check_shape(checkpoint, name, info, ((), (1,)))
    return float(checkpoint.view(name).reshape(()) ** scalar.power)


def _read_packed(
    checkpoint: Checkpoint, found: Found, num_experts: int, hidden: int, intermediate: int
) -> LayerExperts:
    """Plain bfloat16: the only way in which experts are read from one tensor."""
    base, names = found.location.base, found.location.names
    gate_up_name, down_name = f"{base}.{names.gate_up}", f"{base}.{names.down}"
    for name, shape in (
        (gate_up_name, (num_experts, 2 * intermediate, hidden)),
        (down_name, (num_experts, hidden, intermediate)),
    ):
        info = require_tensor(checkpoint, name)
        if len(info.shape) == 3 and info.shape[0] != num_experts:
            raise wrong_expert_count(checkpoint, base, in_file=info.shape[0], num_experts=num_experts)
        check_dtype(checkpoint, found.format, name, info, ("BF16",))
        check_shape(checkpoint, name, info, (shape,))
    gate_up, down = checkpoint.view(gate_up_name), checkpoint.view(down_name)
    return LayerExperts(
        gate=[ExpertMatrix(gate_up_name, matrix) for matrix in gate_up[:, :intermediate].unbind()],
        up=[ExpertMatrix(gate_up_name, matrix) for matrix in gate_up[:, intermediate:].unbind()],
        down=[ExpertMatrix(down_name, matrix) for matrix in down.unbind()],
    )


def _read_numa_parts(
    checkpoint: Checkpoint, found: Found, num_experts: int, hidden: int, intermediate: int
) -> LayerExperts:
    base = found.location.base
    return read_experts(checkpoint, base, found.format.method, num_experts, hidden, intermediate)
