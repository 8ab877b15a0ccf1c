"""One layer's bfloat16 experts as addresses in the mapped checkpoint, checked tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kt_kernel.checkpoint.families import (
    ExpertLocation,
    PackedNames,
    check_expert_count,
    locate_experts,
    wrong_expert_count,
)
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.errors import CheckpointError, MissingTensorError

# What a wrong dtype most likely means, so that the message can name the method that reads the file.
_METHOD_FOR_DTYPE = {
    "F8_E4M3": "the file is quantised: try method FP8, FP8_PERCHANNEL or MXFP8",
    "I8": "the file is quantised: try method MXFP4",
    "U8": "the file is quantised: try method NVFP4 or RAWINT4",
    "F16": "convert the checkpoint to bfloat16",
    "F32": "convert the checkpoint to bfloat16",
}


@dataclass
class ExpertMatrices:
    """Row-major bfloat16 matrices of all experts, by logical (checkpoint) id: gate, up [I, H] and down [H, I]
    each."""

    gate: list[torch.Tensor] = field(default_factory=list)
    up: list[torch.Tensor] = field(default_factory=list)
    down: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def bf16_experts(
    checkpoint: Checkpoint, layer_idx: int, *, num_experts: int, hidden: int, intermediate: int
) -> Iterator[ExpertMatrices]:
    """Views of one layer's experts, valid inside the `with` block; their pages are given back at its end.

    Raises MissingTensorError or CheckpointError, naming the tensor, for anything absent or of another dtype
    or shape.
    """
    location = locate_experts(checkpoint, layer_idx)
    read = _packed if isinstance(location.names, PackedNames) else _one_by_one
    matrices, names = read(checkpoint, location, num_experts, hidden, intermediate)
    checkpoint.will_need(names)
    try:
        yield matrices
    finally:
        checkpoint.drop_pages(names)


def _one_by_one(
    checkpoint: Checkpoint, location: ExpertLocation, num_experts: int, hidden: int, intermediate: int
) -> tuple[ExpertMatrices, list[str]]:
    check_expert_count(checkpoint, location.base, num_experts)
    matrices = ExpertMatrices()
    used: list[str] = []
    for expert in range(num_experts):
        for projection, rows, columns, views in (
            (location.names.gate, intermediate, hidden, matrices.gate),
            (location.names.up, intermediate, hidden, matrices.up),
            (location.names.down, hidden, intermediate, matrices.down),
        ):
            name = f"{location.base}.{expert}.{projection}.weight"
            views.append(_checked_view(checkpoint, name, (rows, columns)))
            used.append(name)
    return matrices, used


def _packed(
    checkpoint: Checkpoint, location: ExpertLocation, num_experts: int, hidden: int, intermediate: int
) -> tuple[ExpertMatrices, list[str]]:
    gate_up_name = f"{location.base}.{location.names.gate_up}"
    down_name = f"{location.base}.{location.names.down}"
    for name in (gate_up_name, down_name):
        shape = _require(checkpoint, name).shape
        if len(shape) == 3 and shape[0] != num_experts:
            raise wrong_expert_count(checkpoint, location.base, in_file=shape[0], num_experts=num_experts)
    gate_up = _checked_view(checkpoint, gate_up_name, (num_experts, 2 * intermediate, hidden))
    down = _checked_view(checkpoint, down_name, (num_experts, hidden, intermediate))
    matrices = ExpertMatrices(
        gate=list(gate_up[:, :intermediate].unbind()),
        up=list(gate_up[:, intermediate:].unbind()),
        down=list(down.unbind()),
    )
    return matrices, [gate_up_name, down_name]


def _checked_view(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    info = _require(checkpoint, name)
    path = checkpoint.file_of(name).path
    if info.dtype != "BF16":
        advice = _METHOD_FOR_DTYPE.get(info.dtype, "choose the method that fits the file")
        raise CheckpointError(
            f"tensor '{name}' in '{path}' has dtype {info.dtype}, but method BF16 reads BF16; {advice}."
        )
    if info.shape != shape:
        raise CheckpointError(
            f"tensor '{name}' in '{path}' has shape {list(info.shape)}, expected {list(shape)} from the "
            "model's description; take the weights and the config.json from the same model."
        )
    return checkpoint.view(name)


def _require(checkpoint: Checkpoint, name: str):
    if name in checkpoint:
        return checkpoint.info(name)
    stem = name.removesuffix("weight")
    relatives = [other for other in _expert_tensor_names(checkpoint) if other.startswith(stem)][:3]
    hint = (
        f"the file has {', '.join(repr(other) for other in relatives)} instead, so another method may fit"
        if relatives
        else "the checkpoint is incomplete, download it again"
    )
    raise MissingTensorError(f"tensor '{name}' is not in the checkpoint '{checkpoint.path}'; {hint}.")


def _expert_tensor_names(checkpoint: Checkpoint) -> Iterator[str]:
    for base, tails in checkpoint.expert_groups().items():
        for tail in tails:
            yield f"{base}.{tail}"
