"""The activation between the projections, and its gradient: of `KTMoEWrapper`'s swiglu_limit and alpha."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Swiglu:
    """silu(gate) * up, with `limit` first clamping gate from above and up on both sides; with `alpha`,
    gate * sigmoid(alpha * gate) * (up + 1). 0 = without."""

    limit: float = 0.0
    alpha: float = 0.0

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = self._clamped(gate, up)
        return gate * torch.sigmoid((self.alpha or 1.0) * gate) * self._factor(up)

    def backward(
        self, d: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of gate and up. A value at the limit itself is not held back by it."""
        held_gate, held_up = gate > self.limit, up.abs() > self.limit
        gate, up = self._clamped(gate, up)
        slope = self.alpha or 1.0
        sigmoid = torch.sigmoid(slope * gate)
        d_gate = d * self._factor(up) * sigmoid * (1 + slope * gate * (1 - sigmoid))
        d_up = d * gate * sigmoid
        if self.limit:
            d_gate, d_up = d_gate.masked_fill(held_gate, 0.0), d_up.masked_fill(held_up, 0.0)
        return d_gate, d_up

    def _clamped(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.limit:
            return gate, up
        return gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)

    def _factor(self, up: torch.Tensor) -> torch.Tensor:
        return up + 1 if self.alpha else up
