"""RMSNorm and LayerNorm: rows of [.., columns] of float32, bfloat16 or float16; weights of any of these."""

from __future__ import annotations

import torch
from torch import Tensor


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in fp32."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def rmsnorm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(input, weight.float(), eps).to(input.dtype)


def gemma_rmsnorm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The weight is stored less 1."""
    return _rms_norm(input, weight.float() + 1, eps).to(input.dtype)


def gemma4_rmsnorm(input: Tensor, weight: Tensor, eps: float, scale_shift: float, with_scale: bool) -> Tensor:
    return _rms_norm(input, weight.float() + scale_shift if with_scale else None, eps).to(input.dtype)


def l2norm(input: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight."""
    return _rms_norm(input, None, eps).to(input.dtype)


def layernorm(input: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    wide_bias = None if bias is None else bias.float()
    normed = torch.nn.functional.layer_norm(input.float(), input.shape[-1:], weight.float(), wide_bias, eps)
    return normed.to(input.dtype)


def fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """residual += input; input = the norm of the sum before it was rounded."""
    total = input.float() + residual.float()
    residual.copy_(total)
    input.copy_(_rms_norm(total, weight.float(), eps))


def gemma_fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """residual += input; input = the norm of the rounded sum."""
    residual.copy_(input.float() + residual.float())
    input.copy_(_rms_norm(residual, weight.float() + 1, eps))


def fused_qk_rmsnorm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norms of whole rows, all heads together (MiniMax)."""
    return rmsnorm(q, q_weight, eps), rmsnorm(k, k_weight, eps)


def fused_qk_rmsnorm_sumsq(q: Tensor, k: Tensor) -> Tensor:
    """The sums of squares of each token's q and k on this rank: float32 [tokens, 2]."""
    return torch.stack([q.float().pow(2).sum(-1), k.float().pow(2).sum(-1)], -1)


def fused_qk_rmsnorm_apply_from_stats(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, sum_sq: Tensor, world_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """fused_qk_rmsnorm by the sums of all ranks, each of which has the same number of columns."""

    def apply(x: Tensor, weight: Tensor, squares: Tensor) -> Tensor:
        mean = squares[:, None] / (x.shape[-1] * world_size)
        return (x.float() * torch.rsqrt(mean + eps) * weight.float()).to(x.dtype)

    return apply(q, q_weight, sum_sq[:, 0]), apply(k, k_weight, sum_sq[:, 1])


def fused_dual_residual_rmsnorm(
    input: Tensor, residual: Tensor, weight1: Tensor, weight2: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(the norm by weight2 of the new residual, the new residual = residual + the norm of input by weight1).

    Grok's. Rounds after each norm and after the sum.
    """
    total = residual + rmsnorm(input, weight1, eps).to(residual.dtype)
    return rmsnorm(total, weight2, eps).to(input.dtype), total


def fused_qk_gemma_rmsnorm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Of each head: q and k [tokens, heads * head_dim] -> [tokens * heads, head_dim]."""
    q_heads, k_heads = q.reshape(-1, head_dim), k.reshape(-1, head_dim)
    return gemma_rmsnorm(q_heads, q_weight, eps), gemma_rmsnorm(k_heads, k_weight, eps)


def fused_qk_gemma_rmsnorm_with_gate(
    q_gate: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int, num_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q_gate [tokens, num_head * 2 * head_dim]: each head's query, then its gate -> (q, k, gate) by heads."""
    pairs = q_gate.reshape(-1, 2 * head_dim)
    q, gate = pairs[:, :head_dim], pairs[:, head_dim:].contiguous()
    return (*fused_qk_gemma_rmsnorm(q, k, q_weight, k_weight, eps, head_dim), gate)


_ONE = "(Tensor input, Tensor weight, float eps) -> Tensor"
_ADDED = "(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps) -> ()"

OPERATORS = {
    "sgl_kernel::rmsnorm_cpu": (_ONE, rmsnorm),
    "sgl_kernel::gemma_rmsnorm_cpu": (_ONE, gemma_rmsnorm),
    "sgl_kernel::gemma3_rmsnorm_cpu": (_ONE, gemma_rmsnorm),
    "sgl_kernel::gemma4_rmsnorm_cpu": (
        "(Tensor input, Tensor weight, float eps, float scale_shift, bool with_scale) -> Tensor",
        gemma4_rmsnorm,
    ),
    "sgl_kernel::l2norm_cpu": ("(Tensor input, float eps) -> Tensor", l2norm),
    "sgl_kernel::layernorm_cpu": (
        "(Tensor input, Tensor weight, Tensor? bias, float eps) -> Tensor",
        layernorm,
    ),
    "sgl_kernel::fused_add_rmsnorm_cpu": (_ADDED, fused_add_rmsnorm),
    "sgl_kernel::gemma_fused_add_rmsnorm_cpu": (_ADDED, gemma_fused_add_rmsnorm),
    "sgl_kernel::fused_qk_rmsnorm_cpu": (
        "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps) -> (Tensor, Tensor)",
        fused_qk_rmsnorm,
    ),
    "sgl_kernel::fused_qk_rmsnorm_sumsq_cpu": ("(Tensor q, Tensor k) -> Tensor", fused_qk_rmsnorm_sumsq),
    "sgl_kernel::fused_qk_rmsnorm_apply_from_stats_cpu": (
        "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor sum_sq, int world_size, float eps) -> "
        "(Tensor, Tensor)",
        fused_qk_rmsnorm_apply_from_stats,
    ),
    "sgl_kernel::fused_qk_gemma_rmsnorm_cpu": (
        "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, int head_dim) -> (Tensor, Tensor)",
        fused_qk_gemma_rmsnorm,
    ),
    "sgl_kernel::fused_qk_gemma_rmsnorm_with_gate_cpu": (
        "(Tensor q_gate, Tensor k, Tensor q_weight, Tensor k_weight, float eps, int head_dim, int num_head)"
        " -> (Tensor, Tensor, Tensor)",
        fused_qk_gemma_rmsnorm_with_gate,
    ),
    "sgl_kernel::fused_dual_residual_rmsnorm_cpu": (
        "(Tensor input, Tensor residual, Tensor weight1, Tensor weight2, float eps) -> (Tensor, Tensor)",
        fused_dual_residual_rmsnorm,
    ),
}
