"""A GGUF file of 16-bit numbers with its dense matrices in several block types, as Q4_K_M mixes them.

The blocks are drawn, not fitted: random codes and scales, about as large as the numbers they replace.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter, ReaderTensor
from gguf.quants import dequantize
from gguf_writing import Type

# By the tensor's name without layer and ending; all other matrices but routers and experts are Q4_K, or Q8_0
# where their rows are no whole blocks of 256 columns.
_TYPES = {"attn_v": Type.Q6_K, "attn_output": Type.Q5_K, "output": Type.Q6_K, "ffn_down_shexp": Type.Q6_K}
_LEFT_OUT = ("ffn_gate_inp", "_exps", "ffn_gate_inp_shexp")

# Where a block has its fp16 scale, and its fp16 scale of minimums, which is so much larger that the numbers
# have a mean of about 0.
_SCALE = {Type.Q4_K: 0, Type.Q5_K: 0, Type.Q6_K: 208, Type.Q8_0: 0}
_MINIMUM = {Type.Q4_K: (2, 7.5), Type.Q5_K: (2, 15.5)}


def write_mixed(source: Path, target: Path, seed: int = 0) -> Path:
    """The same model with other numbers in its dense matrices; the same bytes every time."""
    random = np.random.default_rng(seed)
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.get_field("general.architecture").contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        kind = _kind(tensor)
        data = tensor.data if kind is tensor.tensor_type else _blocks(tensor, kind, random)
        writer.add_tensor(tensor.name, data, raw_shape=data.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _kind(tensor: ReaderTensor) -> Type:
    columns, *more = (int(extent) for extent in tensor.shape)
    stem = tensor.name.removesuffix(".weight").rpartition(".")[2]
    if len(more) != 1 or columns % 32 or any(word in tensor.name for word in _LEFT_OUT):
        return tensor.tensor_type
    return Type.Q8_0 if columns % 256 else _TYPES.get(stem, Type.Q4_K)


def _blocks(tensor: ReaderTensor, kind: Type, random: np.random.Generator) -> np.ndarray:
    columns, rows = (int(extent) for extent in tensor.shape)
    width, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows, columns // width, size), np.uint8)
    _set_scales(blocks, kind, np.ones(blocks.shape[:2]))
    deviation = dequantize(blocks.reshape(rows, -1), kind).std()
    wanted = dequantize(tensor.data, tensor.tensor_type).std() / deviation
    _set_scales(blocks, kind, random.uniform(0.5, 1.5, blocks.shape[:2]) * wanted)
    return blocks.reshape(rows, -1)


def _set_scales(blocks: np.ndarray, kind: Type, scales: np.ndarray) -> None:
    places = [(_SCALE[kind], 1.0), *([_MINIMUM[kind]] if kind in _MINIMUM else [])]
    for at, factor in places:
        blocks[..., at : at + 2] = (scales * factor).astype("<f2")[..., None].view(np.uint8)
