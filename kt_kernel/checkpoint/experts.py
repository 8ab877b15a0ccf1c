"""One layer's experts as addresses in the mapped checkpoint, checked tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kt_kernel.checkpoint.checks import (
    FLOATS,
    as_kernels_read,
    check_dtype,
    check_extra,
    check_one_scale_dtype,
    check_said_shape,
    check_shape,
    require_tensor,
)
from kt_kernel.checkpoint.detect import Found, require_format
from kt_kernel.checkpoint.families import NumaPartNames, PackedNames, check_expert_count
from kt_kernel.checkpoint.formats import Format
from kt_kernel.checkpoint.group_size import find_group_size
from kt_kernel.checkpoint.numa_parts import read_experts
from kt_kernel.checkpoint.packed import read_packed
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.record import BIAS, GlobalScale


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
    with checkpoint.reading(names):
        yield _reader_of(found)(checkpoint, found, num_experts, hidden, intermediate)


def _reader_of(found: Found) -> Callable[..., LayerExperts]:
    if isinstance(found.location.names, PackedNames):
        return read_packed
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
        _bias(checkpoint, row, f"{stem}.{BIAS}", n),
    )


def _scales(checkpoint: Checkpoint, row: Format, name: str, n: int, k: int, group_size: int) -> torch.Tensor:
    info = require_tensor(checkpoint, name)
    check_dtype(checkpoint, row, name, info, row.scale_dtypes)
    remark = "" if row.group_axis is None or not group_size else f" and groups of {group_size} columns"
    check_shape(checkpoint, name, info, row.scale_shape(n, k, group_size), remark)
    return as_kernels_read(row, checkpoint.view(name))


def _bias(checkpoint: Checkpoint, row: Format, name: str, n: int) -> torch.Tensor | None:
    if name not in checkpoint:
        return None
    info = checkpoint.info(name)
    check_dtype(checkpoint, row, name, info, FLOATS)
    check_shape(checkpoint, name, info, ((n,),))
    return checkpoint.view(name).float()


def _global_scale(checkpoint: Checkpoint, scalar: GlobalScale, row: Format, stem: str) -> float:
    name = f"{stem}.{scalar.suffix}"
    info = require_tensor(checkpoint, name)
    check_dtype(checkpoint, row, name, info, ("F32",))
    check_shape(checkpoint, name, info, ((), (1,)))
    return float(checkpoint.view(name).reshape(()) ** scalar.power)


def _read_numa_parts(
    checkpoint: Checkpoint, found: Found, num_experts: int, hidden: int, intermediate: int
) -> LayerExperts:
    base = found.location.base
    return read_experts(checkpoint, base, found.format.method, num_experts, hidden, intermediate)
