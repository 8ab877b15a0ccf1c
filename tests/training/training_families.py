"""The families that are trained in tests, and their sizes: a few hundred KB each."""

from __future__ import annotations

# Two layers; of DeepSeek and GLM the first is dense. Sizes are multiples of what every format packs together.
_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
_FEW = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
SIZES = {
    "qwen3_moe": _SMALL | _FEW,
    "mixtral": _SMALL | {"intermediate_size": 32, "num_local_experts": 4},
    "glm4_moe": _SMALL | {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "rope_scaling": None,
        "max_position_embeddings": 256,
    },
    "minimax_m2": _SMALL
    | {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 8},
}
FAMILIES = tuple(SIZES)
