"""The module that stands in for a layer's experts in a patched model."""

from __future__ import annotations

import torch
from torch import nn

from kt_kernel.errors import InputError
from kt_kernel.hybrid.layer import HybridLayer


class HybridExperts(nn.Module):
    """Computes a layer's routed experts through the hybrid engine; it has no parameters.

    Its call is that of the module it replaces. torch.compile leaves it out of its graphs.
    """

    def __init__(self, layer: HybridLayer) -> None:
        super().__init__()
        self.layer = layer

    @torch.compiler.disable
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        `hidden_states` [T, H]; `top_k_index` [T, k] expert ids; `top_k_weights` [T, k]. Raises InputError
        when gradients are asked for.
        """
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise InputError(
                "gradients were asked for, but the experts of a patched model compute none; run it under "
                "torch.no_grad() or torch.inference_mode()."
            )
        return self.layer.forward(hidden_states, top_k_index, top_k_weights.float())

    def extra_repr(self) -> str:
        placement = self.layer.placement.current
        return f"experts={placement.num_experts}, on_device={placement.count}"
