"""Which layers of a model have routed experts, and how many, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kt_kernel.errors import ConfigurationError

_TOP_KS = ("num_experts_per_tok", "moe_topk")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ExpertLayout:
    """`moe_layers`: the layers that have routed experts, ascending; each has `num_experts`. `top_k`: of them
    a token has so many; 0 = the configuration has no one number for it.
    """

    num_layers: int
    num_experts: int
    moe_layers: tuple[int, ...]
    top_k: int = 0


def expert_layout(config: Any) -> ExpertLayout:
    """From a transformers configuration; of a model with several parts, its text model is looked at.

    Raises ConfigurationError if the model has no routed experts.
    """
    config = getattr(config, "text_config", None) or config
    num_experts = next((n for name in _EXPERT_COUNTS if (n := getattr(config, name, None))), None)
    if num_experts is None:
        raise ConfigurationError(
            f"the model ({getattr(config, 'model_type', 'unknown type')}) has no routed experts: none of "
            f"{', '.join(_EXPERT_COUNTS)} is set in its config.json; serve it without the --kt flags."
        )
    num_layers = config.num_hidden_layers
    moe_layers = tuple(layer for layer in range(num_layers) if _has_experts(config, layer))
    return ExpertLayout(num_layers, num_experts, moe_layers, _top_k(config))


def _top_k(config: Any) -> int:
    """Hunyuan has a list with a number for each layer."""
    found = next((n for name in _TOP_KS if (n := getattr(config, name, None))), 0)
    numbers = set(found) if isinstance(found, (list, tuple)) else {found}
    return numbers.pop() if len(numbers) == 1 else 0


def _has_experts(config: Any, layer: int) -> bool:
    """Every rule that the configuration states must agree: the DeepSeek family's (dense layers first, a
    period or one entry per layer), Qwen's, Ernie's (a range and a period), Step's list of numbers, and the
    list of layer types of newer transformers models.
    """
    types = getattr(config, "mlp_layer_types", None) or ()
    frequency = getattr(config, "moe_layer_freq", None) or 1
    in_pattern = bool(frequency[layer]) if isinstance(frequency, (list, tuple)) else layer % frequency == 0
    # Layers routed by a hash of the token have experts too, though DeepSeek-V4 counts them among the first.
    hash_layers = getattr(config, "num_hash_layers", None) or list(types).count("hash_moe")
    first = (getattr(config, "first_k_dense_replace", None) or 0) - hash_layers
    last = getattr(config, "moe_layer_end_index", None)
    in_range = layer >= (getattr(config, "moe_layer_start_index", None) or 0) and (
        last in (None, -1) or layer <= last
    )
    listed = getattr(config, "moe_layers_enum", None)  # "3,4,5"
    return (
        in_pattern
        and in_range
        and (layer + 1) % (getattr(config, "moe_layer_interval", None) or 1) == 0
        and (not isinstance(listed, str) or str(layer) in listed.split(","))
        and layer >= first
        and types[layer : layer + 1] not in (["dense"], ("dense",))
        and layer not in (getattr(config, "mlp_only_layers", None) or ())
        and (layer + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0
    )
