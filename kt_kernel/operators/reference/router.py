"""Choice of experts: gating_output [tokens, experts] -> (weights float32, ids int32), both [tokens, topk].

Best first; of equal experts the lower comes first. A bias counts for the choice only. Scores are
fp32, whatever the type of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What SGLang adds to the sum that weights are divided by.
_SUM_EPSILON = 1e-20


def _chosen(scores: Tensor, ranks: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    ids = ranks.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _SUM_EPSILON)
    return weights, ids.int()


def _within_groups(ranks: Tensor, of_groups: Tensor, topk_group: int) -> Tensor:
    """Experts outside the best groups rank last."""
    best = of_groups.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
    kept = torch.zeros_like(of_groups, dtype=torch.bool).scatter(1, best, value=True)
    members = kept.repeat_interleave(ranks.shape[1] // of_groups.shape[1], dim=1)
    return ranks.masked_fill(~members, float("-inf"))


def _refuse_shared_experts(count: int) -> None:
    if count != 0:
        raise ValueError(f"a router got num_fused_shared_experts={count}; expected 0")


def topk_softmax(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    logits = gating_output.float()
    scores = logits.softmax(-1)
    return _chosen(
        scores, logits if correction_bias is None else scores + correction_bias.float(), topk, renormalize
    )


def topk_sigmoid(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    logits = gating_output.float()
    scores = logits.sigmoid()
    return _chosen(
        scores, logits if correction_bias is None else scores + correction_bias.float(), topk, renormalize
    )


def grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int,
    topk_group: int,
    num_fused_shared_experts: int,
    routed_scaling_factor: float | None,
    num_token_non_padded: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax; groups rank by their best expert. The factor would count for fused shared experts only."""
    _refuse_shared_experts(num_fused_shared_experts)
    logits = gating_output.float()
    of_groups = logits.unflatten(1, (num_expert_group, -1)).amax(-1)
    return _chosen(logits.softmax(-1), _within_groups(logits, of_groups, topk_group), topk, renormalize)


def biased_grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    correction_bias: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int,
    topk_group: int,
    num_fused_shared_experts: int,
    routed_scaling_factor: float | None,
    num_token_non_padded: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sigmoid; groups rank by the sum of their two best experts; the factor multiplies the weights."""
    _refuse_shared_experts(num_fused_shared_experts)
    scores = gating_output.float().sigmoid()
    ranks = scores + correction_bias.float()
    grouped = ranks.unflatten(1, (num_expert_group, -1))
    of_groups = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    weights, ids = _chosen(scores, _within_groups(ranks, of_groups, topk_group), topk, renormalize)
    return (weights if routed_scaling_factor is None else weights * routed_scaling_factor), ids


def fused_moe_router(
    moe_softcapping: float,
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax of logits that tanh caps (Grok)."""
    logits = gating_output.float()
    if moe_softcapping != 0:
        logits = torch.tanh(logits / moe_softcapping) * moe_softcapping
    if correction_bias is not None:
        logits = logits + correction_bias.float()
    return _chosen(logits.softmax(-1), logits, topk, renormalize)


_TOPK = (
    "(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize, Tensor? correction_bias=None) "
    "-> (Tensor, Tensor)"
)
_GROUPED = (
    "int topk, bool renormalize, int num_expert_group, int topk_group, int num_fused_shared_experts, float? "
    "routed_scaling_factor, Tensor? num_token_non_padded) -> (Tensor, Tensor)"
)

OPERATORS = {
    "sgl_kernel::topk_softmax_cpu": (_TOPK, topk_softmax),
    "sgl_kernel::topk_sigmoid_cpu": (_TOPK, topk_sigmoid),
    "sgl_kernel::grouped_topk_cpu": (
        "(Tensor hidden_states, Tensor gating_output, " + _GROUPED,
        grouped_topk,
    ),
    "sgl_kernel::biased_grouped_topk_cpu": (
        "(Tensor hidden_states, Tensor gating_output, Tensor correction_bias, " + _GROUPED,
        biased_grouped_topk,
    ),
    "sgl_kernel::fused_moe_router_cpu": (
        "(float moe_softcapping, Tensor hidden_states, Tensor gating_output, int topk, bool renormalize, "
        "Tensor? correction_bias=None) -> (Tensor, Tensor)",
        fused_moe_router,
    ),
}
