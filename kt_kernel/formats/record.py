"""The record of a weight method: everything Python knows about how the method stores a matrix.

A matrix of N output rows and K input columns is codes, scales, sometimes a global scale. The record says how
checkpoints store them, how they are written for a device, which numbers they mean, and how they are made from
numbers. `kt_kernel.formats.records` has one per method; the C++ side is the row of the same name
(csrc/formats/format.h), and tests/formats/test_records.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kt_kernel.formats.quantize.quantized import Quantized
from kt_kernel.formats.shapes import Shape, ShapeRule, any_shapes, plain

WHOLE_ROW = 0  # in place of columns that share a scale

# Checkpoint codes and scales of one matrix -> float32 [N, K], before the global scale.
Decoder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# float32 [N, K], columns that share a scale (or WHOLE_ROW) -> what a checkpoint would hold.
Quantiser = Callable[[torch.Tensor, int], Quantized]


@dataclass(frozen=True)
class GlobalScale:
    """A float32 scalar for a whole matrix: w = code * scale * value ** power."""

    suffix: str
    power: int


@dataclass(frozen=True)
class Extra:
    """A tensor beside the codes that the kernels have no place for: refused unless it changes nothing."""

    suffix: str
    meaning: str
    harmless_values: tuple[int, ...] = ()


BIAS = "bias"  # suffix of what is added to the product of a matrix of any format, one number a row


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One way in which checkpoints store a matrix, as tensors `{stem}.{suffix}`.

    Dtypes are safetensors' names; the first of several suffixes of scales that exists counts.
    """

    weight: str
    weight_shapes: Mapping[str, ShapeRule]  # dtype of the codes -> their shape
    scales: tuple[str, ...] = ()
    scale_dtypes: tuple[str, ...] = ()
    scale_shape: ShapeRule = plain
    told_by: Callable[[Shape, Shape], bool] = any_shapes  # where the dtypes leave doubt
    group_axis: int | None = None  # the axis of the scales that counts groups, where their size is free
    global_scale: GlobalScale | None = None
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a matrix and its scales are written for a device: row-major, unless `transposed`."""

    codes: torch.dtype
    columns_per_code: int = 1  # columns in one stored element
    scales: torch.dtype | None = None  # None also where the checkpoint decides: `scales_of_checkpoint`
    rows_per_scale: int = 1
    columns_per_scale: int | None = None  # None = the checkpoint's group size
    transposed: bool = False
    scales_of_checkpoint: bool = False
    global_scales: bool = False

    @property
    def is_bf16(self) -> bool:
        """Are the codes the numbers themselves, so that a bf16 slot needs no decoding?"""
        return self.codes is torch.bfloat16 and self.scales is None and not self.scales_of_checkpoint


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """One method. `weights` says in plain words what `weight_path` holds.

    `quantised_format`: which of the method's formats (csrc/formats/format.h) `quantise` makes, where it has
    several. `computes_from_files`: kernels can read matrices where files are mapped, without packing them.

    hidden_size and moe_intermediate_size must be multiples of `columns_multiple`. `usual_group_size`: the
    one of published checkpoints, where it is free. `largest_code`: the largest magnitude of a code, times
    that of a scale below a global one. `config_rules`: what quantization_config.py makes sure of.
    `stored_as`: the method whose other name this is. A method without `storage` is not read from safetensors.
    """

    name: str
    weights: str
    columns_multiple: int = 1
    storage: tuple[Storage, ...] = ()
    encoding: Encoding | None = None
    decode: Decoder | None = None
    quantise: Quantiser | None = None
    quantised_format: str = ""
    computes_from_files: bool = False
    usual_group_size: int = WHOLE_ROW
    largest_code: float = 1.0
    config_rules: str = ""
    stored_as: str = ""

    @property
    def file_method(self) -> str:
        """The method that files are recognised as."""
        return self.stored_as or self.name
