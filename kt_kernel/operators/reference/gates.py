"""Gated activations, rounded once after the product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _halves(input: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = input.float().chunk(2, -1)
    return gate, up


def silu_and_mul(input: Tensor) -> Tensor:
    """[.., 2 * columns] -> [.., columns]: silu of the first half times the second."""
    gate, up = _halves(input)
    return (F.silu(gate) * up).to(input.dtype)


def gelu_and_mul(input: Tensor) -> Tensor:
    gate, up = _halves(input)
    return (F.gelu(gate) * up).to(input.dtype)


def gelu_tanh_and_mul(input: Tensor) -> Tensor:
    gate, up = _halves(input)
    return (F.gelu(gate, approximate="tanh") * up).to(input.dtype)


def fused_sigmoid_mul(input: Tensor, gate: Tensor) -> None:
    """input *= sigmoid(gate), which may be [tokens, heads, columns] for input [tokens, heads * columns]."""
    input.copy_(input.float() * torch.sigmoid(gate.float()).reshape(input.shape))


def fused_linear_sigmoid_mul(
    mat1: Tensor, mat2: Tensor, bias: Tensor | None, is_vnni: bool, post_mul_mat: Tensor
) -> Tensor:
    """sigmoid(mat1 @ mat2.T + bias) * post_mul_mat; mat2 [1, K] as the checkpoint has it."""
    wide_bias = None if bias is None else bias.float()
    gate = torch.sigmoid(F.linear(mat1.float(), mat2.float(), wide_bias))
    return (gate * post_mul_mat.float()).to(post_mul_mat.dtype)


_ACT = "(Tensor input) -> Tensor"

OPERATORS = {
    "sgl_kernel::silu_and_mul_cpu": (_ACT, silu_and_mul),
    "sgl_kernel::gelu_and_mul_cpu": (_ACT, gelu_and_mul),
    "sgl_kernel::gelu_tanh_and_mul_cpu": (_ACT, gelu_tanh_and_mul),
    "sgl_kernel::fused_sigmoid_mul_cpu": ("(Tensor(a!) input, Tensor gate) -> ()", fused_sigmoid_mul),
    "sgl_kernel::fused_linear_sigmoid_mul": (
        "(Tensor mat1, Tensor mat2, Tensor? bias, bool is_vnni, Tensor post_mul_mat) -> Tensor",
        fused_linear_sigmoid_mul,
    ),
}
