"""The yardstick: the same layer in plain torch bf16, `linear` per expert and `index_add_`."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu
from workload import Call, Experts


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
