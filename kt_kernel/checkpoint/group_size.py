"""How many columns share a scale, where the format leaves that free."""

from __future__ import annotations

from kt_kernel.checkpoint.checks import require_tensor
from kt_kernel.checkpoint.detect import Found
from kt_kernel.checkpoint.families import PackedNames
from kt_kernel.checkpoint.packed_names import packed_name
from kt_kernel.checkpoint.quantization_config import PER_ROW, check_quantization_config
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import CheckpointError
from kt_kernel.formats.shapes import Shape


def find_group_size(checkpoint: Checkpoint, found: Found, hidden: int, intermediate: int) -> int:
    """Columns that share a scale, or PER_ROW: what config.json says, or else what the scales' shapes say.

    PER_ROW too for formats whose groups have one size. Raises CheckpointError if config.json says what the
    method cannot compute, or the groups do not fit the layer.
    """
    promised = check_quantization_config(checkpoint, found.format.method)
    if found.format.group_axis is None:
        return PER_ROW
    size = _size_by_shapes(checkpoint, found, hidden, intermediate) if promised is None else promised
    for name, columns in (("hidden_size", hidden), ("moe_intermediate_size", intermediate)):
        if size != PER_ROW and columns % size:
            source = "from the shapes of its scales" if promised is None else "says its config.json"
            raise CheckpointError(
                f"'{checkpoint.path}' has scales for groups of {size} columns, {source}, but {name} is "
                f"{columns}, which they do not divide; take the weights and the config.json from one model."
            )
    return size


def _size_by_shapes(checkpoint: Checkpoint, found: Found, hidden: int, intermediate: int) -> int:
    for shape, columns in zip(_scale_shapes(checkpoint, found), (hidden, intermediate), strict=True):
        groups = shape[found.format.group_axis] if len(shape) == 2 else 1
        if groups > 1:
            return max(1, columns // groups)
    return PER_ROW


def _scale_shapes(checkpoint: Checkpoint, found: Found) -> tuple[Shape, Shape]:
    """Of one expert's gate, with or without up, and of its down."""
    base, names = found.location.base, found.location.names
    if isinstance(names, PackedNames):
        gate, down = (
            require_tensor(checkpoint, packed_name(checkpoint, f"{base}.{name}", found.scale)).shape[1:]
            for name in (names.gate_up, names.down)
        )
    else:
        gate, down = (
            require_tensor(checkpoint, f"{base}.0.{name}.{found.scale}").shape
            for name in (names.gate, names.down)
        )
    return gate, down
