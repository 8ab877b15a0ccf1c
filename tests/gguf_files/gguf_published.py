"""Tiny random models of transformers as GGUF files, named and arranged as converters of the format do.

Names come from the public `gguf` package's own map of published names; metadata and arrangements follow the
format's conventions and are written down here a second time: they share no code with the product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf_writing import Stored, Type, numbers, write
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

VOCABULARY = 320
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_GROUPED = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
}
_LATENT = {
    **_GROUPED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}


@dataclass(frozen=True)
class Published:
    """A model of transformers, and how the format calls it."""

    architecture: str
    model: str
    config: str
    special: dict[str, Any]


MODELS = {
    "qwen3moe": Published(
        "qwen3moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_QWEN, "head_dim": 32, "norm_topk_prob": True}
    ),
    "qwen2moe": Published(
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_QWEN, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
    ),
    "mixtral": Published(
        "llama",
        "MixtralForCausalLM",
        "MixtralConfig",
        {
            "intermediate_size": 32,
            "num_local_experts": 8,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "head_dim": 16,
        },
    ),
    "deepseek_v3": Published(
        "deepseek2",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_LATENT, "q_lora_rank": 48, "rope_parameters": _YARN, "num_nextn_predict_layers": 0},
    ),
    "deepseek_v2_lite": Published(
        "deepseek2",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {
            **_LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "topk_method": "greedy",
        },
    ),
    "glm4moe": Published(
        "glm4moe",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **_GROUPED,
            "head_dim": 32,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "rope_parameters": _PARTIAL,
            "num_nextn_predict_layers": 0,
        },
    ),
    "minimax_m2": Published(
        "minimax-m2",
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {"head_dim": 32, "intermediate_size": 32, "num_local_experts": 8, "rope_parameters": _PARTIAL},
    ),
}


# Window of 8: every sequence here is longer. The limit is the published one, which no file holds.
MODELS["gpt_oss"] = Published(
    "gpt-oss",
    "GptOssForCausalLM",
    "GptOssConfig",
    {
        "head_dim": 32,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 512,
        },
    },
)


def random_model(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """The model in bfloat16 with random weights; no tensor is like another."""
    published = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, published.config)(**{**_COMMON, **published.special, **changes})
    model = getattr(transformers, published.model)(config).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)):
            tensor.normal_(0, 0.08)
    return model


def published_tensors(model: transformers.PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors under the names of published checkpoints, which transformers writes but does not use."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


# ---- as a file ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileStyle:
    """What differs between files of the same model. `kv_b`: "joined" as older converters wrote it, or
    "halves"; `experts`: "stacked", "fused" (gate and up in one tensor), or "single" as the oldest; `kind`: of
    matrices, `expert_kind` of those of experts.
    """

    kv_b: str = "halves"
    experts: str = "stacked"
    kind: Type = Type.BF16
    expert_kind: Type = Type.Q8_0


USUAL = FileStyle()


def write_published(
    architecture: str,
    config: transformers.PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    path: Path,
    style: FileStyle = USUAL,
    **metadata: Any,
) -> Path:
    """The file at `path`; `metadata` overrule what the format's converters would write (None: leave out)."""
    keys = {
        **{f"{architecture}.{key}": value for key, value in _metadata(architecture, config).items()},
        **TOKENIZER,
        **metadata,
    }
    stored = [
        _stored(name, values, style.expert_kind if _is_expert(name) else style.kind)
        for name, values in _tensors(architecture, config, tensors, style)
    ]
    return write(path, architecture, {key: value for key, value in keys.items() if value is not None}, stored)


def _metadata(architecture: str, config: Any) -> dict[str, object]:
    rope = config.rope_parameters
    counts = (
        getattr(config, name, None) for name in ("n_routed_experts", "num_local_experts", "num_experts")
    )
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": next(filter(None, counts)),
        "expert_used_count": config.num_experts_per_tok,
    }
    if rope["rope_type"] == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
        if "mscale_all_dim" in rope:
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if (head_dim := getattr(config, "head_dim", None)) is not None and config.model_type != "deepseek_v3":
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return keys | _OF_ARCHITECTURE.get(architecture, lambda config: {})(config)


def _qwen(config: Any) -> dict[str, object]:
    return {"expert_feed_forward_length": config.moe_intermediate_size}


def _grouped(config: Any) -> dict[str, object]:
    return {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }


def _deepseek(config: Any) -> dict[str, object]:
    keys = {
        **_grouped(config),
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
    }
    return keys if config.q_lora_rank is None else {**keys, "attention.q_lora_rank": config.q_lora_rank}


def _glm4(config: Any) -> dict[str, object]:
    return {
        **_grouped(config),
        "rope.dimension_count": int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
        "expert_gating_func": 2,
    }


def _minimax(config: Any) -> dict[str, object]:
    return {
        "rope.dimension_count": int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
        "expert_feed_forward_length": config.intermediate_size,
        "expert_gating_func": 2,
    }


def _gpt_oss(config: Any) -> dict[str, object]:
    return {
        "attention.sliding_window": config.sliding_window,
        "expert_feed_forward_length": config.intermediate_size,
    }


_OF_ARCHITECTURE = {
    "gpt-oss": _gpt_oss,
    "qwen3moe": _qwen,
    "qwen2moe": _qwen,
    "deepseek2": _deepseek,
    "glm4moe": _glm4,
    "minimax-m2": _minimax,
}


