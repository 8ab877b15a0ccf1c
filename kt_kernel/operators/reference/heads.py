"""Heads of queries and keys: RMSNorm of each head, rotation by the token's position.

q and k are [tokens, heads * columns] or [tokens, heads, columns], slices of one qkv tensor or not. A row of
the cache is [rotary / 2 cosines, rotary / 2 sines] of one position, in float32 or the type of q.
Only the first `rotary` columns of a head turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kt_kernel.operators.reference import norms


def _turned(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """x [tokens, heads, columns] in fp32, cos and sin [tokens, rotary / 2]."""
    rotary = 2 * cos.shape[-1]
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    turning, rest = x[..., :rotary].float(), x[..., rotary:].float()
    if is_neox:
        first, second = turning.chunk(2, -1)
    else:
        first, second = turning[..., ::2], turning[..., 1::2]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.cat(pair, -1) if is_neox else torch.stack(pair, -1).flatten(-2)
    return torch.cat([turned, rest], -1)


def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos_sin_cache[positions.flatten()].chunk(2, -1)

    def turned(x: Tensor) -> Tensor:
        heads = x.reshape(x.shape[0], -1, head_size)
        return _turned(heads, cos, sin, is_neox).reshape(x.shape).to(x.dtype)

    return turned(query), turned(key)


def fused_qk_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> None:
    for x, weight in ((q, q_weight), (k, k_weight)):
        heads = x.unflatten(-1, (-1, weight.shape[0]))
        heads.copy_(norms.rmsnorm(heads, weight, eps))


def fused_qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    is_neox: bool,
    positions: Tensor,
    cos_sin_cache: Tensor,
    rotary_dim: int,
) -> None:
    """Norm and rotation in place, rounded once."""
    cos, sin = cos_sin_cache[positions.flatten()].chunk(2, -1)
    for x, weight in ((q, q_weight), (k, k_weight)):
        heads = x.unflatten(-1, (-1, weight.shape[0]))
        heads.copy_(_turned(norms.rmsnorm(heads.float(), weight, eps), cos, sin, is_neox))


def apply_rotary_pos_emb(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [tokens, heads, columns], cos and sin [tokens, columns] (both halves alike)."""

    def turned(x: Tensor) -> Tensor:
        wide = x.float()
        first, second = wide.chunk(2, -1)
        swapped = torch.cat((-second, first), -1)
        return (wide * cos.float()[:, None] + swapped * sin.float()[:, None]).to(x.dtype)

    return turned(query), turned(key)


def _section_angles(cos_sin: Tensor, sections: list[int], interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos_sin [3, tokens, rotary] of time, height and width -> cos, sin [tokens, rotary / 2].

    Column c comes from the axis whose section it is in, or, interleaved, every third column from height and
    width while they last.
    """
    columns = torch.arange(cos_sin.shape[-1] // 2)
    if interleaved:
        height = (columns % 3 == 1) & (columns < 3 * sections[1])
        width = (columns % 3 == 2) & (columns < 3 * sections[2])
        axis = height.long() + 2 * width.long()
    else:
        axis = torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections))
    cos, sin = cos_sin.chunk(2, -1)
    return cos[axis, :, columns].T, sin[axis, :, columns].T


def multimodal_rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    mrope_section: list[int] | None,
    mrope_interleaved: bool,
    is_neox: bool,
) -> None:
    """In place. Positions are [tokens], or [3, tokens] of time, height and width."""
    cos_sin = cos_sin_cache[positions]
    if positions.ndim == 2:
        if not mrope_section:
            raise ValueError("multimodal_rotary_embedding_cpu got positions [3, tokens] and no mrope_section")
        cos, sin = _section_angles(cos_sin, list(mrope_section), mrope_interleaved)
    else:
        cos, sin = cos_sin.chunk(2, -1)
    for x in (query, key):
        heads = x.view(x.shape[0], -1, head_size)
        heads.copy_(_turned(heads, cos, sin, is_neox))


OPERATORS = {
    # SGLang's name on other devices, looked up on every one.
    "sgl_kernel::rotary_embedding": (
        "(Tensor positions, Tensor query, Tensor key, int head_size, Tensor cos_sin_cache, bool is_neox) -> "
        "(Tensor, Tensor)",
        rotary_embedding,
    ),
    "sgl_kernel::rotary_embedding_cpu": (
        "(Tensor positions, Tensor query, Tensor key, int head_size, Tensor cos_sin_cache, bool is_neox) -> "
        "(Tensor, Tensor)",
        rotary_embedding,
    ),
    "sgl_kernel::fused_qk_norm_cpu": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, float eps) -> ()",
        fused_qk_norm,
    ),
    "sgl_kernel::fused_qk_norm_rope_cpu": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, float eps, bool is_neox, Tensor "
        "positions, Tensor cos_sin_cache, int rotary_dim) -> ()",
        fused_qk_norm_rope,
    ),
    "sgl_kernel::apply_rotary_pos_emb_cpu": (
        "(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
        apply_rotary_pos_emb,
    ),
    "sgl_kernel::multimodal_rotary_embedding_cpu": (
        "(Tensor positions, Tensor(a!) query, Tensor(b!) key, int head_size, Tensor cos_sin_cache, int[]? "
        "mrope_section, bool mrope_interleaved, bool is_neox) -> ()",
        multimodal_rotary_embedding,
    ),
}
