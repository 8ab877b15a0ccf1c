"""What a GGUF file means, as a float32 checkpoint for transformers: decoded by the public `gguf` package.

The reference of every comparison. It shares no code with the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Architecture -> (module of the experts, names of gate, up and down in it)
_EXPERTS = {
    "qwen3moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "llama": ("block_sparse_moe", ("w1", "w3", "w2")),
}


def write_decoded(source: Path, target: Path) -> Path:
    """The directory `target` with config.json and float32 weights of the file `source`."""
    reader = GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    config = _CONFIGS[architecture](_Keys(reader, architecture))
    target.mkdir(parents=True)
    tensors = dict(_tensors(reader, architecture, config))
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config.save_pretrained(target)
    return target


class _Keys:
    """Metadata below the architecture's name."""

    def __init__(self, reader: GGUFReader, architecture: str) -> None:
        self.reader, self.prefix = reader, architecture

    def __getitem__(self, key: str) -> Any:
        return self.reader.get_field(f"{self.prefix}.{key}").contents()

    def common(self) -> dict[str, Any]:
        return {
            "vocab_size": len(self.reader.get_field("tokenizer.ggml.tokens").contents()),
            "hidden_size": self["embedding_length"],
            "num_hidden_layers": self["block_count"],
            "num_attention_heads": self["attention.head_count"],
            "num_key_value_heads": self["attention.head_count_kv"],
            "num_experts_per_tok": self["expert_used_count"],
            "max_position_embeddings": self["context_length"],
            "rms_norm_eps": self["attention.layer_norm_rms_epsilon"],
            "rope_parameters": {"rope_type": "default", "rope_theta": self["rope.freq_base"]},
            "tie_word_embeddings": False,
            "dtype": "float32",
            **{
                f"{role}_token_id": self.reader.get_field(f"tokenizer.ggml.{key}_token_id").contents()
                for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
            },
        }


def _qwen3(keys: _Keys) -> transformers.PreTrainedConfig:
    return transformers.Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=keys["attention.key_length"],
        intermediate_size=keys["feed_forward_length"],
        moe_intermediate_size=keys["expert_feed_forward_length"],
        num_experts=keys["expert_count"],
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        **keys.common(),
    )


def _mixtral(keys: _Keys) -> transformers.PreTrainedConfig:
    return transformers.MixtralConfig(
        architectures=["MixtralForCausalLM"],
        intermediate_size=keys["feed_forward_length"],
        num_local_experts=keys["expert_count"],
        sliding_window=None,
        **keys.common(),
    )


_CONFIGS = {"qwen3moe": _qwen3, "llama": _mixtral}


def _tensors(
    reader: GGUFReader, architecture: str, config: transformers.PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    experts, parts = _EXPERTS[architecture]
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = tensor.name.removesuffix(".weight")
        if name in _OUTSIDE:
            yield f"{_OUTSIDE[name]}.weight", values
            continue
        _, layer, part = name.split(".")
        here = f"model.layers.{layer}"
        if part in _LAYER:
            if architecture == "llama" and part in ("attn_q", "attn_k"):
                values = _half_split(
                    values, config.head_dim or config.hidden_size // config.num_attention_heads
                )
            yield f"{here}.{_LAYER[part]}.weight", values
        elif part == "ffn_gate_inp":
            yield f"{here}.{experts}.gate.weight", values
        else:
            projection = parts[("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps").index(part)]
            for expert, matrix in enumerate(values):
                yield f"{here}.{experts}.experts.{expert}.{projection}.weight", matrix.clone()


def _half_split(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Llama files rotate neighbouring rows of a head, transformers row j with row j + head / 2."""
    return rows.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()
