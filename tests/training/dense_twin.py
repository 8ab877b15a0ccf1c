"""The same model in plain transformers with a LoRA for each expert, by torch's autograd alone: the yardstick.

twin = DenseTwin(path, trained)     trained: a model of ours with an adapter, whose LoRA the twin copies
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

from kt_kernel.training.lora import LoraExperts


class DenseLoraExperts(nn.Module):
    """Experts of transformers [E, 2I, H], [E, H, I] with the LoRA of one of our layers."""

    def __init__(self, experts: nn.Module, ours: LoraExperts) -> None:
        super().__init__()
        lora = ours.expert_lora("default")
        self.gate_up, self.down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        self.lora = nn.ParameterList(tensor.detach().clone() for tensor in lora.tensors)
        self.scale = lora.scale

    def forward(self, hidden_states, top_k_index, top_k_weights):
        gate_a, gate_b, up_a, up_b, down_a, down_b = self.lora
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for e in range(len(self.gate_up)):
            token, place = (top_k_index == e).nonzero(as_tuple=True)
            if not len(token):
                continue
            x = hidden_states[token].float()
            gate_w, up_w = self.gate_up[e].float().chunk(2)
            gate = linear(x, gate_w) + self.scale * linear(linear(x, gate_a[e]), gate_b[e])
            up = linear(x, up_w) + self.scale * linear(linear(x, up_a[e]), up_b[e])
            h = silu(gate) * up
            y = linear(h, self.down[e].float()) + self.scale * linear(linear(h, down_a[e]), down_b[e])
            out = out.index_add(0, token, y * top_k_weights[token, place].float().unsqueeze(1))
        return out.to(hidden_states.dtype)


def dense_twin(path: Path, trained: nn.Module, config: LoraConfig, dtype: torch.dtype) -> nn.Module:
    """transformers' model of the checkpoint with the LoRA of `trained`, copied; trainable like it.

    `config`: of everything beside the experts.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    twin = get_peft_model(model, config)
    base = twin.get_base_model()
    base.requires_grad_(False)
    ours = {name: module for name, module in trained.named_modules() if isinstance(module, LoraExperts)}
    assert ours
    for name, layer in ours.items():
        path_in_base = name.removeprefix("base_model.model.")
        parent, _, last = path_in_base.rpartition(".")
        setattr(base.get_submodule(parent), last, DenseLoraExperts(base.get_submodule(path_in_base), layer))
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name and name in theirs:
                theirs[name].copy_(parameter)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_("lora" in name)
    return twin
