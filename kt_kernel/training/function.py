"""The autograd function of a layer's experts: any number of forward passes may be alive.

What a forward pass saves are tensors of its own in the autograd context, so they go when the graph goes, and
torch.utils.checkpoint, in both of its modes, drops and recomputes them as it does with every other tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from kt_kernel.adapters.backend import Backend, Call, Dropout, ExpertLora, Needs
from kt_kernel.errors import CallOrderError

_LORA = 6
_MASKS = 3
_NOTHING = Needs(x=False, weights=False, lora=False)


class Matrices(NamedTuple):
    """The experts' own weights as parameters: gate over up [E, 2I, H], and down [E, H, I].

    `generation`: a number that changes when the backend computes with other values.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    generation: Callable[[], int]


def run_experts(
    backend: Backend,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    lora: ExpertLora | None = None,
    dropout: Dropout | None = None,
    matrices: Matrices | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, [T, H] in x's dtype, differentiable in all but the ids.

    As the fields of `Call`. `matrices`: what the backend computes with, where it is to have gradients, in its
    dtype. What is saved for the backward pass is decided by the gradients that inputs ask for, not by any
    module's training mode.
    """
    if not torch.is_grad_enabled():
        with _exactly():
            return backend.forward(Call(x, ids, weights, lora, dropout), _NOTHING)[0]
    six: tuple[torch.Tensor | None, ...] = (None,) * _LORA if lora is None else lora.tensors
    scale = 1.0 if lora is None else lora.scale
    gate_up, down, generation = matrices or (None, None, None)
    return _Experts.apply(backend, generation, scale, dropout, x, ids, weights, gate_up, down, *six)


def _exactly() -> torch.autocast:
    """Whatever autocast the model runs under: backends say themselves in which dtype they compute."""
    return torch.autocast("cpu", enabled=False)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        generation: Callable[[], int] | None,
        scale: float,
        dropout: Dropout | None,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor | None,
        down: torch.Tensor | None,
        *lora: Any,
    ) -> torch.Tensor:
        needs_x, _, needs_weights, needs_gate_up, needs_down, *needs_lora = ctx.needs_input_grad[4:]
        needs_base = needs_gate_up or needs_down
        ctx.needs = Needs(x=needs_x, weights=needs_weights, lora=any(needs_lora), base=needs_base)
        ctx.backend, ctx.scale = backend, scale
        ctx.generation, ctx.generation_then = generation, generation and generation()
        ctx.has_lora = lora[0] is not None
        ctx.dropout_factor = None if dropout is None else dropout.factor
        call = Call(x, ids, weights, ExpertLora.of(lora, scale) if ctx.has_lora else None, dropout)
        with _exactly():
            out, saved = backend.forward(call, ctx.needs)
        masks = () if dropout is None else dropout.tensors
        # Through autograd, which notices inputs that are changed before the backward pass.
        ctx.save_for_backward(x, ids, weights, gate_up, down, *(lora if ctx.has_lora else ()), *masks, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, ids, weights, gate_up, down, *rest = ctx.saved_tensors
        if ctx.generation is not None and ctx.generation() != ctx.generation_then:
            raise CallOrderError(
                "the experts' weights have changed, and another forward pass has used them, since that of "
                "this backward pass; run it before the optimiser's step."
            )
        lora = dropout = None
        if ctx.has_lora:
            lora, rest = ExpertLora.of(rest[:_LORA], ctx.scale), rest[_LORA:]
        if ctx.dropout_factor is not None:
            dropout, rest = Dropout.of(rest[:_MASKS], ctx.dropout_factor), rest[_MASKS:]
        call = Call(x, ids, weights, lora, dropout)
        with _exactly():
            found = ctx.backend.backward(call, tuple(rest), dout.contiguous(), ctx.needs)
        base = (None, None) if found.base is None else _like(found.base, gate_up, down)
        six = found.lora or (None,) * _LORA
        wanted = ctx.needs_input_grad[-_LORA - len(base) :]
        return (
            *(None,) * 4,
            found.x,
            None,
            found.weights,
            *(matrix if want else None for matrix, want in zip((*base, *six), wanted, strict=True)),
        )


def _like(
    found: tuple[torch.Tensor, ...], gate_up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate, up and down, in the shapes and dtypes of the parameters."""
    stacked = torch.empty_like(gate_up)
    for half, gradient in zip(stacked.chunk(2, 1), found[:2], strict=True):
        half.copy_(gradient)
    return stacked, found[2].to(down.dtype)
