"""Tiny random checkpoints of every model family we serve, made with transformers; no download.

Each family keeps what makes it special for an MoE runtime: Qwen3 and Mixtral the two naming schemes of the
expert tensors, Qwen2 a gated shared expert and unnormalised routing weights, GLM4 and DeepSeek-V3 a dense
first layer, shared experts, a routed scaling factor and biased expert selection, DeepSeek-V3 also latent
attention with yarn.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import TRANSFORMERS_ONLY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 512
SEED = 0

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# A context of 2048 is far beyond every prompt here, so 4 layers of 256 decide the run time, not the
# positions.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}

_YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 1024,
    "rope_theta": 10000.0,
}

# family -> (model class, configuration class, what differs from _COMMON)
FAMILIES = {
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "head_dim": 64,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            "head_dim": 64,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 8,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "rope_scaling": _YARN,
        },
    ),
}

# Served by tests of their own: Qwen3-Next, three of whose four layers are gated delta rules
# (test_qwen3_next.py), and what is only served in a quantised layout (tiny_quantised.py). swiglu_limit is low
# enough to be reached.
_OTHERS = {
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            "head_dim": 64,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {
            "head_dim": 64,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
        },
    ),
    # hidden_size and intermediate_size are different here, so that a transposed matrix shows. A window of 32
    # is passed by every prompt; the positions are scaled by yarn, as published.
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "head_dim": 64,
            "intermediate_size": 128,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "sliding_window": 32,
            "swiglu_limit": 2.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 2.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "moe_num_experts": 16,
            "moe_k": 4,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 1,
        },
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {
            "head_dim": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": [128] * 4,
            "num_experts": 16,
            "moe_topk": [4] * 4,
            "num_shared_expert": [1] * 4,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": False,
            "attention_head_dim": 64,
            "mlp_bias": False,
            "norm_topk_prob": True,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {
            "head_dim": 64,
            "rotary_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "intermediate_size": 128,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
        },
    ),
    "minimax_m3": (
        "MiniMaxM3VLForCausalLM",
        "MiniMaxM3VLTextConfig",
        {
            "head_dim": 64,
            "rotary_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "intermediate_size": 128,
            "shared_intermediate_size": 128,
            "dense_intermediate_size": 512,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "swiglu_alpha": 1.702,
            "swiglu_limit": 2.0,
            "routed_scaling_factor": 2.0,
        },
    ),
}


def build(family: str, path: Path, **changes: object) -> Path:
    """Write a bfloat16 checkpoint with tokenizer and chat template to `path`; the same bytes every time.

    `changes` overrule the family's configuration.
    """
    class_name, config_name, special = {**FAMILIES, **_OTHERS, **TRANSFORMERS_ONLY}[family]
    torch.manual_seed(SEED)
    config = getattr(transformers, config_name)(**{**_COMMON, **special, **changes})
    model = getattr(transformers, class_name)(config).to(torch.bfloat16)
    _randomise(model)
    tokenizer = _byte_tokenizer()
    for holder in (model.config, model.generation_config):
        holder.bos_token_id = tokenizer.bos_token_id
        holder.eos_token_id = tokenizer.eos_token_id
        holder.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def add_next_token_layer(path: Path) -> Path:
    """Give a checkpoint of the DeepSeek or GLM family a layer for speculative decoding, stored as they do.

    It is the last layer with its own experts, so a draft model is wrong only if it uses the wrong weights.
    """
    config = json.loads((path / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    tensors = load_file(path / "model.safetensors")
    prefix = f"model.layers.{layers}."
    generator = torch.Generator().manual_seed(SEED)
    for name in [name for name in tensors if name.startswith(f"model.layers.{layers - 1}.")]:
        tensor = tensors[name]
        if ".experts." in name:
            tensor = (torch.randn(tensor.shape, generator=generator) * 0.08).to(tensor.dtype)
        tensors[prefix + name.partition(f".{layers - 1}.")[2]] = tensor.clone()
    tensors[prefix + "eh_proj.weight"] = torch.eye(hidden, 2 * hidden).bfloat16()
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden).bfloat16()
    tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return path


# Projections that decide where attention looks. At 0.08 attention is so sharp that rounding the experts'
# activations to bf16 moves Mixtral's log-probabilities by 0.035 on average, at 0.04 by 0.012: a test model
# must be no more chaotic than a trained one.
_WHERE_TO_LOOK = ("q_proj", "k_proj", "q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj")


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Weights that make every expert matter, and logits as spread as a trained model's (deviation near 3)."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(0, 0.5)
        elif "lm_head" in name:
            parameter.normal_(0, 0.2)
        elif name.endswith("e_score_correction_bias"):
            parameter.normal_(0, 0.01)
        elif name.endswith(("bias", "sinks")):
            parameter.normal_(0, 0.3)
        elif parameter.dim() >= 2:
            parameter.normal_(0, 0.04 if any(part in name for part in _WHERE_TO_LOOK) else 0.08)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.01)


def _byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte plus the four special tokens the chat template needs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
