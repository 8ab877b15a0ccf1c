"""The next token of each request."""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor
) -> Tensor:
    """[rows, tokens] float64: how each token is drawn; csrc/operators/token_choice.h has the filters."""
    shares = torch.softmax(logits.double() / temperatures.view(-1, 1).double(), dim=-1)
    ordered, tokens = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    rank = torch.arange(logits.shape[-1]).view(1, -1)
    kept = (rank < top_ks.view(-1, 1)) & (before <= top_ps.view(-1, 1))
    kept &= ordered >= min_ps.view(-1, 1) * ordered[:, :1]
    kept[:, 0] = True
    weights = torch.zeros_like(shares).scatter_(-1, tokens, ordered * kept)
    return weights / weights.sum(dim=-1, keepdim=True)


def sample(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, uniform: Tensor
) -> Tensor:
    """logits [rows, tokens] float32; of each row: temperature, top_p and min_p float32, top_k int32, uniform
    float64 in [0, 1) -> ids [rows] int32.
    """
    below = probabilities(logits, temperatures, top_ks, top_ps, min_ps).cumsum(dim=-1)
    drawn = (below <= uniform.view(-1, 1) * below[:, -1:]).sum(dim=-1)
    return drawn.clamp(max=logits.shape[-1] - 1).int()


OPERATORS = {
    "kt_kernel::sample": (
        "(Tensor logits, Tensor temperatures, Tensor top_ks, Tensor top_ps, Tensor min_ps, Tensor uniform)"
        " -> Tensor",
        sample,
    )
}