def _tensors(
    architecture: str,
    config: transformers.PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    style: FileStyle,
) -> Iterator[tuple[str, torch.Tensor]]:
    names = gguf.get_tensor_name_map(_architecture(architecture), config.num_hidden_layers)
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, values in tensors.items():
        base, _, tail = name.partition(".experts.")
        if tail and architecture == "gpt-oss":
            yield from _gpt_oss_experts(names, name, values)
        elif tail:
            expert, _, rest = tail.partition(".")
            experts.setdefault(f"{base}.experts.{rest}", {})[int(expert)] = values
        elif name.endswith("kv_b_proj.weight") and style.kv_b == "halves":
            yield from _halves_of_kv_b(names, name, values, config)
        else:
            if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                values = _in_pairs(values, config.hidden_size // config.num_attention_heads)
            yield _name(names, name), values.squeeze()
    stacked = {
        _name(names, name): torch.stack([of_layer[expert] for expert in sorted(of_layer)])
        for name, of_layer in experts.items()
    }
    yield from _STYLES_OF_EXPERTS[style.experts](stacked)


def _gpt_oss_experts(
    names: gguf.TensorNameMap, name: str, values: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """gate and up apart and upright, which transformers has transposed and column by column in turn."""
    stem, bias = name.removesuffix("_bias"), name.endswith("_bias")
    rows = values if bias else values.transpose(1, 2)
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[stem.rpartition(".")[2]]
    for at, part in enumerate(parts):
        published = f"{stem.rpartition('.')[0]}.{part}.{'bias' if bias else 'weight'}"
        yield _name(names, published), rows[:, at :: len(parts)].contiguous()


def _single(stacked: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, matrices in stacked.items():
        for expert, matrix in enumerate(matrices):
            yield name.replace("_exps.", f".{expert}."), matrix


def _fused(stacked: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, matrices in stacked.items():
        if "_gate_" in name:
            up = stacked[name.replace("_gate_", "_up_")]
            yield name.replace("_gate_", "_gate_up_"), torch.cat([matrices, up], dim=1)
        elif "_down_" in name:
            yield name, matrices


_STYLES_OF_EXPERTS = {
    "stacked": lambda stacked: iter(stacked.items()),
    "single": _single,
    "fused": _fused,
}


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, called in gguf.MODEL_ARCH_NAMES.items() if called == name)


def _name(names: gguf.TensorNameMap, published: str) -> str:
    published = published.replace("e_score_correction_bias", "e_score_correction.bias")
    published = published.replace("self_attn.sinks", "self_attn.sinks.weight")
    found = names.get_name(published, try_suffixes=(".weight", ".bias"))
    assert found is not None, published
    return found


def _halves_of_kv_b(
    names: gguf.TensorNameMap, name: str, values: torch.Tensor, config: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    by_head = values.view(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, heads_values = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    yield _name(names, name.replace("kv_b_proj", "k_b_proj")), keys.transpose(1, 2)
    yield _name(names, name.replace("kv_b_proj", "v_b_proj")), heads_values


def _in_pairs(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Row j and row j + head / 2 of a head become neighbours."""
    return rows.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)


def _is_expert(name: str) -> bool:
    return "_exps." in name or re.search(r"ffn_\w+\.\d+\.", name) is not None


def with_rounded_experts(tensors: dict[str, torch.Tensor], kind: Type) -> dict[str, torch.Tensor]:
    """Published tensors whose experts are what a file of that type says; all of them float32."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        blocks = gguf.quants.quantize(values.float().numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(blocks, kind).copy())

    def of(name: str, values: torch.Tensor) -> torch.Tensor:
        if ".experts." not in name or name.endswith("_bias"):
            return values.float()
        if values.dim() == 3:  # transposed, as transformers has gpt-oss's
            return rounded(values.transpose(1, 2).contiguous()).transpose(1, 2).contiguous()
        return rounded(values)

    return {name: of(name, values) for name, values in tensors.items()}


def _stored(name: str, values: torch.Tensor, kind: Type) -> Stored:
    if values.dim() < 2 or name.endswith(".bias"):
        return numbers(name, tuple(values.shape), Type.F32, lambda: values)
    if kind in (Type.BF16, Type.F16, Type.F32):
        return numbers(name, tuple(values.shape), kind, lambda: values)
    blocks = gguf.quants.quantize(values.float().numpy(), kind)
    return Stored(name, tuple(values.shape), kind, lambda: np.ascontiguousarray(blocks))


# ---- a tokenizer ----------------------------------------------------------------------------------

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TOKENS = [*_ALPHABET, "he", *_MARKERS]
_FILLERS = [f"[PAD{at}]" for at in range(len(_TOKENS), VOCABULARY)]
TOKENIZER: dict[str, object] = {
    "general.name": "Tiny Model",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [*_TOKENS, *_FILLERS],
    "tokenizer.ggml.token_type": [1] * (len(_ALPHABET) + 1) + [3] * len(_MARKERS) + [5] * len(_FILLERS),
    "tokenizer.ggml.merges": ["h e"],
    "tokenizer.ggml.bos_token_id": _TOKENS.index("<|endoftext|>"),
    "tokenizer.ggml.eos_token_id": _TOKENS.index("<|im_end|>"),
    "tokenizer.ggml.padding_token_id": _TOKENS.index("<|endoftext|>"),
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
}
