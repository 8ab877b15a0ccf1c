"""The routed experts of a GGUF model: which tensors they are, checked, as views of the mapped file.

    blk.N.ffn_{gate,up,down}_exps.weight    [E, rows, columns]
    blk.N.ffn_gate_up_exps.weight           [E, 2 I, H], an expert's gate rows first
    blk.N.ffn_{gate,up,down}.E.weight       [rows, columns]: an expert each, in old files
    .bias instead of .weight                [E, rows] or [rows], where there are biases

gate, up and down may each have a type of their own, and another one in every layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.checkpoint.checks import check_harmless, check_shape, wrong_expert_count
from kt_kernel.checkpoint.families import GateUpRows
from kt_kernel.errors import CheckpointError, MissingTensorError
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.record import BIAS, Extra
from kt_kernel.gguf.file import TensorInfo
from kt_kernel.gguf.model import GgufModel

METHOD = "LLAMAFILE"
# What kernels multiply.
_TYPES = tuple(row["name"] for row in kt_kernel_ext.FORMATS if row["method"] == METHOD)

_NAME = re.compile(
    r"blk\.(?P<layer>\d+)\.ffn_(?P<projection>gate_up|gate|up|down)(_exps|\.(?P<expert>\d+))\..+"
)
_FACTORS = Extra("scale", "a factor for each expert", (1,))
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Sizes:
    experts: int
    hidden: int
    intermediate: int

    def matrix(self, projection: str) -> tuple[int, int]:
        """Rows and columns."""
        if projection == "down":
            return (self.hidden, self.intermediate)
        return (2 * self.intermediate if projection == "gate_up" else self.intermediate, self.hidden)


class GgufExperts:
    """An `ExpertSource` (kt_kernel/checkpoint/sources.py)."""

    def __init__(self, model: GgufModel) -> None:
        self._model = model
        self._names: dict[int, list[str]] = defaultdict(list)
        for name in model.tensors:
            if found := _NAME.fullmatch(name):
                self._names[int(found["layer"])].append(name)

    def method(self) -> str:
        if not self._names:
            raise MissingTensorError(
                f"'{self._model.path}' has no routed experts (such as 'blk.0.ffn_up_exps.weight'): it is no "
                "mixture of experts; give the file of one."
            )
        return METHOD

    def draft_method(self, layer_idx: int) -> str | None:
        return METHOD if layer_idx in self._names else None

    @contextmanager
    def layer(
        self, layer_idx: int, method: str, *, num_experts: int, hidden: int, intermediate: int
    ) -> Iterator[LayerExperts]:
        names = self._names.get(layer_idx, [])
        with self._model.reading(names):
            yield self.views(
                layer_idx, method, num_experts=num_experts, hidden=hidden, intermediate=intermediate
            )

    def views(
        self, layer_idx: int, method: str, *, num_experts: int, hidden: int, intermediate: int
    ) -> LayerExperts:
        """One layer's experts, valid as long as they are kept; none of their pages is asked for.

        Raises MissingTensorError or CheckpointError, naming the tensor, if anything is absent or has another
        shape, or a type that no kernel reads.
        """
        if method != METHOD:
            raise CheckpointError(
                f"method {method} was asked for, but '{self._model.path}' is GGUF; use method {METHOD} or "
                "AUTO."
            )
        if layer_idx not in self._names:
            self.method()
            raise MissingTensorError(
                f"layer {layer_idx} has no routed experts in '{self._model.path}' (such as "
                f"'blk.{layer_idx}.ffn_up_exps.weight'), which has them in layers {_ranges(self._names)}; "
                "check layer_idx and weight_path."
            )
        sizes = _Sizes(num_experts, hidden, intermediate)
        return _LayerReader(self._model, f"blk.{layer_idx}", self._names[layer_idx], sizes).read()

    def has_biases(self) -> bool:
        return any(name.endswith(f".{BIAS}") for names in self._names.values() for name in names)

    def gate_up_rows(self) -> dict[int, GateUpRows]:
        return {}

    def layer_bytes(self) -> dict[int, int]:
        return {
            layer: sum(self._model.info(name).bytes for name in names) for layer, names in self._names.items()
        }

    def expert_bytes(self) -> int:
        return sum(self.layer_bytes().values())

    def stored_bytes(self) -> int:
        return sum(info.bytes for info in self._model.tensors.values())


class _LayerReader:
    """Reads one layer, whose tensors begin with `base`, "blk.3"; `names`: all of its experts."""

    def __init__(self, model: GgufModel, base: str, names: list[str], sizes: _Sizes) -> None:
        self._model = model
        self._base = base
        self._sizes = sizes
        self._unread_biases = {name for name in names if name.endswith(f".{BIAS}")}

    def read(self) -> LayerExperts:
        if f"{self._base}.ffn_gate_up_exps.weight" in self._model:
            gate, up = self._fused()
        else:
            gate, up = self._projection("gate"), self._projection("up")
        down = self._projection("down")
        self._check_biases()
        return LayerExperts(gate, up, down, formats=tuple(map(self._one_type, (gate, up, down))))

    def _fused(self) -> tuple[list[ExpertMatrix], list[ExpertMatrix]]:
        name, rows = f"{self._base}.ffn_gate_up_exps.weight", self._sizes.intermediate
        both, biases = self._stacked("gate_up"), self._biases("gate_up")

        def half(part: slice) -> list[ExpertMatrix]:
            return [
                ExpertMatrix(name, matrix[part], bias=None if bias is None else bias[part])
                for matrix, bias in zip(both, biases, strict=True)
            ]

        return half(slice(rows)), half(slice(rows, None))

    def _projection(self, projection: str) -> list[ExpertMatrix]:
        name = f"{self._base}.ffn_{projection}_exps.weight"
        if name not in self._model and f"{self._base}.ffn_{projection}.0.weight" in self._model:
            return self._one_by_one(projection)
        both = zip(self._stacked(projection), self._biases(projection), strict=True)
        return [ExpertMatrix(name, matrix, bias=bias) for matrix, bias in both]

    def _stacked(self, projection: str) -> list[torch.Tensor]:
        """Bytes of each expert's matrix, from the tensor that holds all."""
        stem = f"{self._base}.ffn_{projection}_exps"
        name = f"{stem}.weight"
        info = self._require(name)
        if len(info.shape) == 3 and info.shape[0] != self._sizes.experts:
            raise wrong_expert_count(
                self._model, name, in_file=info.shape[0], num_experts=self._sizes.experts
            )
        shape = (self._sizes.experts, *self._sizes.matrix(projection))
        check_shape(self._model, name, info, (shape,))
        self._refuse_factors(stem)
        return list(self._model.view(name).unbind())

    def _biases(self, projection: str) -> list[torch.Tensor] | list[None]:
        """float32 [rows] of each expert, from the tensor that holds all."""
        name = f"{self._base}.ffn_{projection}_exps.{BIAS}"
        if name not in self._model:
            return [None] * self._sizes.experts
        self._unread_biases.discard(name)
        rows, _ = self._sizes.matrix(projection)
        check_shape(self._model, name, self._model.info(name), ((self._sizes.experts, rows),))
        return list(self._numbers(name).reshape(self._sizes.experts, rows).float().contiguous().unbind())

    def _one_by_one(self, projection: str) -> list[ExpertMatrix]:
        stem = f"{self._base}.ffn_{projection}"
        pattern = re.compile(re.escape(stem) + r"\.(\d+)\.weight")
        stored = {int(found[1]) for name in self._model.tensors if (found := pattern.fullmatch(name))}
        if max(stored) + 1 != self._sizes.experts:
            raise wrong_expert_count(
                self._model, stem, in_file=max(stored) + 1, num_experts=self._sizes.experts
            )
        matrices = []
        for expert in range(self._sizes.experts):
            name = f"{stem}.{expert}.weight"
            check_shape(self._model, name, self._require(name), (self._sizes.matrix(projection),))
            self._refuse_factors(f"{stem}.{expert}")
            matrices.append(
                ExpertMatrix(
                    name, self._model.view(name), bias=self._bias(f"{stem}.{expert}.{BIAS}", projection)
                )
            )
        return matrices

    def _bias(self, name: str, projection: str) -> torch.Tensor | None:
        if name not in self._model:
            return None
        self._unread_biases.discard(name)
        rows, _ = self._sizes.matrix(projection)
        check_shape(self._model, name, self._model.info(name), ((rows,),))
        return self._numbers(name).float().contiguous()

    def _check_biases(self) -> None:
        """All must be read: one without a matrix of its name belongs to one that is stored otherwise."""
        if self._unread_biases:
            name = min(self._unread_biases)
            raise CheckpointError(
                f"tensor '{name}' in '{self._model.file_of(name).path}' is a bias without the matrix "
                f"'{name.removesuffix(BIAS)}weight'; take a file that stores biases as their matrices."
            )

    def _require(self, name: str) -> TensorInfo:
        if name not in self._model:
            raise MissingTensorError(
                f"tensor '{name}' is not in '{self._model.path}'; the model is incomplete, download it again."
            )
        info = self._model.info(name)
        if info.dtype not in _TYPES:
            raise CheckpointError(
                f"tensor '{name}' in '{self._model.file_of(name).path}' is {info.dtype}, but experts are "
                f"read from {', '.join(_TYPES)}; take a file quantised to these."
            )
        return info

    def _one_type(self, matrices: list[ExpertMatrix]) -> str:
        types = {matrix.name: self._model.info(matrix.name).dtype for matrix in matrices}
        first, *others = types
        for name in others:
            if types[name] != types[first]:
                raise CheckpointError(
                    f"tensor '{name}' in '{self._model.path}' is {types[name]}, expected {types[first]} as "
                    f"'{first}'; all experts of a layer must be stored alike."
                )
        return types[first]

    def _refuse_factors(self, stem: str) -> None:
        name = f"{stem}.{_FACTORS.suffix}"
        if name in self._model:
            check_harmless(self._model, METHOD, name, self._numbers(name), _FACTORS)

    def _numbers(self, name: str) -> torch.Tensor:
        info = self._model.info(name)
        if info.dtype not in _PLAIN:
            raise CheckpointError(
                f"tensor '{name}' in '{self._model.file_of(name).path}' is {info.dtype}, expected "
                f"{', '.join(_PLAIN)}; download the model again."
            )
        return self._model.view(name).view(_PLAIN[info.dtype])


def _ranges(layers: Iterable[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
