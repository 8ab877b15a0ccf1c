"""Where the experts of a model's layers are read from: what the container is, nobody above needs to know."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Protocol

from kt_kernel.checkpoint import detect
from kt_kernel.checkpoint.experts import layer_experts
from kt_kernel.checkpoint.families import GateUpRows, PackedNames, expert_layers, is_bias
from kt_kernel.checkpoint.reader import Checkpoint, open_checkpoint, release_checkpoints
from kt_kernel.checkpoint.sizes import expert_group_bytes, stored_bytes
from kt_kernel.errors import FeatureUnavailableError
from kt_kernel.formats.matrices import LayerExperts
from kt_kernel.gguf.experts import METHOD as GGUF_METHOD
from kt_kernel.gguf.experts import GgufExperts
from kt_kernel.gguf.model import holds_gguf, open_gguf, release_models


class ExpertSource(Protocol):
    """The experts of a model in some container. Every method may raise CheckpointError."""

    def method(self) -> str:
        """The method that reads all layers."""

    def draft_method(self, layer_idx: int) -> str | None:
        """The method that reads a draft model's layer; None if there are no experts in it."""

    def layer(
        self, layer_idx: int, method: str, *, num_experts: int, hidden: int, intermediate: int
    ) -> AbstractContextManager[LayerExperts]:
        """Views of one layer, valid inside the `with` block, at whose end their pages are given back."""

    def views(
        self, layer_idx: int, method: str, *, num_experts: int, hidden: int, intermediate: int
    ) -> LayerExperts:
        """The same, valid as long as they are kept, for kernels that read the mapped file itself."""

    def has_biases(self) -> bool:
        """Has any matrix of an expert a bias?"""

    def gate_up_rows(self) -> dict[int, GateUpRows]:
        """Of the layers where the names of the tensors alone say it, not the format."""

    def layer_bytes(self) -> dict[int, int]:
        """What the experts of each layer take."""

    def expert_bytes(self) -> int:
        """What all experts take, also those outside the model's layers."""

    def stored_bytes(self) -> int:
        """What all tensors take."""


class SafetensorsExperts:
    """An `ExpertSource`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def method(self) -> str:
        return detect.stored_method(self._checkpoint)

    def draft_method(self, layer_idx: int) -> str | None:
        return detect.draft_layer_method(self._checkpoint, layer_idx)

    def layer(
        self, layer_idx: int, method: str, *, num_experts: int, hidden: int, intermediate: int
    ) -> AbstractContextManager[LayerExperts]:
        return layer_experts(
            self._checkpoint,
            layer_idx,
            method,
            num_experts=num_experts,
            hidden=hidden,
            intermediate=intermediate,
        )

    def views(self, layer_idx: int, method: str, **sizes: int) -> LayerExperts:
        raise FeatureUnavailableError(
            f"'{self._checkpoint.path}' is no GGUF, and only GGUF can be computed from where it is mapped."
        )

    def has_biases(self) -> bool:
        tails = (tail for tails in self._checkpoint.expert_groups().values() for tail in tails)
        return any(map(is_bias, tails))

    def gate_up_rows(self) -> dict[int, GateUpRows]:
        return {
            layer: where.names.rows
            for layer, where in expert_layers(self._checkpoint).items()
            if isinstance(where.names, PackedNames) and not where.names.up
        }

    def layer_bytes(self) -> dict[int, int]:
        groups = expert_group_bytes(self._checkpoint)
        return {layer: groups[where.base] for layer, where in expert_layers(self._checkpoint).items()}

    def expert_bytes(self) -> int:
        return sum(expert_group_bytes(self._checkpoint).values())

    def stored_bytes(self) -> int:
        return stored_bytes(self._checkpoint, self._checkpoint.names())


def open_experts(path: str | os.PathLike, method: str = "") -> ExpertSource:
    """The experts at `path`; the `method` asked for, if any, decides where there are several containers.

    Raises CheckpointPathError if there is nothing there.
    """
    if holds_gguf(path) and (method == GGUF_METHOD or not _holds_safetensors(path)):
        return GgufExperts(open_gguf(path))
    return SafetensorsExperts(open_checkpoint(path))


def _holds_safetensors(path: str | os.PathLike) -> bool:
    """In that directory?"""
    return os.path.isdir(path) and any(name.endswith(".safetensors") for name in os.listdir(path))


def detect_method(path: str | os.PathLike, asked: str = "") -> str:
    """The method that reads the checkpoint at `path`, e.g. "FP8"; `asked`: as `method` of `open_experts`.

    Raises CheckpointError if there is no checkpoint with routed experts, if no method reads it, or if its
    layers need different methods.
    """
    return open_experts(path, asked).method()


def release_sources() -> None:
    """Close the files kept open between layers; views still in use keep their own file open."""
    release_checkpoints()
    release_models()
