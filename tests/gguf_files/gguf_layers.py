"""Small GGUF files with the experts of one or more layers in any ggml type, and the numbers they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize
from gguf_writing import Stored, Type, write

from kt_kernel import KTMoEWrapper
from kt_kernel.cli.forward_check import exact_layer

# K of both kinds of matrices is a multiple of 256, the largest block.
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, MOST_TOKENS = 4, 2, 512, 256, 16
NMSE_BOUNDS = {"bf16": 1e-5, "int8": 2e-4, "auto": 2e-4}

# Where a block keeps the fp16 numbers that everything else is multiplied with.
_HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Experts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # float64 gate, up [E, I, H] and down [E, H, I]


@dataclass(frozen=True)
class Matrices:
    """A tensor of all experts: uint8 [E, rows, bytes of a row], and the numbers float64 they mean."""

    type: str
    stored: np.ndarray
    numbers: torch.Tensor


def random_matrices(name: str, rows: int, columns: int, seed: int, experts: int = EXPERTS) -> Matrices:
    """Random bytes are weights in every type; only their scales are set, so that no number is huge."""
    random = np.random.default_rng(seed)
    if name in _PLAIN:
        values = torch.from_numpy(random.standard_normal((experts, rows, columns)) / 16).to(_PLAIN[name])
        return Matrices(name, values.view(torch.uint8).numpy(), values.double())
    width, size = GGML_QUANT_SIZES[Type[name]]
    blocks = random.integers(0, 256, (experts * rows * columns // width, size), np.uint8)
    halves = (random.uniform(0.5, 1, len(blocks)) / 512).astype("<f2").view(np.uint8).reshape(-1, 2)
    for at in _HALVES.get(name, ()):
        blocks[:, at : at + 2] = halves
    if name == "MXFP4":
        blocks[:, 0] = random.integers(120, 124, len(blocks))  # exponents of 2**-7 to 2**-4
    if name == "NVFP4":
        blocks[:, :4] = random.integers(24, 40, (len(blocks), 4))  # ue4m3 of 2**-4 to 2**-2
    if name == "IQ1_M":  # the scale has four bits in each of the last four words
        words = blocks[:, 48:56].copy().view("<u2")
        nibbles = (halves.copy().view("<u2") >> np.array([0, 4, 8, 12])) & 15
        blocks[:, 48:56] = ((words & 0x0FFF) | (nibbles << 12)).astype("<u2").view(np.uint8)
    stored = blocks.reshape(experts, rows, columns // width * size)
    numbers = dequantize(stored, Type[name]).reshape(experts, rows, columns)
    return Matrices(name, stored, torch.from_numpy(numbers.astype(np.float64)))


@dataclass(frozen=True)
class Layer:
    gate: Matrices
    up: Matrices
    down: Matrices

    @property
    def numbers(self) -> Experts:
        return self.gate.numbers, self.up.numbers, self.down.numbers


def random_layer(gate: str, up: str, down: str, seed: int = 1, *, hidden=HIDDEN, intermediate=INTERMEDIATE):
    """A layer whose matrices have these types."""
    return Layer(
        random_matrices(gate, intermediate, hidden, 3 * seed),
        random_matrices(up, intermediate, hidden, 3 * seed + 1),
        random_matrices(down, hidden, intermediate, 3 * seed + 2),
    )


def stored(name: str, kind: str, data: np.ndarray, columns: int) -> Stored:
    """A tensor of bytes [..., bytes of a row] that mean so many columns."""
    return Stored(name, (*data.shape[:-1], columns), Type[kind], lambda: np.ascontiguousarray(data))


def stacked(base: str, layer: Layer) -> list[Stored]:
    """One tensor for each of gate, up and down."""
    return [
        stored(f"{base}.ffn_{name}_exps.weight", matrices.type, matrices.stored, matrices.numbers.shape[-1])
        for name, matrices in (("gate", layer.gate), ("up", layer.up), ("down", layer.down))
    ]


def fused(base: str, layer: Layer) -> list[Stored]:
    """gate and up, of one type, in one tensor."""
    both = np.concatenate([layer.gate.stored, layer.up.stored], axis=1)
    columns = layer.gate.numbers.shape[-1]
    return [
        stored(f"{base}.ffn_gate_up_exps.weight", layer.gate.type, both, columns),
        stacked(base, layer)[2],
    ]


def one_by_one(base: str, layer: Layer) -> list[Stored]:
    """A tensor for each expert, as old files have them."""
    return [
        stored(f"{base}.ffn_{name}.{expert}.weight", matrices.type, data, matrices.numbers.shape[-1])
        for name, matrices in (("gate", layer.gate), ("up", layer.up), ("down", layer.down))
        for expert, data in enumerate(matrices.stored)
    ]


def write_model(path: Path, tensors: list[Stored], metadata: Mapping[str, object] = {}) -> Path:
    return write(path, "qwen3moe", {"qwen3moe.block_count": 2, **metadata}, tensors)


def wrapper(path: Path | str, **changes) -> KTMoEWrapper:
    """A layer of the sizes above, not loaded; keywords replace single arguments."""
    arguments = {
        "layer_idx": 0,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "cpuinfer_threads": 2,
        "threadpool_count": 1,
        "weight_path": path,
        "chunked_prefill_size": MOST_TOKENS,
        "method": "LLAMAFILE",
        "activations": "auto",
    }
    return KTMoEWrapper(**{**arguments, **changes})


def error_of(layer: KTMoEWrapper, experts: Experts, tokens: int = 5, seed: int = 7) -> float:
    """NMSE of a call against the numbers of the file and double sums."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, layer.hidden_size, generator=random).bfloat16()
    weights, ids = torch.rand(tokens, layer.num_experts, generator=random).topk(TOP_K, dim=1)
    got = layer.forward(hidden.float(), ids, weights.contiguous()).double()
    expected = exact_layer(hidden, ids, weights, *experts)
    return float((got - expected).square().sum() / expected.square().sum())
