"""One layer of quantised experts written as a checkpoint for its method would hold it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from kt_kernel.checkpoint.families import LAYER_PREFIXES, PUBLISHED
from kt_kernel.errors import CheckpointPathError
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.record import MethodRecord, Storage


def save_layer(directory: str, layer_idx: int, method: MethodRecord, experts: LayerExperts) -> Path:
    """Writes `model-layer-NNNNN.safetensors` into `directory`, which is made, replacing what is there.

    The directory can be the `weight_path` of the method as soon as it has all layers. Raises
    CheckpointPathError if it cannot be written.
    """
    path = Path(directory) / f"model-layer-{layer_idx:05d}.safetensors"
    unfinished = path.with_name(f".{path.name}.partial")  # readers do not look at it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(_tensors(layer_idx, method.storage[0], experts)), unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise CheckpointPathError(
            f"'{path}' cannot be written ({error}); cpu_save needs a weight_path that can be."
        ) from error
    return path


def _tensors(layer_idx: int, storage: Storage, experts: LayerExperts) -> Iterator[tuple[str, torch.Tensor]]:
    base = f"{LAYER_PREFIXES[0].format(layer=layer_idx)}.{PUBLISHED.path}"
    for projection, matrices in (
        (PUBLISHED.gate, experts.gate),
        (PUBLISHED.up, experts.up),
        (PUBLISHED.down, experts.down),
    ):
        for expert, matrix in enumerate(matrices):
            for suffix, tensor in _parts(storage, matrix):
                yield f"{base}.{expert}.{projection}.{suffix}", tensor


def _parts(storage: Storage, matrix: ExpertMatrix) -> Iterator[tuple[str, torch.Tensor]]:
    yield storage.weight, matrix.weight.contiguous()
    yield storage.scales[0], matrix.scale.contiguous()
    if storage.global_scale is not None:
        yield storage.global_scale.suffix, torch.tensor(matrix.global_scale**storage.global_scale.power)
