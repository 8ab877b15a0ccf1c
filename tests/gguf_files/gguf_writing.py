"""GGUF files through the public `gguf` package, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

Type = GGMLQuantizationType

_KINDS = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file. `shape` is in torch's order; `make` gives its bytes, uint8 of any shape."""

    name: str
    shape: tuple[int, ...]
    type: Type
    make: Callable[[], np.ndarray]


def numbers(name: str, shape: tuple[int, ...], kind: Type, make: Callable[[], torch.Tensor]) -> Stored:
    """A tensor stored as F32, F16 or BF16 numbers."""
    return Stored(name, shape, kind, lambda: make().to(_PLAIN[kind]).contiguous().view(torch.uint8).numpy())


def write(path: Path, architecture: str, metadata: Mapping[str, object], tensors: Iterable[Stored]) -> Path:
    """One file. Keys of `metadata` are written as they are; integers as uint32, floats as float32."""
    stored = list(tensors)
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in stored:
        shape = quant_shape_to_byte_shape(tensor.shape, tensor.type)
        size = int(np.prod(shape, dtype=np.int64))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in stored:
        writer.write_tensor_data(tensor.make().reshape(-1))
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, _KINDS[type(value)])
