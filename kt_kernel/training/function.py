"""The autograd function of a layer's experts: any number of forward passes may be alive.

What a forward pass saves are tensors of its own in the autograd context, so they go when the graph goes, and
torch.utils.checkpoint, in both of its modes, drops and recomputes them as it does with every other tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kt_kernel.adapters.backend import Backend, Call, Dropout, ExpertLora, Needs

_LORA = 6
_MASKS = 3
_NOTHING = Needs(x=False, weights=False, lora=False)


def run_experts(
    backend: Backend,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    lora: ExpertLora | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, [T, H] in x's dtype, differentiable in all but the ids.

    As the fields of `Call`. What is saved for the backward pass is decided by the gradients that inputs
    ask for, not by any module's training mode.
    """
    if not torch.is_grad_enabled():
        with _exactly():
            return backend.forward(Call(x, ids, weights, lora, dropout), _NOTHING)[0]
    matrices: tuple[torch.Tensor | None, ...] = (None,) * _LORA if lora is None else lora.tensors
    scale = 1.0 if lora is None else lora.scale
    return _Experts.apply(backend, scale, dropout, x, ids, weights, *matrices)


def _exactly() -> torch.autocast:
    """Whatever autocast the model runs under: backends say themselves in which dtype they compute."""
    return torch.autocast("cpu", enabled=False)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        scale: float,
        dropout: Dropout | None,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *lora: Any,
    ) -> torch.Tensor:
        _, _, _, needs_x, _, needs_weights, *needs_lora = ctx.needs_input_grad
        ctx.needs = Needs(x=needs_x, weights=needs_weights, lora=any(needs_lora))
        ctx.backend, ctx.scale = backend, scale
        ctx.has_lora = lora[0] is not None
        ctx.dropout_factor = None if dropout is None else dropout.factor
        call = Call(x, ids, weights, ExpertLora.of(lora, scale) if ctx.has_lora else None, dropout)
        with _exactly():
            out, saved = backend.forward(call, ctx.needs)
        masks = () if dropout is None else dropout.tensors
        # Through autograd, which notices inputs that are changed before the backward pass.
        ctx.save_for_backward(x, ids, weights, *(lora if ctx.has_lora else ()), *masks, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, ids, weights, *rest = ctx.saved_tensors
        lora = dropout = None
        if ctx.has_lora:
            lora, rest = ExpertLora.of(rest[:_LORA], ctx.scale), rest[_LORA:]
        if ctx.dropout_factor is not None:
            dropout, rest = Dropout.of(rest[:_MASKS], ctx.dropout_factor), rest[_MASKS:]
        call = Call(x, ids, weights, lora, dropout)
        with _exactly():
            found = ctx.backend.backward(call, tuple(rest), dout.contiguous(), ctx.needs)
        matrices = found.lora or (None,) * _LORA
        wanted = ctx.needs_input_grad[-_LORA:]
        return (
            None,
            None,
            None,
            found.x,
            None,
            found.weights,
            *(matrix if want else None for matrix, want in zip(matrices, wanted, strict=True)),
        )
