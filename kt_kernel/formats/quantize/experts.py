"""One layer's unquantised experts in the layout of a checkpoint for a method, matrix by matrix."""

from __future__ import annotations

import torch

from kt_kernel.errors import InputError
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.record import WHOLE_ROW
from kt_kernel.formats.records import RECORDS

_GROUP_SIZES = (128, 64, 32, 16)


def quantize_experts(
    method: str,
    gate: list[torch.Tensor],
    up: list[torch.Tensor],
    down: list[torch.Tensor],
    group_size: int | None = None,
) -> LayerExperts:
    """gate, up [I, H] and down [H, I] of each expert, of 16 or 32 bits -> what a checkpoint would hold.

    `group_size`: columns that share a scale where the method leaves it free, a divisor of H and I, or
    WHOLE_ROW; None = the usual size of the method.

    Raises InputError for infinite or NaN weights, which no scale can represent (BF16 keeps them).
    """
    hidden, intermediate = down[0].shape
    if group_size is None:
        group_size = _group_size(method, hidden, intermediate)

    def quantised(projection: str, matrices: list[torch.Tensor]) -> list[ExpertMatrix]:
        return [
            _quantize(method, f"{projection}_proj of expert {expert}", matrix, group_size)
            for expert, matrix in enumerate(matrices)
        ]

    made = RECORDS[method].quantised_format
    return LayerExperts(
        quantised("gate", gate),
        quantised("up", up),
        quantised("down", down),
        group_size=group_size,
        formats=(made, made, made) if made else None,
    )


def _quantize(method: str, name: str, matrix: torch.Tensor, group_size: int) -> ExpertMatrix:
    quantise = RECORDS[method].quantise
    if quantise is None:  # BF16: as it is
        return ExpertMatrix(name, matrix)
    values = matrix.float()
    if not values.isfinite().all():
        raise InputError(f"{name} holds infinite or NaN weights, which method {method} cannot represent.")
    result = quantise(values, group_size)
    return ExpertMatrix(name, result.weight, result.scale, result.global_scale)


def _group_size(method: str, hidden: int, intermediate: int) -> int:
    """The usual size of the method, or the next smaller one that divides both widths, or whole rows."""
    usual = RECORDS[method].usual_group_size
    for size in _GROUP_SIZES:
        if size <= usual and hidden % size == 0 and intermediate % size == 0:
            return size
    return WHOLE_ROW
