"""How many columns share a scale, where the format leaves that free."""

from __future__ import annotations

from kt_kernel.checkpoint.checks import require_tensor
from kt_kernel.checkpoint.detect import Found
from kt_kernel.checkpoint.quantization_config import PER_ROW, check_quantization_config
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import CheckpointError


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
    names = found.location.names
    for projection, columns in ((names.gate, hidden), (names.down, intermediate)):
        shape = require_tensor(checkpoint, f"{found.location.base}.0.{projection}.{found.scale}").shape
        groups = shape[found.format.group_axis] if len(shape) == 2 else 1
        if groups > 1:
            return max(1, columns // groups)
    return PER_ROW
