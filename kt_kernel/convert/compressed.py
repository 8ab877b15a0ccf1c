"""Inputs of compressed-tensors with 4 bits and zero points, or an order of their own ("pack-quantized").

    weight_packed       int32 [N, K/8]        a word holds eight inputs of one output, codes stored plus 8
    weight_zero_point   int32 [N/8, groups]   a word holds eight outputs, stored plus 8; without: symmetric
    weight_scale        float [N, groups]     w = (code - zero point) * scale
    weight_g_idx        int32 [K]             the group of each input, where they are not neighbours

Symmetric ones with neighbouring groups are RAWINT4, which coded.py reads.
"""

from __future__ import annotations

import torch

from kt_kernel.checkpoint.checks import require_tensor
from kt_kernel.checkpoint.families import ExpertNames
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.convert.layout import LayerShape
from kt_kernel.convert.matrix import Numbers, SourceExpert, SourceMatrix
from kt_kernel.convert.words import FLOATS_OF_SCALES, IN_ORDER, PER_WORD, group_of_inputs, spread
from kt_kernel.errors import CheckpointError

COMPRESSED = "INT4_WITH_ZERO_POINTS"

_CODE_OF_ZERO = 8


def is_compressed(checkpoint: Checkpoint, stem: str) -> bool:
    """Is the matrix stored in such a way?"""
    return f"{stem}.weight_packed" in checkpoint and (
        f"{stem}.weight_zero_point" in checkpoint or f"{stem}.weight_g_idx" in checkpoint
    )


def compressed_expert(
    checkpoint: Checkpoint, base: str, names: ExpertNames, shape: LayerShape, expert: int
) -> SourceExpert:
    """Views of expert number `expert` stored under `base`. Raises CheckpointError, naming the tensor."""

    def matrix(projection: str, ours: str) -> SourceMatrix:
        return _matrix(checkpoint, f"{base}.{expert}.{projection}", *shape.matrix(ours))

    return SourceExpert(
        matrix(names.gate, "gate_proj"), matrix(names.up, "up_proj"), matrix(names.down, "down_proj")
    )


def _matrix(checkpoint: Checkpoint, stem: str, n: int, k: int) -> SourceMatrix:
    scale_shape = require_tensor(checkpoint, f"{stem}.weight_scale").shape
    groups = scale_shape[1] if len(scale_shape) == 2 else 0
    expected = {
        "weight_packed": (("I32",), (n, -(-k // PER_WORD))),
        "weight_scale": (FLOATS_OF_SCALES, (n, groups)),
        "weight_zero_point": (("I32",), (-(-n // PER_WORD), groups)),
    }
    if f"{stem}.weight_zero_point" not in checkpoint:
        del expected["weight_zero_point"]
    for suffix, (dtypes, extents) in expected.items():
        name = f"{stem}.{suffix}"
        info = require_tensor(checkpoint, name)
        if info.dtype not in dtypes or info.shape != extents or not groups or k % groups:
            raise CheckpointError(
                f"tensor '{name}' in '{checkpoint.file_of(name).path}' is {info.dtype} {list(info.shape)}, "
                f"expected {' or '.join(dtypes)} {list(extents)} for 4 bits, with groups that divide {k} "
                "inputs; take another checkpoint."
            )
    tensors = [f"{stem}.{suffix}" for suffix in expected]
    codes, scales, *zeros = (checkpoint.view(name) for name in tensors)
    group_of = None
    if f"{stem}.weight_g_idx" in checkpoint:
        tensors.append(f"{stem}.weight_g_idx")
        group_of = group_of_inputs(checkpoint, tensors[-1], k, groups)

    def rows(begin: int, end: int) -> Numbers:
        values = spread(codes[begin:end], 1, IN_ORDER)[:, :k].float()
        zero = _zero_points(zeros, begin, end, groups)
        scale = scales[begin:end].float()
        if group_of is None:
            values = values.unflatten(1, (groups, -1))
            values = values.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).flatten(1)
        else:
            values = values.sub_(zero[:, group_of]).mul_(scale[:, group_of])
        return Numbers(values.contiguous())

    parts = tuple(checkpoint.view(name) for name in tensors)
    return SourceMatrix(tensors[0], (n, k), parts, tuple(tensors), rows)


def _zero_points(zeros: list[torch.Tensor], begin: int, end: int, groups: int) -> torch.Tensor:
    """float32 [rows, groups]; `zeros` is empty for symmetric codes."""
    if not zeros:
        return torch.full((end - begin, groups), float(_CODE_OF_ZERO))
    words = slice(begin // PER_WORD, -(-end // PER_WORD))
    return spread(zeros[0][words], 0, IN_ORDER)[: end - begin].float()
