"""Random layers of experts for the tests of this folder, and the same computed by autograd alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kt_kernel.adapters.backend import Dropout, ExpertLora
from kt_kernel.swiglu import Swiglu
from kt_kernel.training.reference import StackedWeights


@dataclass(frozen=True)
class Sizes:
    """As in kt_kernel/adapters/backend.py."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    rank: int


@dataclass
class Layer:
    """A `StackedWeights` and the inputs of a call; `lora` without zeros, so that every gradient shows."""

    weights: StackedWeights
    x: torch.Tensor
    ids: torch.Tensor
    routing: torch.Tensor
    lora: ExpertLora


def random_layer(sizes: Sizes, dtype: torch.dtype = torch.float64, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)

    t, k, e, h, i, r = vars(sizes).values()
    weights = StackedWeights(
        random(e, i, h, scale=h**-0.5), random(e, i, h, scale=h**-0.5), random(e, h, i, scale=i**-0.5)
    )
    lora = ExpertLora(
        random(e, r, h, scale=h**-0.5),
        random(e, i, r, scale=0.5),
        random(e, r, h, scale=h**-0.5),
        random(e, i, r, scale=0.5),
        random(e, r, i, scale=i**-0.5),
        random(e, h, r, scale=0.5),
        scale=0.7,
    )
    scores = torch.rand(t, e, generator=generator)
    ids = scores.topk(k, 1).indices
    return Layer(weights, random(t, h), ids, random(t, k, scale=0.5), lora)


def autograd_experts(
    layer: Layer, swiglu: Swiglu | None = None, dropout: Dropout | None = None
) -> torch.Tensor:
    """The output of a layer by differentiable operations of torch, pair by pair; knows no backend."""
    weights, lora, rows = layer.weights, layer.lora, []
    limit, alpha = (swiglu.limit, swiglu.alpha) if swiglu else (0.0, 0.0)

    def product(w, a, b, x, mask):
        inputs = x if mask is None else x * mask.to(x.dtype) * dropout.factor
        return w @ x + lora.scale * (b @ (a @ inputs))

    for token in range(layer.ids.shape[0]):
        total = torch.zeros_like(layer.x[token])
        for j, e in enumerate(layer.ids[token].tolist()):
            if not 0 <= e < weights.num_experts:
                continue
            pair = token * layer.ids.shape[1] + j
            kept = [None] * 3 if dropout is None else [mask[pair] for mask in dropout.tensors]
            x = layer.x[token]
            g = product(weights.gate[e], lora.gate_a[e], lora.gate_b[e], x, kept[0])
            u = product(weights.up[e], lora.up_a[e], lora.up_b[e], x, kept[1])
            if limit:
                g, u = g.clamp(max=limit), u.clamp(-limit, limit)
            h = g * torch.sigmoid(alpha * g) * (u + 1) if alpha else torch.nn.functional.silu(g) * u
            y = product(weights.down[e], lora.down_a[e], lora.down_b[e], h, kept[2])
            total = total + layer.routing[token, j] * y
        rows.append(total)
    return torch.stack(rows)
