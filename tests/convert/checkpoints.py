"""Small checkpoints in every way in which inputs are stored, with the numbers that they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from yardstick import bf16, blocks_of, e4m3

EXPERTS, HIDDEN, INTERMEDIATE = 3, 256, 384
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Stored:
    """The tensors of one matrix by suffix, and the float32 [N, K] that they mean."""

    tensors: dict[str, torch.Tensor]
    numbers: np.ndarray


# random generator, N, K -> a matrix
Maker = Callable[[np.random.Generator, int, int], Stored]


def stored_bf16(random: np.random.Generator, n: int, k: int) -> Stored:
    bits = (random.normal(0, 0.02, (n, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return Stored({"weight": torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)}, bf16(bits))


def stored_fp16(random: np.random.Generator, n: int, k: int) -> Stored:
    """With many subnormal halves, which start below 6e-5."""
    halves = random.normal(0, 1e-4, (n, k)).astype(np.float16)
    return Stored({"weight": torch.from_numpy(halves)}, halves.astype(np.float32))


def _float8(random: np.random.Generator, n: int, k: int) -> np.ndarray:
    codes = random.integers(0, 256, (n, k), dtype=np.uint8)
    return np.where(codes & 0x7F == 0x7F, np.uint8(0x28), codes)


def stored_fp8_blocks(random: np.random.Generator, n: int, k: int) -> Stored:
    codes = _float8(random, n, k)
    scales = random.uniform(1e-4, 1e-3, (-(-n // 128), -(-k // 128))).astype(np.float32)
    tensors = {
        "weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        "weight_scale_inv": torch.from_numpy(scales),
    }
    return Stored(tensors, e4m3(codes) * blocks_of(scales, (n, k), (128, 128)))


def stored_fp8_rows(random: np.random.Generator, n: int, k: int) -> Stored:
    codes = _float8(random, n, k)
    scales = random.uniform(1e-4, 1e-3, (n, 1)).astype(np.float32)
    tensors = {
        "weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        "weight_scale": torch.from_numpy(scales),
    }
    return Stored(tensors, e4m3(codes) * scales)


def stored_mxfp8(random: np.random.Generator, n: int, k: int) -> Stored:
    codes = _float8(random, n, k)
    powers = random.integers(112, 120, (n, k // 32), dtype=np.uint8)
    tensors = {
        "weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        "weight_scale_inv": torch.from_numpy(powers),
    }
    scales = np.exp2(powers.astype(np.float32) - 127)
    return Stored(tensors, e4m3(codes) * np.repeat(scales, 32, axis=1))


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _pairs(random: np.random.Generator, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [N, K/2], and their codes [N, K]."""
    octets = random.integers(0, 256, (n, k // 2), dtype=np.uint8)
    return octets, np.stack((octets & 15, octets >> 4), axis=-1).reshape(n, k)


def stored_mxfp4(random: np.random.Generator, n: int, k: int) -> Stored:
    octets, codes = _pairs(random, n, k)
    powers = random.integers(112, 120, (n, k // 32), dtype=np.uint8)
    scales = np.exp2(powers.astype(np.float32) - 127)
    tensors = {"weight": torch.from_numpy(octets), "scale": torch.from_numpy(powers)}
    return Stored(tensors, _E2M1[codes] * np.repeat(scales, 32, axis=1))


def stored_nvfp4(random: np.random.Generator, n: int, k: int) -> Stored:
    octets, codes = _pairs(random, n, k)
    scales = random.integers(0x20, 0x70, (n, k // 16), dtype=np.uint8)
    tensors = {
        "weight": torch.from_numpy(octets),
        "weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.01),
    }
    return Stored(tensors, _E2M1[codes] * np.repeat(e4m3(scales), 16, axis=1) * np.float32(0.01))


def _halves(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.uniform(1e-3, 1e-2, shape).astype(np.float16)


def stored_compressed_tensors(random: np.random.Generator, n: int, k: int) -> Stored:
    """Eight columns to a word, codes stored plus 8."""
    octets, codes = _pairs(random, n, k)
    scales = _halves(random, n, k // 32)
    tensors = {
        "weight_packed": torch.from_numpy(octets.view(np.int32)),
        "weight_scale": torch.from_numpy(scales),
    }
    return Stored(tensors, (codes.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), 32, axis=1))


def _words(codes: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Codes [rows, 8 n] -> int32 [rows, n]; nibble p of a word is column order[p]."""
    eights = codes.reshape(codes.shape[0], -1, 8).astype(np.uint32)
    words = sum(eights[..., column] << np.uint32(4 * place) for place, column in enumerate(order))
    return np.ascontiguousarray(words.astype(np.uint32).view(np.int32))


def stored_gptq(random: np.random.Generator, n: int, k: int) -> Stored:
    """Eight inputs to a word."""
    codes = random.integers(0, 16, (n, k), dtype=np.uint8)
    scales = _halves(random, n, k // 128)
    tensors = {
        "qweight": torch.from_numpy(_words(codes, tuple(range(8))).T.copy()),
        "scales": torch.from_numpy(scales.T.copy()),
        "qzeros": torch.full((k // 128, n // 8), 0x77777777, dtype=torch.int32),
    }
    return Stored(tensors, (codes.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), 128, axis=1))


def stored_awq(random: np.random.Generator, n: int, k: int) -> Stored:
    """Eight outputs to a word, in AWQ's order, and zero points."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes = random.integers(0, 16, (k, n), dtype=np.uint8)
    zeros = random.integers(0, 16, (k // 128, n), dtype=np.uint8)
    scales = _halves(random, k // 128, n)
    numbers = codes.astype(np.float32) - np.repeat(zeros, 128, axis=0).astype(np.float32)
    tensors = {
        "qweight": torch.from_numpy(_words(codes, order)),
        "qzeros": torch.from_numpy(_words(zeros, order)),
        "scales": torch.from_numpy(scales),
    }
    return Stored(tensors, (numbers * np.repeat(scales.astype(np.float32), 128, axis=0)).T)


def _stored_gptq_zeros(
    random: np.random.Generator, n: int, k: int, less: int, group_of: np.ndarray
) -> Stored:
    """With zero points, stored less `less`, and the group of each input."""
    codes = random.integers(0, 16, (n, k), dtype=np.uint8)
    zeros = random.integers(1, 16, (n, k // 128), dtype=np.uint8)
    scales = _halves(random, n, k // 128)
    in_order = tuple(range(8))
    tensors = {
        "qweight": torch.from_numpy(_words(codes, in_order).T.copy()),
        "scales": torch.from_numpy(scales.T.copy()),
        "qzeros": torch.from_numpy(_words(zeros.T - less, in_order)),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    numbers = codes.astype(np.float32) - zeros[:, group_of].astype(np.float32)
    return Stored(tensors, numbers * scales[:, group_of].astype(np.float32))


def stored_gptq_zeros(random: np.random.Generator, n: int, k: int) -> Stored:
    return _stored_gptq_zeros(random, n, k, 1, np.arange(k) // 128)


def stored_gptq_order(random: np.random.Generator, n: int, k: int) -> Stored:
    """Of the second file format, with inputs of a group anywhere."""
    return _stored_gptq_zeros(random, n, k, 0, random.permutation(np.arange(k) // 128))


FORMATS = {
    "bf16": stored_bf16,
    "fp16": stored_fp16,
    "fp8-blocks": stored_fp8_blocks,
    "fp8-rows": stored_fp8_rows,
    "mxfp8": stored_mxfp8,
    "mxfp4": stored_mxfp4,
    "nvfp4": stored_nvfp4,
    "compressed-tensors": stored_compressed_tensors,
    "gptq": stored_gptq,
    "gptq-zeros": stored_gptq_zeros,
    "gptq-order": stored_gptq_order,
    "awq": stored_awq,
}

QUANTISED_CONFIG = {
    "gptq-zeros": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False},
    "gptq-order": {"quant_method": "gptq", "bits": 4, "desc_act": True, "checkpoint_format": "gptq_v2"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}


# (prefix of a layer's experts, names of gate, up and down)
FAMILIES = {
    "deepseek": ("model.layers.{layer}.mlp.experts", PROJECTIONS),
    "multimodal": ("model.language_model.layers.{layer}.mlp.experts", PROJECTIONS),
    "mixtral": ("model.layers.{layer}.block_sparse_moe.experts", ("w1", "w3", "w2")),
    "mistral": ("layers.{layer}.experts", ("w1", "w3", "w2")),
    "deepseek-v4": ("layers.{layer}.ffn.experts", ("w1", "w3", "w2")),
}


def matrix_shape(projection: str) -> tuple[int, int]:
    return (HIDDEN, INTERMEDIATE) if projection == "down_proj" else (INTERMEDIATE, HIDDEN)


def write_checkpoint(
    folder: Path,
    maker: Maker,
    *,
    layers: tuple[int, ...] = (1, 2),
    family: str = "deepseek",
    config: dict | None = None,
    seed: int = 11,
) -> dict[str, np.ndarray]:
    """One file per layer and an index; returns the numbers by the names of the output, without suffix."""
    random = np.random.default_rng(seed)
    base, theirs = FAMILIES[family]
    numbers: dict[str, np.ndarray] = {}
    weight_map: dict[str, str] = {}
    folder.mkdir(parents=True)
    for layer in layers:
        tensors = {
            f"{base.format(layer=layer).partition('.experts')[0]}.gate.weight": torch.zeros(EXPERTS, HIDDEN)
        }
        for expert in range(EXPERTS):
            for ours, name in zip(PROJECTIONS, theirs, strict=True):
                stored = maker(random, *matrix_shape(ours))
                numbers[f"model.layers.{layer}.mlp.experts.{expert}.{ours}"] = stored.numbers
                for suffix, tensor in stored.tensors.items():
                    tensors[f"{base.format(layer=layer)}.{expert}.{name}.{suffix}"] = tensor
        file = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    described = {"num_experts": EXPERTS, "num_hidden_layers": layers[-1] + 1, **(config or {})}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "tokenizer.json").write_text("{}")
    return numbers


def write_format(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """`write_checkpoint` of one of FORMATS, with its quantization_config."""
    said = QUANTISED_CONFIG.get(kind)
    return write_checkpoint(folder, FORMATS[kind], config={"quantization_config": said} if said else {})


def write_packed(folder: Path, dtype: torch.dtype, *, inputs_are_rows: bool) -> dict[str, np.ndarray]:
    """gate and up in one tensor for all experts, down in another: [E, 2I, H] or [E, H, 2I]."""
    generator = torch.Generator().manual_seed(5)
    folder.mkdir(parents=True)
    gate_up = (torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 50).to(dtype)
    down = (torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / 50).to(dtype)
    numbers = {}
    for expert in range(EXPERTS):
        for projection, matrix in (
            ("gate_proj", gate_up[expert, :INTERMEDIATE]),
            ("up_proj", gate_up[expert, INTERMEDIATE:]),
            ("down_proj", down[expert]),
        ):
            numbers[f"model.layers.0.mlp.experts.{expert}.{projection}"] = matrix.float().numpy()
    if inputs_are_rows:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    base = "model.layers.0.mlp.experts"
    save_file({f"{base}.gate_up_proj": gate_up, f"{base}.down_proj": down}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_experts": EXPERTS, "num_hidden_layers": 1}))
    return numbers
