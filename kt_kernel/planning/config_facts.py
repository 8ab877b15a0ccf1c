"""A model's sizes from its config.json (or the same keys in the registry), without torch or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from kt_kernel.errors import ConfigurationError, KTError
from kt_kernel.hybrid.layout import expert_layout
from kt_kernel.kv_budget import StateValues, cached_values, layers_with_cache
from kt_kernel.planning.model_facts import GQA, LINEAR, MLA, Sizes

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
_INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_MOST_LAYERS = 10_000  # each is looked at
# What values of wrong types end in.
_DAMAGE = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError)
_USUAL_CONTEXT = 32768  # of a configuration that names none


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal model's configuration."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and inner else config


def sizes_of_config(config: Mapping[str, Any]) -> Sizes:
    """Raises ConfigurationError if the model has no routed experts, or does not say how large it is."""
    try:
        sizes = _sizes(config)
    except _DAMAGE as error:
        if isinstance(error, KTError):
            raise
        raise ConfigurationError(
            f"the model's configuration cannot be read: {error}; expected a config.json as its makers "
            "publish it."
        ) from error
    for name in ("layers", "experts", "top_k", "hidden", "intermediate", "heads", "kv_heads", "head_dim"):
        if getattr(sizes, name) < 1 or sizes.layers > _MOST_LAYERS:
            raise ConfigurationError(
                f"the model's configuration says {name} {getattr(sizes, name)} and {sizes.layers} layers, "
                f"expected 1 or more, and at most {_MOST_LAYERS} layers."
            )
    return sizes


def _sizes(config: Mapping[str, Any]) -> Sizes:
    text = text_config(config)
    if _integer(text, "num_hidden_layers") > _MOST_LAYERS:
        raise ConfigurationError(f"the model's configuration says more than {_MOST_LAYERS} layers.")
    layout = expert_layout(SimpleNamespace(**_with_usual_names(text)))
    heads = _integer(text, "num_attention_heads")
    hidden = _integer(text, "hidden_size")
    head_dim = text.get("head_dim") or hidden // heads
    kv_heads = text.get("num_key_value_heads") or heads
    layers = layout.num_layers
    architectures = config.get("architectures") or text.get("architectures") or [""]
    return Sizes(
        family=str(config.get("model_type", "")),
        architecture=str(architectures[0]),
        attention=_attention(text, layers),
        layers=layers,
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
        kv_values_per_token=cached_values(text, layers, kv_heads, head_dim),
        states=StateValues.of(text, layers),
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


def _attention(text: Mapping[str, Any], layers: int) -> str:
    """Its kind."""
    if text.get("kv_lora_rank"):
        return MLA
    return GQA if layers_with_cache(text, layers) == layers else LINEAR


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
