"""Shared by the tests of the interface: small layers, a float64 reference, checkpoints of every family."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from kt_kernel import KTMoEWrapper

# Small, and no size is a multiple of 32 except by accident: the interface must not care.
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, MAX_TOKENS = 8, 3, 72, 40, 64

# Bound of the normalised mean squared error against exact weights and double sums (bf16 activations).
NMSE_BOUND = 1e-5


def random_experts(seed: int, experts: int = EXPERTS, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE):
    """bf16 gate, up [E, I, H] and down [E, H, I]."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(experts, rows, columns, generator=generator) / columns**0.5).bfloat16()

    return matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate)


def random_call(
    seed: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    experts: int = EXPERTS,
    hidden_size: int = HIDDEN,
):
    """hidden [tokens, H], ids [tokens, k] without repeats in a token, weights [tokens, k]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, ids = scores.topk(TOP_K, dim=1)
    return hidden, ids, weights.contiguous()


def reference(experts, hidden, ids, weights, skip=()) -> torch.Tensor:
    """The same sum in float64, expert by expert; ids below 0 and experts in `skip` add nothing.

    The activations are those of the method: hidden rounded to bf16.
    """
    hidden = hidden.bfloat16()
    gate, up, down = (tensor.double() for tensor in experts)
    output = torch.zeros(hidden.shape[0], hidden.shape[1], dtype=torch.float64)
    for token in range(hidden.shape[0]):
        x = hidden[token].double()
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            if expert >= 0 and expert not in skip:
                middle = torch.nn.functional.silu(gate[expert] @ x) * (up[expert] @ x)
                output[token] += weight * (down[expert] @ middle)
    return output


def nmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).square().sum() / expected.square().sum())


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not expected.any():
        assert not actual.any(), "expected zeros"
        return
    error = nmse(actual, expected)
    assert error <= NMSE_BOUND, f"NMSE {error:.2e} is above {NMSE_BOUND:.0e}"


def make_wrapper(**changes) -> KTMoEWrapper:
    """A layer with the sizes above; keywords replace single arguments."""
    arguments = {
        "layer_idx": 0,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "cpuinfer_threads": 2,
        "threadpool_count": 1,
        "weight_path": "",
        "chunked_prefill_size": MAX_TOKENS,
        "method": "BF16",
    }
    return KTMoEWrapper(**{**arguments, **changes})


def loaded_wrapper(experts, **changes) -> KTMoEWrapper:
    wrapper = make_wrapper(**changes)
    wrapper.load_weights_from_tensors(*experts, torch.arange(wrapper.num_experts))
    return wrapper


def one_by_one(experts, base: str, names: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    """Checkpoint tensors `{base}.{expert}.{name}.weight` for gate, up, down."""
    return {
        f"{base}.{expert}.{name}.weight": matrices[expert].clone()
        for name, matrices in zip(names, experts, strict=True)
        for expert in range(matrices.shape[0])
    }


def qwen_tensors(experts, layer: int = 0) -> dict[str, torch.Tensor]:
    return one_by_one(experts, f"model.layers.{layer}.mlp.experts", ("gate_proj", "up_proj", "down_proj"))


def save_single(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """One file, no index."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


def save_sharded(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    """Several files and an index; neighbouring tensors land in different files."""
    directory.mkdir(exist_ok=True)
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
