"""Inputs of 4-bit codes with zero points or an order of their own, which no kernel multiplies as they are.

    qweight   int32   AWQ: [K, N/8], a word holds eight outputs; GPTQ: [K/8, N], a word holds eight inputs
    qzeros    int32 [groups, N/8]   each group's zero points, GPTQ's first file format stores them less 1
    scales    float [groups, N]     w = (code - zero point) * scale
    g_idx     int32 [K]             GPTQ with another order of the columns: the group of each input

Nibble p of an AWQ word is output 8j + _AWQ_ORDER[p]; GPTQ's are in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel.checkpoint.checks import require_tensor
from kt_kernel.checkpoint.families import ExpertNames
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.convert.layout import LayerShape
from kt_kernel.convert.matrix import Numbers, SourceExpert, SourceMatrix
from kt_kernel.errors import CheckpointError

AWQ, GPTQ = "AWQ", "GPTQ"

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 8
IN_ORDER = tuple(range(PER_WORD))
_PARTS = ("qweight", "qzeros", "scales")
FLOATS_OF_SCALES = ("F16", "BF16", "F32")

# AutoGPTQ's first file format stores zero points less 1, its second as they are.
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def words_kind(checkpoint: Checkpoint, stem: str) -> str | None:
    """AWQ or GPTQ if the matrix is stored in such a way; None also for symmetric GPTQ in the usual order."""
    names = [f"{stem}.{part}" for part in _PARTS]
    if not all(name in checkpoint and len(checkpoint.info(name).shape) == 2 for name in names):
        return None
    codes, _, scales = (checkpoint.info(name).shape for name in names)
    if codes[1] * PER_WORD == scales[1] and codes[1] != scales[1]:
        return AWQ
    said = _config(checkpoint)
    return GPTQ if said.get("sym") is False or said.get("desc_act") is True else None


def words_shape(
    checkpoint: Checkpoint, base: str, names: ExpertNames, layer: int, experts: int
) -> LayerShape:
    """What the scales' outputs say. Raises CheckpointError if the configuration says other codes."""
    said = _config(checkpoint)
    for key, allowed in (
        ("bits", ("4",)),
        ("w_bit", ("4",)),
        ("version", ("gemm",)),
        ("checkpoint_format", tuple(_ZERO_OFFSETS)),
    ):
        if key in said and str(said[key]).lower() not in allowed:
            raise CheckpointError(
                f"the configuration of '{checkpoint.path}' says {key}={said[key]!r}, expected "
                f"{' or '.join(allowed)}; take a checkpoint quantised that way."
            )

    def outputs(projection: str) -> int:
        return require_tensor(checkpoint, f"{base}.0.{projection}.scales").shape[-1]

    return LayerShape(layer, experts, hidden=outputs(names.down), intermediate=outputs(names.gate))


def words_expert(
    kind: str, checkpoint: Checkpoint, base: str, names: ExpertNames, shape: LayerShape, expert: int
) -> SourceExpert:
    """Views of expert number `expert` stored under `base`. Raises CheckpointError, naming the tensor."""

    def matrix(projection: str, ours: str) -> SourceMatrix:
        return _matrix(kind, checkpoint, f"{base}.{expert}.{projection}", *shape.matrix(ours))

    return SourceExpert(
        matrix(names.gate, "gate_proj"), matrix(names.up, "up_proj"), matrix(names.down, "down_proj")
    )


