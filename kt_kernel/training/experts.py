"""TrainableExperts: the module that stands in for a layer's experts in a model that is fine-tuned."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from kt_kernel.adapters.backend import Backend, Dropout, ExpertLora, WeightSource
from kt_kernel.adapters.layout import NAMINGS, ProjectionNames, is_expert_tensor
from kt_kernel.checkpoint.families import GateUpRows
from kt_kernel.errors import CheckpointError, InputError
from kt_kernel.training.function import Matrices, run_experts

LOAD_IT_OTHERWISE = (
    "the adapter has LoRA of the experts at '{where}', which PEFT's own loading would leave out; load it "
    "with kt_kernel.training.load_adapter."
)
_ADAPTER = re.compile(r"\.lora_([AB])\.\w+\.weight$")  # with its name, as PEFT writes it while loading


class TrainableExperts(nn.Module):
    """A layer's routed experts, computed on the CPU, with gradients for their inputs; it has no parameters.

    Its call is that of the module it replaces, in whatever device and dtype the model computes.
    """

    def __init__(
        self,
        backend: Backend,
        weights: WeightSource,
        names: ProjectionNames = NAMINGS[0],
        rows: GateUpRows = GateUpRows.GATE_FIRST,
    ) -> None:
        """`weights`: what the backend computes with, decoded. `names`: how the family's files call them;
        `rows`: how gate and up stand in one matrix there."""
        super().__init__()
        self.rows = rows
        self.backend, self.weights, self.names = backend, weights, names
        # What PEFT looks at in every layer that it wraps: how wide it is, and on which device.
        self.in_features = self.out_features = backend.hidden_size
        self.weight = torch.empty(0, device="cpu")
        self.register_load_state_dict_pre_hook(_refuse_adapters)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, like `hidden_states`.

        `hidden_states` [T, H] of a float dtype; `top_k_index` [T, k] expert ids; `top_k_weights` [T, k].
        """
        return self.run(hidden_states, top_k_index, top_k_weights)

    @torch.compiler.disable
    def run(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        lora: ExpertLora | None = None,
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        """`forward` with a LoRA on every expert."""
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.in_features:
            raise InputError(
                f"hidden_states has shape {list(hidden_states.shape)}, expected [tokens, {self.in_features}]."
            )
        x, weights = hidden_states.cpu(), top_k_weights.cpu()
        if x.dtype is torch.float16:  # no kernel computes in it
            x = x.float()
        if weights.dtype is not torch.float64:
            weights = weights.float()
        ids = top_k_index.to("cpu", torch.int64)
        matrices = self.matrices()  # first: it may change what the backend computes with
        inputs = (x.contiguous(), ids.contiguous(), weights.contiguous())
        out = run_experts(self.backend, *inputs, lora, dropout, matrices)
        return out.to(hidden_states.device, hidden_states.dtype)

    def matrices(self) -> Matrices | None:
        """The weights that have gradients of their own, with which the backend computes from now on."""
        return None

    def extra_repr(self) -> str:
        backend = self.backend
        return (
            f"experts={backend.num_experts}, hidden={backend.hidden_size}, "
            f"intermediate={backend.intermediate_size}, {type(backend).__name__}"
        )


def _refuse_adapters(module: TrainableExperts, state: dict, prefix: str, *rest: Any) -> None:
    """Before load_state_dict, which says nothing of names that nobody has."""
    for key in state:
        if key.startswith(prefix) and is_expert_tensor(_ADAPTER.sub(r".lora_\1.weight", key[len(prefix) :])):
            raise CheckpointError(LOAD_IT_OTHERWISE.format(where=prefix.removesuffix(".")))
