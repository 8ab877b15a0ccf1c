"""What an adapter may have beside plain LoRA that we do not compute, by the names of PEFT's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What PEFT can do with the LoRA of a linear layer, and nobody has defined for experts.
VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Trained whole.
BESIDE_LORA = ("modules_to_save", "trainable_token_indices", "bias")
PATTERNS = ("rank_pattern", "alpha_pattern")


def first_set(config: Any, names: tuple[str, ...]) -> str | None:
    """The first of `names` that `config`, a LoraConfig or a mapping of its fields, has with a meaning."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value and not (name == "bias" and value == "none"):
            return name
    return None