@dataclass(frozen=True)
class _Words:
    """The tensors of one matrix; `group_of` is None where groups are neighbouring inputs."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    group_of: torch.Tensor | None
    zero_offset: int

    def awq_rows(self, begin: int, end: int) -> Numbers:
        words = slice(begin // PER_WORD, -(-end // PER_WORD))
        return self._numbers(
            spread(self.codes[:, words], 1, _AWQ_ORDER),
            spread(self.zeros[:, words], 1, _AWQ_ORDER),
            begin,
            end,
        )

    def gptq_rows(self, begin: int, end: int) -> Numbers:
        words = slice(begin // PER_WORD, -(-end // PER_WORD))
        return self._numbers(
            spread(self.codes[:, begin:end], 0, IN_ORDER),
            spread(self.zeros[:, words], 1, IN_ORDER),
            begin,
            end,
        )

    def _numbers(self, codes: torch.Tensor, zeros: torch.Tensor, begin: int, end: int) -> Numbers:
        """Codes [K, outputs] and zero points [groups, outputs] -> rows of outputs."""
        zeros = zeros.add_(self.zero_offset).float()
        scales = self.scales[:, begin:end].float()
        if self.group_of is None:
            values = codes.float().unflatten(0, (scales.shape[0], -1))
            values = values.sub_(zeros.unsqueeze(1)).mul_(scales.unsqueeze(1)).flatten(0, 1)
        else:
            values = codes.float().sub_(zeros[self.group_of]).mul_(scales[self.group_of])
        return Numbers(values.t().contiguous())


def _matrix(kind: str, checkpoint: Checkpoint, stem: str, n: int, k: int) -> SourceMatrix:
    tensors = [f"{stem}.{part}" for part in _PARTS]
    groups = require_tensor(checkpoint, tensors[2]).shape[0]
    codes_shape = (k, n // PER_WORD) if kind == AWQ else (k // PER_WORD, n)
    for name, dtypes, extents in (
        (tensors[0], ("I32",), codes_shape),
        (tensors[1], ("I32",), (groups, n // PER_WORD)),
        (tensors[2], FLOATS_OF_SCALES, (groups, n)),
    ):
        info = require_tensor(checkpoint, name)
        if info.dtype not in dtypes or info.shape != extents or not groups or k % groups:
            raise CheckpointError(
                f"tensor '{name}' in '{checkpoint.file_of(name).path}' is {info.dtype} {list(info.shape)}, "
                f"expected {' or '.join(dtypes)} {list(extents)}, with groups that divide {k} inputs; "
                "download the checkpoint again."
            )
    group_of = None
    if kind == GPTQ and f"{stem}.g_idx" in checkpoint:
        tensors.append(f"{stem}.g_idx")
        group_of = group_of_inputs(checkpoint, tensors[-1], k, groups)
    offset = _ZERO_OFFSETS[_config(checkpoint).get("checkpoint_format", "gptq")] if kind == GPTQ else 0
    parts = tuple(checkpoint.view(name) for name in tensors)
    words = _Words(*parts[:3], group_of, offset)
    rows: Callable[[int, int], Numbers] = words.awq_rows if kind == AWQ else words.gptq_rows
    return SourceMatrix(tensors[0], (n, k), parts, tuple(tensors), rows)


def group_of_inputs(checkpoint: Checkpoint, name: str, k: int, groups: int) -> torch.Tensor:
    """int64 [K]; raises CheckpointError unless each input has a group that exists."""
    values = checkpoint.view(name).reshape(-1)
    if (
        values.dtype.is_floating_point
        or len(values) != k
        or int(values.min()) < 0
        or int(values.max()) >= groups
    ):
        raise CheckpointError(
            f"tensor '{name}' in '{checkpoint.file_of(name).path}' is {values.dtype} {list(values.shape)} "
            f"with values up to {values.max()}, expected the group, 0 to {groups - 1}, of each of {k}; "
            "download the checkpoint again."
        )
    return values.long()


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    said = checkpoint.config().get("quantization_config") or checkpoint.config("quantize_config.json")
    return said if isinstance(said, dict) else {}


def spread(words: torch.Tensor, axis: int, order: tuple[int, ...]) -> torch.Tensor:
    """int32, eight times as many along `axis`: nibble p of a word comes to place order[p]."""
    shifts = torch.tensor([4 * order.index(place) for place in range(PER_WORD)], dtype=torch.int32)
    shifts = shifts.view((-1, 1) if axis == 0 else (1, -1))
    return (words.unsqueeze(axis + 1) >> shifts).bitwise_and_(15).flatten(axis, axis + 1)
