"""Dense layers over weights as the checkpoint has them (`convert_weight_packed` packs nothing)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def convert_weight_packed(weight: Tensor) -> Tensor:
    return weight.clone()


def weight_packed_linear(mat1: Tensor, mat2: Tensor, bias: Tensor | None, is_vnni: bool) -> Tensor:
    """mat1 [.., K], mat2 [N, K], bias [N] -> [.., N] of mat1's type."""
    return F.linear(mat1.float(), mat2.float(), None if bias is None else bias.float()).to(mat1.dtype)


def fused_input_proj(
    hidden_states: Tensor, qkvz_weight: Tensor, ba_weight: Tensor, is_vnni: bool
) -> tuple[Tensor, Tensor]:
    """Both projections of a gated delta layer."""
    return (
        weight_packed_linear(hidden_states, qkvz_weight, None, is_vnni),
        weight_packed_linear(hidden_states, ba_weight, None, is_vnni),
    )


OPERATORS = {
    "sgl_kernel::convert_weight_packed": ("(Tensor weight) -> Tensor", convert_weight_packed),
    "sgl_kernel::weight_packed_linear": (
        "(Tensor mat1, Tensor mat2, Tensor? bias, bool is_vnni) -> Tensor",
        weight_packed_linear,
    ),
    "sgl_kernel::fused_input_proj_cpu": (
        "(Tensor hidden_states, Tensor qkvz_weight, Tensor ba_weight, bool is_vnni) -> (Tensor, Tensor)",
        fused_input_proj,
    ),
}
