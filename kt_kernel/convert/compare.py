"""How far a converted checkpoint is from its original: NMSE of weights and of the layers' outputs.

NMSE = sum (converted - original)**2 / sum original**2
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from kt_kernel.checkpoint.checks import require_tensor
from kt_kernel.checkpoint.reader import Checkpoint, open_checkpoint
from kt_kernel.convert.layout import PROJECTIONS, tensor_names
from kt_kernel.convert.matrix import Numbers, SourceMatrix
from kt_kernel.convert.source import SourceLayer, source_layers
from kt_kernel.errors import ConversionError
from kt_kernel.formats.values import nibbles, stretched

_CODE_OF_ZERO = 8  # of 4-bit codes
_SEED = 1


@dataclass(frozen=True)
class LayerError:
    """NMSE of one layer: its weights by projection, and what its experts give for random tokens."""

    layer: int
    weights: dict[str, float]
    output: float


@dataclass
class _Sums:
    """Of squares."""

    error: float = 0.0
    original: float = 0.0

    def add(self, converted: torch.Tensor, original: torch.Tensor) -> None:
        self.error += float((converted - original).double().square().sum())
        self.original += float(original.double().square().sum())

    def nmse(self) -> float:
        return self.error / self.original if self.original else float(self.error > 0)


def compare(
    original: str | os.PathLike,
    converted: str | os.PathLike,
    *,
    layers: Sequence[int] = (),
    experts: int = 8,
    tokens: int = 32,
) -> Iterator[LayerError]:
    """One result per layer, all of them or `layers`, from evenly chosen `experts`; one expert in memory.

    Tokens are normal random numbers. Raises ConversionError or CheckpointError.
    """
    output = open_checkpoint(converted)
    found = {layer.shape.index: layer for layer in source_layers(original)}
    for index in layers or found:
        if index not in found:
            raise ConversionError(
                f"--layers has {index}, but '{original}' has experts in layers {min(found)} to {max(found)}."
            )
        yield _compare_layer(found[index], output, experts, tokens)


def as_float32(numbers: Numbers) -> torch.Tensor:
    """What the quantiser takes them for."""
    values = numbers.values.float()
    if numbers.scales is None:
        return values
    rows, columns = values.shape
    first = numbers.first_row // numbers.block[0]
    scales = numbers.scales[first : first + -(-rows // numbers.block[0])]
    return values.mul_(stretched(scales, rows, columns, numbers.block))


def _compare_layer(layer: SourceLayer, output: Checkpoint, experts: int, tokens: int) -> LayerError:
    generator = torch.Generator().manual_seed(_SEED)
    hidden = torch.randn(tokens, layer.shape.hidden, generator=generator)
    sums = {projection: _Sums() for projection in PROJECTIONS}
    outputs = _Sums()
    step = max(1, layer.shape.experts // experts)
    with layer.opened() as expert:
        for number in range(0, layer.shape.experts, step):
            originals, quantised = [], []
            for projection, matrix in expert(number).matrices():
                before = _original(matrix)
                after = _converted(output, layer.shape.index, number, projection, matrix.shape)
                sums[projection].add(after, before)
                originals.append(before)
                quantised.append(after)
            outputs.add(_mlp(hidden, *quantised), _mlp(hidden, *originals))
    weights = {projection: total.nmse() for projection, total in sums.items()}
    return LayerError(layer.shape.index, weights, outputs.nmse())


def _mlp(hidden: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (silu(hidden @ gate.t()) * (hidden @ up.t())) @ down.t()


def _original(matrix: SourceMatrix) -> torch.Tensor:
    return as_float32(matrix.rows(0, matrix.shape[0]))


def _converted(
    output: Checkpoint, layer: int, expert: int, projection: str, shape: tuple[int, int]
) -> torch.Tensor:
    codes_name, scales_name = tensor_names(layer, expert, projection)
    for name in (codes_name, scales_name):
        require_tensor(output, name)
    codes, scales = output.view(codes_name), output.view(scales_name)
    values = codes.float() if codes.dtype is torch.int8 else nibbles(codes).float().sub_(_CODE_OF_ZERO)
    if tuple(values.shape) != shape:
        raise ConversionError(
            f"'{codes_name}' in '{output.path}' is a matrix of {list(values.shape)}, expected {list(shape)} "
            "as in the original; compare a model with its own conversion."
        )
    return values.mul_(stretched(scales, *shape, (1, shape[1] // scales.shape[1])))
