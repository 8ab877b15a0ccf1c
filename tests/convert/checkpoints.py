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
