"""Which layers of a model have routed experts, and how many, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kt_kernel.errors import ConfigurationError

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class ExpertLayout:
    num_layers: int
    num_experts: int
    moe_layers: tuple[int, ...]


def expert_layout(config: Any) -> ExpertLayout:
    """From a transformers configuration of the text model; raises ConfigurationError if it has no routed
    experts.
    """
    num_experts = next((n for name in _EXPERT_COUNTS if (n := getattr(config, name, None))), None)
    if num_experts is None:
        raise ConfigurationError(
            f"the model ({getattr(config, 'model_type', 'unknown type')}) has no routed experts: none of "
            f"{', '.join(_EXPERT_COUNTS)} is set in its config.json; serve it without the --kt flags."
        )
    num_layers = config.num_hidden_layers
    moe_layers = tuple(layer for layer in range(num_layers) if _has_experts(config, layer))
    return ExpertLayout(num_layers, num_experts, moe_layers)


def _has_experts(config: Any, layer: int) -> bool:
    """The rules of the DeepSeek family (dense layers first, a period or one entry per layer), and Qwen's."""
    frequency = getattr(config, "moe_layer_freq", None) or 1
    in_pattern = bool(frequency[layer]) if isinstance(frequency, (list, tuple)) else layer % frequency == 0
    return (
        in_pattern
        and layer >= (getattr(config, "first_k_dense_replace", None) or 0)
        and layer not in (getattr(config, "mlp_only_layers", None) or ())
        and (layer + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0
    )
