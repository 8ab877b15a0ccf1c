"""The tensors of a checkpoint without its experts, read and decoded one by one when transformers asks.

Quantised layers outside the experts are decoded to plain weights: all layers of a patched model but the
experts are transformers' own, in the model's dtype, on any device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from kt_kernel.checkpoint.quantization_config import check_quantization_config
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import CheckpointError
from kt_kernel.formats.dense_formats import NOT_NEEDED, REFUSED, is_part, matching_format
from kt_kernel.gguf.model import GgufModel
from kt_kernel.gguf_model.dense import DenseWeights

_EXPERTS = ".experts."

# quant_method in config.json -> the method of ours under whose name what it says is checked. Codes and scales
# alone do not show reordered columns, or how many bits a code has.
_CHECKED_AS = {"gptq": "GPTQ_INT4", "compressed-tensors": "RAWINT4", "fp8": "FP8"}


class LazyTensor:
    """A tensor that is read when it is indexed with `...`, as transformers does with the parts of files."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: object) -> torch.Tensor:
        return self._read()[index]


class DecodedTensor(LazyTensor):
    """One that is quantised in the checkpoint."""


def dense_state_dict(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Name -> tensor for everything but routed experts; each reading is a copy in memory of its own.

    Raises CheckpointError for a layer quantised in a way that cannot be decoded.
    """
    state: dict[str, LazyTensor] = {}
    quantised: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.names():
        if _EXPERTS in name:
            continue
        stem, _, part = name.rpartition(".")
        if part in REFUSED:
            raise CheckpointError(
                f"tensor '{name}' belongs to a layer with zero points or reordered inputs, which cannot be "
                "decoded; use a symmetric checkpoint without activation order."
            )
        if not is_part(part, checkpoint.view(name)):
            state[name] = LazyTensor(lambda name=name: checkpoint.view(name).clone())
        elif part not in NOT_NEEDED:
            quantised[stem].append(part)
    if quantised:
        _check_configuration(checkpoint)
    for stem, parts in quantised.items():
        state[f"{stem}.weight"] = _decoded(checkpoint, stem, parts)
    return state


def gguf_state_dict(model: GgufModel, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The same of a model in GGUF, under published names; `dtype`: what is not float32 there is decoded to.

    Raises a KTError if the model cannot be used without other files.
    """
    weights = DenseWeights(model)
    return {name: LazyTensor(lambda name=name: weights.read(name, dtype)) for name in weights.tensors}


def _check_configuration(checkpoint: Checkpoint) -> None:
    said = checkpoint.config().get("quantization_config") or {}
    method = _CHECKED_AS.get(said.get("quant_method"))
    if method is not None:
        check_quantization_config(checkpoint, method)


def _decoded(checkpoint: Checkpoint, stem: str, parts: list[str]) -> LazyTensor:
    def views() -> dict[str, torch.Tensor]:
        return {part: checkpoint.view(f"{stem}.{part}") for part in parts}

    row = matching_format(views())
    if row is None:
        held = ", ".join(
            f"{part} {str(tensor.dtype).removeprefix('torch.')}" for part, tensor in sorted(views().items())
        )
        raise CheckpointError(
            f"layer '{stem}' is quantised in a way this version cannot decode: the checkpoint holds {held}; "
            "use a checkpoint in one of the formats of doc/formats.md."
        )

    def read() -> torch.Tensor:
        try:
            return row.decode(views())
        except CheckpointError as error:
            raise CheckpointError(f"layer '{stem}': {error}") from None

    return DecodedTensor(read)
