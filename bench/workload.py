"""What the benchmarks run: the two reference shapes, random experts, routing that changes with every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer; `experts` is small enough that two copies of the weights fit in 8 GiB."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def expert_elements(self) -> int:
        return 3 * self.hidden * self.intermediate

    def flops(self, tokens: int) -> float:
        """Multiply-adds count twice."""
        return 2.0 * tokens * self.top_k * self.expert_elements


SHAPES = {
    "S": Shape("S", hidden=2048, intermediate=768, experts=128, top_k=8),  # Qwen3-30B-A3B
    "L": Shape("L", hidden=7168, intermediate=2048, experts=16, top_k=8),  # DeepSeek-V3, 16 of 256 experts
}


@dataclass(frozen=True)
class Experts:
    gate: torch.Tensor  # bf16 [E, I, H]
    up: torch.Tensor  # bf16 [E, I, H]
    down: torch.Tensor  # bf16 [E, H, I]


def random_experts(shape: Shape) -> Experts:
    generator = torch.Generator().manual_seed(1)

    def matrices(rows: int, columns: int) -> torch.Tensor:
        out = torch.empty(shape.experts, rows, columns, dtype=torch.bfloat16)
        for expert in out:  # one at a time: fp32 temporaries of a whole layer would double the memory
            expert.copy_(torch.randn(rows, columns, generator=generator) * columns**-0.5)
        return out

    gate, up = (matrices(shape.intermediate, shape.hidden) for _ in range(2))
    return Experts(gate, up, matrices(shape.hidden, shape.intermediate))


@dataclass(frozen=True)
class Call:
    hidden: torch.Tensor  # bf16 [T, H]
    ids: torch.Tensor  # int64 [T, k], distinct within a token
    weights: torch.Tensor  # fp32 [T, k]

    @property
    def distinct_experts(self) -> int:
        return int(self.ids.unique().numel())


def random_call(shape: Shape, tokens: int, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, shape.experts, generator=generator)
    weights, ids = scores.topk(shape.top_k)
    hidden = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
    return Call(hidden, ids, weights / weights.sum(-1, keepdim=True))
