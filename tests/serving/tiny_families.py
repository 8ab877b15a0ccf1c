"""Families whose attention SGLang's path for CPUs does not compute, but transformers does.

tiny_models.py builds them:

family -> (model class, configuration class, what differs from the common configuration)
"""

_LATENT = {
    "num_key_value_heads": 8,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "norm_topk_prob": True,
}
# Sparse attention that sees all keys of a prompt: where it leaves some out, which ones depends on the last
# bits, and so does the comparison (64 keys: 99.05 % and 0.029).
_INDEXED = {"index_topk": 512, "index_head_dim": 64, "index_n_heads": 4, "head_dim": 32}

TRANSFORMERS_ONLY = {
    "deepseek_v32": ("DeepseekV32ForCausalLM", "DeepseekV32Config", {**_LATENT, **_INDEXED}),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", {**_LATENT, **_INDEXED}),
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        {
            "num_key_value_heads": 1,
            "head_dim": 64,
            "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 128,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "q_lora_rank": 96,
            "o_groups": 2,
            "o_lora_rank": 64,
            "index_topk": 64,
            "index_head_dim": 64,
            "index_n_heads": 4,
            "sliding_window": 32,
            "swiglu_limit": 2.0,
            "num_nextn_predict_layers": 0,
        },
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {
            "num_key_value_heads": 8,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "linear_head_dim": 32,
            "linear_num_heads": 8,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
}
