"""What is measured: the two reference shapes, and routing that changes with every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer; `experts` is small enough that two copies of bf16 weights fit in 4 GiB."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate

    def flops(self, tokens: int) -> float:
        """Multiply-adds count twice."""
        return 2.0 * tokens * self.top_k * self.expert_elements


SHAPES = {
    "S": Shape("S", hidden=2048, intermediate=768, experts=128, top_k=8),  # Qwen3-30B-A3B
    "L": Shape("L", hidden=7168, intermediate=2048, experts=16, top_k=8),  # DeepSeek-V3, 16 of 256 experts
}


@dataclass(frozen=True)
class Call:
    """Tokens: hidden bf16 [T, H]; ids int64 [T, k], distinct within a token; weights fp32 [T, k]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @property
    def distinct_experts(self) -> int:
        """How many experts' weights have to be read."""
        return int(self.ids.unique().numel())


def random_call(shape: Shape, tokens: int, seed: int) -> Call:
    """Random tokens whose experts are drawn evenly; the weights of a token sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, shape.experts, generator=generator)
    weights, ids = scores.topk(shape.top_k)
    hidden = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
    return Call(hidden, ids, weights / weights.sum(-1, keepdim=True))
