"""The yardstick: the same layer in plain torch bf16, `linear` per expert and `index_add_`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu

from kt_kernel.bench.layer import random_expert
from kt_kernel.bench.shapes import Call, Shape


@dataclass(frozen=True)
class Experts:
    gate: torch.Tensor  # bf16 [E, I, H]
    up: torch.Tensor  # bf16 [E, I, H]
    down: torch.Tensor  # bf16 [E, H, I]


def copies_of_one_expert(shape: Shape) -> Experts:
    """The weights of `kt_kernel.bench.layer.RandomLayer`: equal experts, each in memory of its own."""
    return Experts(*(matrix.repeat(shape.experts, 1, 1) for matrix in random_expert(shape)))


@torch.inference_mode()
def torch_experts(experts: Experts, call: Call) -> torch.Tensor:
    out = torch.zeros(call.hidden.shape, dtype=torch.float32)
    for expert in call.ids.unique().tolist():
        token, place = (call.ids == expert).nonzero(as_tuple=True)
        rows = call.hidden[token]
        product = silu(linear(rows, experts.gate[expert])) * linear(rows, experts.up[expert])
        partial = linear(product, experts.down[expert]).float()
        out.index_add_(0, token, partial * call.weights[token, place, None])
    return out.to(call.hidden.dtype)
