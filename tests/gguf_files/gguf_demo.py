"""The demo mixture of experts (kt_kernel/demo) as a GGUF file made of another file's own blocks.

SmolLM2's Q4_1 blocks were written by whoever quantised it. Each dense MLP is cut into experts as
kt_kernel/demo/experts.py explains: gate and up by rows, down by columns at the borders of blocks. down counts
once per expert, so its scales and minimums are multiplied by their number, exactly, as it is a power of two;
no code changes. The architecture is "llama" with experts, as Mixtral's files have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quant_shape_from_byte_shape
from gguf_writing import Stored, Type, numbers, write

from kt_kernel.demo.experts import NUM_EXPERTS
from kt_kernel.demo.gguf_source import find_source

_, _BLOCK_BYTES = GGML_QUANT_SIZES[Type.Q4_1]
_SCALE_AND_MINIMUM = 4  # bytes at the start of a Q4_1 block: two fp16


def write_demo_moe(path: Path) -> Path:
    """Write the file (98 MB); raises DemoError where the package with the source is missing."""
    reader = GGUFReader(find_source().path)
    metadata = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith(("GGUF.", "general.architecture"))
    }
    metadata |= {
        "llama.expert_count": NUM_EXPERTS,
        "llama.expert_used_count": NUM_EXPERTS,
        "llama.feed_forward_length": metadata["llama.feed_forward_length"] // NUM_EXPERTS,
    }
    hidden = metadata["llama.embedding_length"]
    return write(path, "llama", metadata, _tensors(reader, hidden))


def _tensors(reader: GGUFReader, hidden: int) -> Iterator[Stored]:
    for tensor in reader.tensors:
        block, _, part = tensor.name.rpartition(".ffn_")
        if part == "gate.weight":
            router = torch.zeros(NUM_EXPERTS, hidden)
            yield numbers(f"{block}.ffn_gate_inp.weight", (NUM_EXPERTS, hidden), Type.F32, router.clone)
        if part in ("gate.weight", "up.weight"):
            yield _stored(f"{block}.ffn_{part[:-7]}_exps.weight", tensor, _rows_of_experts(tensor.data))
        elif part == "down.weight":
            assert tensor.tensor_type is Type.Q4_1, tensor.tensor_type
            yield _stored(f"{block}.ffn_down_exps.weight", tensor, _columns_of_experts(tensor.data))
        else:
            yield _stored(tensor.name, tensor, tensor.data)


def _stored(name: str, source: ReaderTensor, data: np.ndarray) -> Stored:
    if data.dtype == np.uint8:
        shape = quant_shape_from_byte_shape(data.shape, source.tensor_type)
    else:
        shape = data.shape
    return Stored(name, tuple(map(int, shape)), source.tensor_type, lambda: data.reshape(-1).view(np.uint8))


def _rows_of_experts(blocks: np.ndarray) -> np.ndarray:
    rows, row_bytes = blocks.shape
    return blocks.reshape(NUM_EXPERTS, rows // NUM_EXPERTS, row_bytes)


def _columns_of_experts(blocks: np.ndarray) -> np.ndarray:
    rows, row_bytes = blocks.shape
    parts = blocks.reshape(rows, NUM_EXPERTS, row_bytes // NUM_EXPERTS).transpose(1, 0, 2).copy()
    by_block = parts.reshape(*parts.shape[:2], -1, _BLOCK_BYTES)
    factors = by_block[..., :_SCALE_AND_MINIMUM].copy().view(np.float16) * np.float16(NUM_EXPERTS)
    assert np.isfinite(factors).all()
    by_block[..., :_SCALE_AND_MINIMUM] = factors.view(np.uint8)
    return parts
