"""How tensors that hold all experts of a layer are called: `gate_up_proj`, and what stands beside it.

A record says `weight` and `weight_scale_inv`; here the first may be `gate_up_proj` or `gate_up_proj.weight`,
the second `gate_up_proj_scale_inv`, `gate_up_proj_weight_scale_inv` or `gate_up_proj.weight_scale_inv`.
"""

from __future__ import annotations

from kt_kernel.checkpoint.formats import Format
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.formats.shapes import Shape


def packed_name(checkpoint: Checkpoint, stem: str, suffix: str) -> str:
    """The full name of `stem`'s tensor for a record's `suffix`: the first that exists, or the usual one."""
    spellings = _spellings(stem, suffix)
    return next((name for name in spellings if name in checkpoint), spellings[0])


def packed_scale(checkpoint: Checkpoint, stem: str, row: Format) -> str | None:
    """The suffix of the scales that exist beside `stem`'s codes; "" for a format without, None if absent."""
    if not row.scales:
        return ""
    return next(
        (suffix for suffix in row.scales if packed_name(checkpoint, stem, suffix) in checkpoint), None
    )


def fits_packed(checkpoint: Checkpoint, stem: str, row: Format) -> bool:
    """Are the tensors of `stem` what `row` describes, by dtypes and, where these leave doubt, shapes?"""
    weight = packed_name(checkpoint, stem, row.weight)
    if weight not in checkpoint or checkpoint.info(weight).dtype not in row.weight_shapes:
        return False
    suffix = packed_scale(checkpoint, stem, row)
    if not suffix:
        return suffix is not None
    scale = checkpoint.info(packed_name(checkpoint, stem, suffix))
    codes = checkpoint.info(weight).shape[1:]
    return scale.dtype in row.scale_dtypes and (
        row.told_by(codes, scale.shape[1:]) or _told_transposed(row, codes, scale.shape[1:])
    )


def _told_transposed(row: Format, codes: Shape, scale: Shape) -> bool:
    return len(codes) == len(scale) == 2 and row.told_by(codes[::-1], scale[::-1])


def _spellings(stem: str, suffix: str) -> tuple[str, ...]:
    if suffix == "weight":
        return (stem, f"{stem}.weight")
    return tuple(
        dict.fromkeys((f"{stem}_{suffix.removeprefix('weight_')}", f"{stem}_{suffix}", f"{stem}.{suffix}"))
    )
