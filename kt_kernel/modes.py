"""The modes of KTMoEWrapper: "inference", and "sft" (kt_kernel/training/sft_layer.py)."""

from __future__ import annotations

from typing import Any

from kt_kernel.errors import ConfigurationError

SFT = "sft"

# Options of the training mode, with the values that mean "not used".
_TRAINING_DEFAULTS = {
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "max_cache_depth": 1,
    "group_size": 128,
    "zero_point": True,
    "full_weight_grad": False,
}


def require_inference(mode: str, training_options: dict[str, Any]) -> None:
    """Raises ConfigurationError for another mode, and for options of training that say something."""
    if mode != "inference":
        raise ConfigurationError(f"mode is {mode!r}, expected 'inference', or the keyword mode='sft'.")
    for name, value in training_options.items():
        if name not in _TRAINING_DEFAULTS:
            raise TypeError(f"KTMoEWrapper got an unexpected keyword argument '{name}'")
        if value != _TRAINING_DEFAULTS[name]:
            raise ConfigurationError(
                f"{name}={value!r} belongs to training; give mode='sft', or leave it out."
            )
