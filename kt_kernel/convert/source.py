"""The layers of experts in an input, whatever their names and formats."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from kt_kernel.checkpoint.detect import draft_layer_method
from kt_kernel.checkpoint.families import (
    ExpertLocation,
    NumaPartNames,
    PackedNames,
    check_expert_count,
    expert_layers,
    is_bias,
    known_groups,
    stored_experts,
)
from kt_kernel.checkpoint.reader import Checkpoint, open_checkpoint
from kt_kernel.checkpoint.sizes import stored_bytes
from kt_kernel.convert.coded import coded_experts, coded_shape
from kt_kernel.convert.compressed import COMPRESSED, compressed_expert, is_compressed
from kt_kernel.convert.layout import LayerShape
from kt_kernel.convert.matrix import SourceExpert, sample_hash
from kt_kernel.convert.plain import FLOATS, packed_expert, packed_shape, plain_expert
from kt_kernel.convert.words import AWQ, GPTQ, words_expert, words_kind, words_shape
from kt_kernel.errors import CheckpointError, ConversionError, MissingTensorError

_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_CONVERTED = ("AMXINT4", "AMXINT8", "MOE_INT4", "MOE_INT8")

# Kinds whose experts are read one by one.
_READ_BY_EXPERT = {
    **dict.fromkeys(FLOATS, plain_expert),
    **{kind: partial(words_expert, kind) for kind in (AWQ, GPTQ)},
    COMPRESSED: compressed_expert,
}

# What --input-type may say -> how such experts are stored.
INPUT_TYPES: dict[str, tuple[str, ...]] = {
    "bf16": ("BF16",),
    "fp16": ("F16",),
    "fp8": ("FP8", "FP8_PERCHANNEL", "MXFP8"),
    "fp4": ("MXFP4", "NVFP4"),
    "awq": (AWQ,),
    "gptq": ("GPTQ_INT4", GPTQ),
    "int4": ("RAWINT4", COMPRESSED),
}


@dataclass(frozen=True)
class SourceLayer:
    """One layer's experts, as stored: `kind` is a float type of safetensors, a method, or AWQ."""

    checkpoint: Checkpoint
    location: ExpertLocation
    kind: str
    shape: LayerShape
    stored_bytes: int

    @contextmanager
    def opened(self) -> Iterator[Callable[[int], SourceExpert]]:
        """Expert number -> its matrices, valid inside the `with` block. Raises CheckpointError."""
        if self.kind not in _READ_BY_EXPERT:
            with coded_experts(self.checkpoint, self.kind, self.location.base, self.shape) as expert:
                yield expert
            return
        with self.checkpoint.reading(self.tensors()):
            yield self._expert

    def check(self) -> None:
        """Raise CheckpointError for what headers show to be wrong, before hours are spent on other layers.

        Not of the formats that coded.py reads: those are checked when the layer is opened.
        """
        if self.kind in _READ_BY_EXPERT:
            for expert in range(self.shape.experts):
                self._expert(expert)

    def tensors(self) -> list[str]:
        """Full names of all its tensors, sorted."""
        base = self.location.base
        return sorted(f"{base}.{tail}" for tail in self.checkpoint.expert_groups()[base])

    def sample(self) -> str:
        """Tells this layer from one with other weights, by a few of its pages."""
        return sample_hash(self.checkpoint, self.tensors())

    def _expert(self, expert: int) -> SourceExpert:
        names = self.location.names
        read = packed_expert if isinstance(names, PackedNames) else _READ_BY_EXPERT[self.kind]
        return read(self.checkpoint, self.location.base, names, self.shape, expert)


def source_layers(path: str | os.PathLike) -> list[SourceLayer]:
    """Every layer with routed experts in the checkpoint at `path`, in ascending order.

    Raises CheckpointError if there is none, or one is stored in a way that cannot be read.
    """
    checkpoint = open_checkpoint(path)
    layers = [_layer(checkpoint, index, where) for index, where in expert_layers(checkpoint).items()]
    if not layers:
        raise MissingTensorError(
            f"'{path}' has no routed experts under any known name; groups of experts in it: "
            f"{known_groups(checkpoint)}."
        )
    for layer in layers:
        layer.check()
    return layers


def check_input_type(layers: list[SourceLayer], said: str | None) -> None:
    """Raise ConversionError if --input-type says something else than what the first layer holds."""
    if said is None:
        return
    if said not in INPUT_TYPES:
        raise ConversionError(f"--input-type is {said!r}, expected one of {', '.join(INPUT_TYPES)}.")
    if layers[0].kind not in INPUT_TYPES[said]:
        raise ConversionError(
            f"--input-type is {said}, but the experts of layer {layers[0].shape.index} are stored as "
            f"{layers[0].kind}; leave the option out, the input shows its type."
        )


