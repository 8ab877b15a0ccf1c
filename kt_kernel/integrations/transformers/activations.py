"""Which SwiGLU an experts module of transformers computes, of which columns: tried, not read, as its names
differ by family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kt_kernel.checkpoint.families import GateUpRows
from kt_kernel.swiglu import Swiglu


@torch.no_grad()
def swiglu_of(module: Any) -> Swiglu | None:
    """None if it computes something else between its projections.

    Tried with values small and large, so that clamping and other slopes show.
    """
    # While a model is built, the default device is meta, and the default dtype that of the model.
    values = torch.tensor([-100.0, -3.0, -0.5, 0.0, 0.5, 3.0, 100.0], dtype=torch.float32, device="cpu")
    gate, up = torch.cartesian_prod(values, values).split(1, dim=1)
    try:
        product = module._apply_gate(torch.cat((gate, up), 1))  # one of each: both orders are this
    except (AttributeError, RuntimeError):
        return None
    for swiglu in _candidates(module):
        expected = swiglu(gate, up)
        if product.shape == expected.shape and torch.allclose(product, expected):
            return swiglu
    return None


@torch.no_grad()
def gate_up_rows_of(module: Any, swiglu: Swiglu) -> GateUpRows | None:
    """Where gate and up stand in what `module` applies `swiglu` to; None if in another order."""
    gate, up = torch.tensor([[[0.5, 1.0]], [[2.0, 3.0]]], dtype=torch.float32, device="cpu")
    for rows, both in (
        (GateUpRows.GATE_FIRST, torch.cat((gate, up), 1)),
        (GateUpRows.ALTERNATING, torch.stack((gate, up), 2).flatten(1)),
    ):
        if torch.allclose(module._apply_gate(both), swiglu(gate, up)):
            return rows
    return None


def _candidates(module: Any) -> Iterator[Swiglu]:
    yield Swiglu()
    limits, alphas = (
        [float(value) for name in names if isinstance(value := getattr(module, name, None), (int, float))]
        for names in (("swiglu_limit", "limit"), ("swiglu_alpha", "alpha"))
    )
    for limit in limits:
        yield Swiglu(limit)
        yield from (Swiglu(limit, alpha) for alpha in alphas)
