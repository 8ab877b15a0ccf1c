"""A random Qwen3-MoE as a GGUF file of 16-bit numbers, with a tokenizer: what a quantiser starts from.

Weights keep the size of what they multiply, as bench/random_moe.py has it; the columns of a matrix differ in
size as a trained model's do, so that blocks of a row have scales of their own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from gguf_writing import Stored, Type, numbers, write
from tokenizers import pre_tokenizers

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import ik_llama
from random_moe import Size

ARCHITECTURE = "qwen3moe"
CONTEXT = 4096
ROPE_THETA = 1e6
RMS_EPS = 1e-6

# For CI. K-quants have blocks of 256 columns: TINY's matrices are made of them, and NARROW's down (128
# columns) is not, which makes quantisers take another type for it.
TINY = Size(256, 256, experts=16, top_k=4, layers=4, heads=4, kv_heads=2, head_dim=64, vocabulary=512)
NARROW = replace(TINY, intermediate=128)
# Qwen3-30B-A3B's layers; three of them are 1.1 GB in Q4_K_M and 3.9 GB in 16 bits.
REAL = Size(2048, 768, experts=128, top_k=8, layers=3, heads=32, kv_heads=4, head_dim=128, vocabulary=4096)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("in", "g")]
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # GGUF's kinds of tokens

# Deviation of an entry as a multiple of inputs ** -0.5, where it is not 1. Attention that looks everywhere
# and a router that is sure of its choice keep rounding from changing what comes next, as training does.
_FACTORS = {"attn_q": 0.5, "attn_k": 0.5, "ffn_gate_inp": 4.0, "output": 3.0}


def write_qwen3_moe(path: Path, size: Size, kind: Type = Type.F16) -> Path:
    """Write the file; the same bytes every time."""
    return write(path, ARCHITECTURE, _metadata(size, kind), _tensors(size, kind))


def write_importance_of(path: Path, size: Size) -> Path:
    """An importance matrix for the types that quantisers refuse to write without one; some columns matter
    more.
    """
    weights = {}
    for seed, (name, shape) in enumerate(_shapes(size)):
        if len(shape) > 1:
            generator = torch.Generator().manual_seed(seed)
            columns = shape[-1] * (shape[0] if len(shape) == 3 else 1)
            weights[f"{name}.weight"] = (0.3 * torch.randn(columns, generator=generator)).exp().tolist()
    return ik_llama.write_importance(path, weights)


def _metadata(size: Size, kind: Type) -> dict[str, object]:
    own = {
        "block_count": size.layers,
        "context_length": CONTEXT,
        "embedding_length": size.hidden,
        "feed_forward_length": 3 * size.hidden,
        "expert_feed_forward_length": size.intermediate,
        "expert_count": size.experts,
        "expert_used_count": size.top_k,
        "attention.head_count": size.heads,
        "attention.head_count_kv": size.kv_heads,
        "attention.key_length": size.head_dim,
        "attention.value_length": size.head_dim,
        "attention.layer_norm_rms_epsilon": RMS_EPS,
        "rope.freq_base": ROPE_THETA,
    }
    return {
        "general.type": "model",
        "general.name": "Random Qwen3 MoE",
        "general.file_type": {Type.F32: 0, Type.F16: 1, Type.BF16: 32}[kind],
        "general.quantization_version": 2,
        **{f"{ARCHITECTURE}.{key}": value for key, value in own.items()},
        **_tokenizer(size.vocabulary),
    }


def _tokenizer(vocabulary: int) -> dict[str, object]:
    """Bytes and a few merges, then the chat template's markers; unused names fill the vocabulary."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in _MERGES]
    kinds = [_NORMAL] * len(tokens) + [_CONTROL] * len(_MARKERS)
    tokens += _MARKERS
    spare = vocabulary - len(tokens)
    end, start, stop = (tokens.index(marker) for marker in _MARKERS)
    assert start < stop
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(spare)],
        "tokenizer.ggml.token_type": kinds + [_UNUSED] * spare,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _MERGES],
        "tokenizer.ggml.eos_token_id": stop,
        "tokenizer.ggml.padding_token_id": end,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, experts, inner = size.hidden, size.experts, size.intermediate
    yield "token_embd", (size.vocabulary, hidden)
    for layer in range(size.layers):
        for part, shape in {
            "attn_norm": (hidden,),
            "attn_q": (size.heads * size.head_dim, hidden),
            "attn_k": (size.kv_heads * size.head_dim, hidden),
            "attn_v": (size.kv_heads * size.head_dim, hidden),
            "attn_output": (hidden, size.heads * size.head_dim),
            "attn_q_norm": (size.head_dim,),
            "attn_k_norm": (size.head_dim,),
            "ffn_norm": (hidden,),
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, inner, hidden),
            "ffn_up_exps": (experts, inner, hidden),
            "ffn_down_exps": (experts, hidden, inner),
        }.items():
            yield f"blk.{layer}.{part}", shape
    yield "output_norm", (hidden,)
    yield "output", (size.vocabulary, hidden)


def _tensors(size: Size, kind: Type) -> Iterator[Stored]:
    for seed, (name, shape) in enumerate(_shapes(size)):
        is_matrix = len(shape) > 1 and "ffn_gate_inp" not in name  # as converters of published models do
        make = functools.partial(_random, name.rpartition(".")[2], shape, seed)
        yield numbers(f"{name}.weight", shape, kind if is_matrix else Type.F32, make)


def _random(part: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape, generator=generator)
    if part == "token_embd":
        return matrix
    columns = (0.3 * torch.randn(shape[-1], generator=generator)).exp()
    return matrix.mul_(columns * (_FACTORS.get(part, 1.0) * shape[-1] ** -0.5))
