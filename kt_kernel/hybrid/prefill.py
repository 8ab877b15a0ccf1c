"""Layerwise prefill: a long prompt's rows meet whole layers on the device instead of the CPU's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kt_kernel.hybrid.layer import HybridLayer
    from kt_kernel.hybrid.model import HybridModel


class LayerwisePrefill:
    def __init__(self, model: HybridModel, threshold: int) -> None:
        self._model = model
        self._threshold = threshold

    def begin_pass(self) -> None:
        """A new forward pass begins; one that is not finished was given up."""

    def run(
        self, layer: HybridLayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """The layer's output from experts on the device alone; None if this call is not for it."""
        return None
