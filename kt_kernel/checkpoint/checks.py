"""Checks of single expert tensors: each failure is one sentence with the tensor, what it is and what it must
be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from kt_kernel.checkpoint.formats import Format
from kt_kernel.checkpoint.mapped_file import MappedFile
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.checkpoint.safetensors_file import TensorInfo
from kt_kernel.errors import CheckpointError, MissingTensorError
from kt_kernel.formats.matrices import LayerExperts
from kt_kernel.formats.record import Extra
from kt_kernel.formats.records import RECORDS
from kt_kernel.formats.shapes import Shape

FLOATS = ("BF16", "F16", "F32")  # of biases


class Tensors(Protocol):
    """The tensors of a model, whatever its container."""

    path: str

    def file_of(self, name: str) -> MappedFile: ...


class Shaped(Protocol):
    """What a header says of a tensor."""

    @property
    def shape(self) -> Shape: ...


def require_tensor(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """What the header says of the tensor; raises MissingTensorError, with what is there instead."""
    if name in checkpoint:
        return checkpoint.info(name)
    stem = name.rpartition(".")[0] + "."
    relatives = [other for other in expert_tensor_names(checkpoint) if other.startswith(stem)]
    hint = f"; beside it are only {', '.join(relatives[:4])}" if relatives else ""
    raise MissingTensorError(
        f"tensor '{name}' is not in the checkpoint '{checkpoint.path}'{hint}; the checkpoint is incomplete, "
        "download it again."
    )


def expert_tensor_names(checkpoint: Checkpoint) -> Iterator[str]:
    """Full names of all tensors of routed experts."""
    for base, tails in checkpoint.expert_groups().items():
        for tail in tails:
            yield f"{base}.{tail}"


def check_dtype(
    checkpoint: Checkpoint, row: Format, name: str, info: TensorInfo, expected: tuple[str, ...]
) -> None:
    if info.dtype not in expected:
        advice = (
            "convert the checkpoint to bfloat16"
            if info.dtype in ("F16", "F32", "F64")
            else "all experts of a checkpoint must be stored alike"
        )
        raise CheckpointError(
            f"tensor '{name}' in '{checkpoint.file_of(name).path}' has dtype {info.dtype}, but method "
            f"{row.method} reads {' or '.join(expected)}; {advice}."
        )


def check_shape(
    checkpoint: Tensors, name: str, info: Shaped, allowed: tuple[Shape, ...], remark: str = ""
) -> None:
    if info.shape not in allowed:
        raise CheckpointError(
            f"tensor '{name}' in '{checkpoint.file_of(name).path}' has shape {list(info.shape)}, expected "
            f"{' or '.join(str(list(shape)) for shape in allowed)} from the model's description{remark}; "
            "take the weights and the config.json from the same model."
        )


def as_kernels_read(row: Format, scale: torch.Tensor) -> torch.Tensor:
    """Powers of two where the kernels take numbers, as of float8 blocks: float32 holds them exactly."""
    as_numbers = scale.dtype is torch.float8_e8m0fnu and RECORDS[row.method].encoding.scales is torch.float32
    return scale.float() if as_numbers else scale


def check_extra(checkpoint: Checkpoint, row: Format, name: str, extra: Extra) -> None:
    if name not in checkpoint:
        return
    check_harmless(checkpoint, row.method, name, checkpoint.view(name), extra)


def check_harmless(checkpoint: Tensors, method: str, name: str, values: torch.Tensor, extra: Extra) -> None:
    """Raise CheckpointError if the `values` of that tensor would change what is computed."""
    if not _each_is_one_of(values, extra.harmless_values):
        raise CheckpointError(
            f"tensor '{name}' in '{checkpoint.file_of(name).path}' holds {extra.meaning}, which method "
            f"{method} cannot take into account; take a checkpoint quantised without."
        )


def _each_is_one_of(values: torch.Tensor, allowed: tuple[int, ...]) -> bool:
    matches = torch.zeros(values.shape, dtype=torch.bool)
    for value in allowed:
        matches |= values == value
    return bool(matches.all())


def check_said_shape(checkpoint: Checkpoint, name: str, expected: Shape) -> None:
    if name not in checkpoint:
        return
    said = tuple(checkpoint.view(name).reshape(-1).tolist())
    if said != expected:
        raise CheckpointError(
            f"tensor '{name}' in '{checkpoint.file_of(name).path}' says the matrix is {list(said)}, expected "
            f"{list(expected)} from the model's description; take the weights and the config.json from the "
            "same model."
        )


def wrong_expert_count(checkpoint: Tensors, base: str, *, in_file: int, num_experts: int) -> CheckpointError:
    """The error for a checkpoint whose layer has another number of experts than the model's description."""
    return CheckpointError(
        f"num_experts is {num_experts}, but '{checkpoint.path}' holds {in_file} experts under '{base}'; "
        "take the weights and the config.json from the same model."
    )


def check_one_scale_dtype(checkpoint: Checkpoint, experts: LayerExperts) -> None:
    first = experts.gate[0]
    for matrix in experts.all():
        if matrix.scale is not None and matrix.scale.dtype is not first.scale.dtype:
            raise CheckpointError(
                f"the scales of '{first.name}' in '{checkpoint.path}' are {first.scale.dtype} and those of "
                f"'{matrix.name}' {matrix.scale.dtype}; the experts of a layer must be stored alike."
            )