def fingerprint(layers: list[SourceLayer]) -> str:
    """Tells inputs with other tensors apart: a hash of the experts' names, types and shapes."""
    entries = []
    for layer in layers:
        for name in layer.tensors():
            info = layer.checkpoint.info(name)
            entries.append((name, info.dtype, info.shape))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _layer(checkpoint: Checkpoint, index: int, location: ExpertLocation) -> SourceLayer:
    base, names = location.base, location.names
    if isinstance(names, NumaPartNames):
        raise _converted_already(checkpoint, "integers for NUMA nodes")
    size = stored_bytes(checkpoint, (f"{base}.{tail}" for tail in checkpoint.expert_groups()[base]))
    if isinstance(names, PackedNames):
        _require_plain(checkpoint, base, names)
        shape = packed_shape(checkpoint, base, names, index)
        kind = checkpoint.info(f"{base}.{names.down}").dtype
    else:
        kind = _kind(checkpoint, index, location)
        experts = stored_experts(checkpoint, base)[-1] + 1
        if kind in (AWQ, GPTQ):
            shape = words_shape(checkpoint, base, names, index, experts)
        else:
            shape = coded_shape(checkpoint, kind, base, names, index, experts)
    _refuse_biases(checkpoint, base)
    _check_count(checkpoint, location, shape.experts)
    return SourceLayer(checkpoint, location, kind, shape, size)


def _require_plain(checkpoint: Checkpoint, base: str, names: PackedNames) -> None:
    """Raise CheckpointError if packed experts are there, but not as `packed_expert` reads them."""
    if names.up:
        raise CheckpointError(
            f"'{checkpoint.path}' holds gate of all experts in one tensor and up in another, under '{base}', "
            "which is not converted; load the checkpoint as it is."
        )
    tails = checkpoint.expert_groups()[base]
    for projection in (names.gate_up, names.down):
        stored = {tail for tail in tails if tail.startswith(projection) and not is_bias(tail)}
        tail = projection if projection in stored else min(stored, default=None)
        if tail is None:
            continue  # missing: packed_shape says so
        kind = checkpoint.info(f"{base}.{tail}").dtype
        if tail != projection or kind not in FLOATS:
            raise CheckpointError(
                f"tensor '{base}.{tail}' in '{checkpoint.path}' is {kind}; experts packed into one tensor "
                f"are converted only from {' or '.join(FLOATS)} called '{projection}'; load the checkpoint "
                "as it is."
            )


def _refuse_biases(checkpoint: Checkpoint, base: str) -> None:
    for tail in checkpoint.expert_groups()[base]:
        name = f"{base}.{tail}"
        if is_bias(tail) and bool(checkpoint.view(name).float().count_nonzero()):
            raise CheckpointError(
                f"tensor '{name}' in '{checkpoint.file_of(name).path}' holds a bias, which integer experts "
                "have no place for; convert a checkpoint without."
            )


def _kind(checkpoint: Checkpoint, index: int, location: ExpertLocation) -> str:
    stem = f"{location.base}.{stored_experts(checkpoint, location.base)[0]}.{location.names.gate}"
    if f"{stem}.weight" in checkpoint and checkpoint.info(f"{stem}.weight").dtype in FLOATS:
        return checkpoint.info(f"{stem}.weight").dtype
    if (words := words_kind(checkpoint, stem)) is not None:
        return words
    if is_compressed(checkpoint, stem):
        return COMPRESSED
    method = draft_layer_method(checkpoint, index)
    if method in _CONVERTED:
        raise _converted_already(checkpoint, method)
    return method


def _converted_already(checkpoint: Checkpoint, what: str) -> ConversionError:
    return ConversionError(
        f"'{checkpoint.path}' holds {what} already; convert the original model, because rounding twice loses "
        "accuracy."
    )


def _check_count(checkpoint: Checkpoint, location: ExpertLocation, in_file: int) -> None:
    """The config.json, where it says a number, must say this one: the last experts may be missing."""
    config = checkpoint.config()
    for said in (config, config.get("text_config") or {}):
        for key in _EXPERT_COUNTS:
            if isinstance(said.get(key), int) and said[key] != in_file:
                if isinstance(location.names, PackedNames):
                    raise CheckpointError(
                        f"config.json of '{checkpoint.path}' says {key} is {said[key]}, but the tensors "
                        f"under '{location.base}' hold {in_file} experts; take both from the same model."
                    )
                check_expert_count(checkpoint, location.base, said[key])
