"""DeepSeek's latent attention (MLA) and shared expert over bf16 or fp32 weights as checkpoints have them.

SGLang packs these weights, so the twins test the native operators and do not stand in for them. Numbers are
rounded to the type of the input after every layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kt_kernel.operators.reference import gates, heads, norms


def _require_plain(*scales: Tensor | None) -> None:
    if any(scale is not None for scale in scales):
        raise ValueError("the twin of an MLA operator got scales; expected weights in bf16 or fp32")


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()).to(x.dtype)


def qkv_proj_with_rope_fused_weight(
    hidden_states: Tensor,
    qkv_a_proj_weight: Tensor,
    q_b_proj_weight: Tensor,
    w_kc: Tensor,
    q_a_layernorm_weight: Tensor,
    kv_a_layernorm_weight: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    eps: float,
    use_int8_w8a8: bool,
    use_fp8_w8a16: bool,
    qkv_a_proj_scale: Tensor | None,
    q_b_proj_scale: Tensor | None,
    w_scale: Tensor | None,
    is_vnni: bool,
    block_size: list[int] | None,
    q_lora_rank: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [tokens, H] -> q [tokens, heads, latent + rope], k [tokens, 1, latent + rope], v = k's latent.

    qkv_a [q_lora + latent + rope, H]; q_b [heads * (nope + rope), q_lora]; w_kc [heads, latent, nope].
    """
    _require_plain(qkv_a_proj_scale, q_b_proj_scale, w_scale)
    tokens, count = hidden_states.shape[0], w_kc.shape[0]
    projected = _linear(hidden_states, qkv_a_proj_weight)
    q_latent, latent, k_rope = projected.split([q_lora_rank, kv_lora_rank, qk_rope_head_dim], -1)
    q = _linear(norms.rmsnorm(q_latent, q_a_layernorm_weight, eps), q_b_proj_weight).view(tokens, count, -1)
    q_nope, q_rope = q.split([w_kc.shape[2], qk_rope_head_dim], -1)
    absorbed = torch.einsum("thn,hln->thl", q_nope.float(), w_kc.float()).to(q.dtype)
    q_rope, k_rope = heads.rotary_embedding(
        positions, q_rope, k_rope[:, None], qk_rope_head_dim, cos_sin_cache, is_neox=False
    )
    k = torch.cat([norms.rmsnorm(latent, kv_a_layernorm_weight, eps)[:, None], k_rope], -1)
    return torch.cat([absorbed, q_rope], -1), k, k[..., :kv_lora_rank]


def bmm(out: Tensor, mat1: Tensor, mat2: Tensor, is_vnni: bool, scale: Tensor | None) -> None:
    """out [B, M, N] = mat1 [B, M, K] @ mat2 [B, N, K] transposed; out and mat1 may be transposed views."""
    _require_plain(scale)
    out.copy_(torch.bmm(mat1.float(), mat2.float().transpose(1, 2)))


def shared_expert(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    fused_experts_out: Tensor,
    routed_scaling_factor: float,
    inplace: bool,
    use_int8_w8a8: bool,
    use_fp8_w8a16: bool,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    block_size: list[int] | None,
    is_vnni: bool,
) -> Tensor:
    """w2 (silu(gate) * up) + fused_experts_out * factor; w1 [2 * intermediate, H] is gate over up.

    `inplace` permits to use the memory of hidden_states, which is not done.
    """
    _require_plain(w1_scale, w2_scale)
    own = _linear(gates.silu_and_mul(_linear(hidden_states, w1)), w2)
    return own + fused_experts_out * routed_scaling_factor


OPERATORS = {
    "sgl_kernel::qkv_proj_with_rope_fused_weight": (
        "(Tensor hidden_states, Tensor qkv_a_proj_weight, Tensor q_b_proj_weight, Tensor w_kc, Tensor "
        "q_a_layernorm_weight, Tensor kv_a_layernorm_weight, Tensor positions, Tensor cos_sin_cache, float "
        "eps, bool use_int8_w8a8, bool use_fp8_w8a16, Tensor? qkv_a_proj_scale, Tensor? q_b_proj_scale, "
        "Tensor? w_scale, bool is_vnni, int[]? block_size, int q_lora_rank, int kv_lora_rank, int "
        "qk_rope_head_dim) -> (Tensor, Tensor, Tensor)",
        qkv_proj_with_rope_fused_weight,
    ),
    "sgl_kernel::bmm_cpu": (
        "(Tensor(a!) out, Tensor mat1, Tensor mat2, bool is_vnni, Tensor? scale) -> ()",
        bmm,
    ),
    "sgl_kernel::shared_expert_cpu": (
        "(Tensor hidden_states, Tensor w1, Tensor w2, Tensor fused_experts_out, float routed_scaling_factor, "
        "bool inplace, bool use_int8_w8a8, bool use_fp8_w8a16, Tensor? w1_scale, Tensor? w2_scale, int[]? "
        "block_size, bool is_vnni) -> Tensor",
        shared_expert,
    ),
}
