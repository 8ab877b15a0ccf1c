"""A model's sizes from its config.json (or the same keys in the registry), without torch or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from kt_kernel.errors import ConfigurationError
from kt_kernel.hybrid.layout import expert_layout
from kt_kernel.planning.model_facts import GQA, LINEAR, MLA, Sizes

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
_INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_USUAL_CONTEXT = 32768  # of a configuration that names none


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal model's configuration."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and inner else config


def sizes_of_config(config: Mapping[str, Any]) -> Sizes:
    """Raises ConfigurationError if the model has no routed experts, or does not say how large it is."""
    text = text_config(config)
    layout = expert_layout(SimpleNamespace(**_with_usual_names(text)))
    heads = _integer(text, "num_attention_heads")
    hidden = _integer(text, "hidden_size")
    head_dim = text.get("head_dim") or hidden // heads
    kv_heads = text.get("num_key_value_heads") or heads
    attention, values = _attention(text, layout.num_layers, kv_heads, head_dim)
    architectures = config.get("architectures") or text.get("architectures") or [""]
    return Sizes(
        family=str(config.get("model_type", "")),
        architecture=str(architectures[0]),
        attention=attention,
        layers=layout.num_layers,
        moe_layers=len(layout.moe_layers),
        experts=layout.num_experts,
        top_k=_first(text, _TOP_K),
        hidden=hidden,
        intermediate=_first(text, _INTERMEDIATE),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=int(text.get("vocab_size") or 0),
        context=int(text.get("max_position_embeddings") or _USUAL_CONTEXT),
        kv_values_per_token=values,
    )


def _with_usual_names(text: Mapping[str, Any]) -> dict[str, Any]:
    """Ernie's and Step's names for the number of experts and the first layer that has some."""
    usual = dict(text)
    if isinstance(count := text.get("moe_num_experts"), int):
        usual.setdefault("num_experts", count)
    if isinstance(first := text.get("moe_layer_start_index"), int):
        usual.setdefault("first_k_dense_replace", first)
    if "num_hidden_layers" not in text:
        raise ConfigurationError(f"{text.get('model_type', 'the model')}: its number of layers is not known.")
    return usual


def _attention(text: Mapping[str, Any], layers: int, kv_heads: int, head_dim: int) -> tuple[str, int]:
    """Its kind, and the numbers that the KV cache holds for one token."""
    if rank := text.get("kv_lora_rank"):
        # DeepSeek-V3.2's indexer keeps a key of its own, in 8 bits with a scale: half as many 16-bit numbers.
        indexer = (text.get("index_head_dim") or 0) // 2 + (2 if text.get("index_head_dim") else 0)
        return MLA, layers_with_cache(text, layers) * (rank + (text.get("qk_rope_head_dim") or 0) + indexer)
    cached = layers_with_cache(text, layers)
    return (GQA if cached == layers else LINEAR), cached * 2 * kv_heads * head_dim


def layers_with_cache(text: Mapping[str, Any], layers: int) -> int:
    """How many layers keep keys and values; those of linear attention keep a state of fixed size instead."""
    types = text.get("layer_types") or ()
    if len(types) == layers:
        return sum(kind != "linear_attention" for kind in types)
    if full := (text.get("linear_attn_config") or {}).get("full_attn_layers"):  # Kimi-Linear
        return len(full)
    if interval := text.get("full_attention_interval"):
        return layers // interval
    return layers


def _first(text: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        if text.get(key):
            return int(text[key] if not isinstance(text[key], list) else text[key][0])
    raise ConfigurationError(
        f"the configuration of this {text.get('model_type', 'model')} says none of {', '.join(keys)}; a plan "
        "needs it."
    )


def _integer(text: Mapping[str, Any], key: str) -> int:
    return _first(text, (key,))
