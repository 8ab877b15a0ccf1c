"""AWQ inputs: 4-bit codes with zero points, packed along the outputs.

qweight   int32 [K, N/8]   a word holds eight outputs of one input; nibble p is output 8j + _ORDER[p]
qzeros    int32 [K/g, N/8] the same of each group's zero points
scales    float [K/g, N]   w = (code - zero point) * scale
"""

from __future__ import annotations

import torch

from kt_kernel.checkpoint.checks import require_tensor
from kt_kernel.checkpoint.families import ExpertNames
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.convert.layout import LayerShape
from kt_kernel.convert.matrix import Numbers, SourceExpert, SourceMatrix
from kt_kernel.errors import CheckpointError
from kt_kernel.formats.values import nibbles

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE_OF = [_ORDER.index(output) for output in range(8)]
_PER_WORD = 8
_PARTS = ("qweight", "qzeros", "scales")


def is_awq(checkpoint: Checkpoint, stem: str) -> bool:
    """GPTQ has the same names, and words along the inputs."""
    names = [f"{stem}.{part}" for part in _PARTS]
    if not all(name in checkpoint and len(checkpoint.info(name).shape) == 2 for name in names):
        return False
    codes, _, scales = (checkpoint.info(name).shape for name in names)
    return codes[1] * _PER_WORD == scales[1] and codes[1] != scales[1]


def awq_shape(checkpoint: Checkpoint, base: str, names: ExpertNames, layer: int, experts: int) -> LayerShape:
    """What the scales' outputs say. Raises CheckpointError if the configuration says other codes."""
    said = checkpoint.config().get("quantization_config") or {}
    for key, expected in (("bits", 4), ("w_bit", 4), ("version", "gemm")):
        if str(said.get(key, expected)).lower() != str(expected):
            raise CheckpointError(
                f"the config.json of '{checkpoint.path}' says {key}={said[key]!r}, expected {expected!r}, "
                "the AWQ files that can be read; take a checkpoint quantised that way."
            )

    def outputs(projection: str) -> int:
        return require_tensor(checkpoint, f"{base}.0.{projection}.scales").shape[-1]

    return LayerShape(layer, experts, hidden=outputs(names.down), intermediate=outputs(names.gate))


def awq_expert(
    checkpoint: Checkpoint, base: str, names: ExpertNames, shape: LayerShape, expert: int
) -> SourceExpert:
    """Views of expert number `expert` stored under `base`. Raises CheckpointError, naming the tensor."""

    def matrix(projection: str, ours: str) -> SourceMatrix:
        return _matrix(checkpoint, f"{base}.{expert}.{projection}", *shape.matrix(ours))

    return SourceExpert(
        matrix(names.gate, "gate_proj"), matrix(names.up, "up_proj"), matrix(names.down, "down_proj")
    )


def _matrix(checkpoint: Checkpoint, stem: str, n: int, k: int) -> SourceMatrix:
    tensors = tuple(f"{stem}.{part}" for part in _PARTS)
    groups = require_tensor(checkpoint, tensors[2]).shape[0]
    for name, dtypes, extents in (
        (tensors[0], ("I32",), (k, n // _PER_WORD)),
        (tensors[1], ("I32",), (groups, n // _PER_WORD)),
        (tensors[2], ("F16", "BF16", "F32"), (groups, n)),
    ):
        info = require_tensor(checkpoint, name)
        if info.dtype not in dtypes or info.shape != extents or not groups or k % groups:
            raise CheckpointError(
                f"tensor '{name}' in '{checkpoint.file_of(name).path}' is {info.dtype} {list(info.shape)}, "
                f"expected {' or '.join(dtypes)} {list(extents)}, with groups that divide {k} inputs; "
                "download the checkpoint again."
            )
    codes, zeros, scales = (checkpoint.view(name) for name in tensors)

    def rows(begin: int, end: int) -> Numbers:
        words = slice(begin // _PER_WORD, end // _PER_WORD)
        values = _outputs(codes[:, words]).unflatten(0, (groups, -1))  # [groups, inputs of a group, outputs]
        values = values.sub_(_outputs(zeros[:, words]).unsqueeze(1))
        values = values.mul_(scales[:, begin:end].float().unsqueeze(1))
        return Numbers(values.flatten(0, 1).t().contiguous())

    return SourceMatrix(tensors[0], (n, k), (codes, zeros, scales), tensors, rows)


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, words] -> float32 [rows, 8 * words], in the outputs' order."""
    return nibbles(words).unflatten(1, (-1, _PER_WORD))[..., _NIBBLE_OF].flatten(1).float()
