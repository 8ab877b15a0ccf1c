"""Which adapter a state dict is of, where PEFT has lost its name: for experts.

PEFT (0.21) makes one tensor for all experts of the single ones in a file, and loses the adapter's name on
that way. Every other tensor of the same state dict still has it.
"""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from kt_kernel.adapters.files import EXPERTS
from kt_kernel.errors import CheckpointError
from kt_kernel.training.lora import LoraExperts

_NAMED = re.compile(r".*\.lora_(?:embedding_)?[AB]\.([^.]+)(?:\.weight)?")
_LOST = re.compile(rf"(.*\.{EXPERTS}\.(?:base_layer\.)?lora_[AB])\.weight")


def name_experts(model: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
    """Before `model`, with all its layers, loads `state`: tensors of experts get their adapter's name back.

    Raises CheckpointError if experts of the model have no adapter of that name, or it cannot be known.
    """
    lost = {key: match[1] for key in state if (match := _LOST.fullmatch(key))}
    experts = {
        name for module in model.modules() if isinstance(module, LoraExperts) for name in module.lora_A
    }
    if not lost or not experts:
        return
    names = {match[1] for key in state if key not in lost and (match := _NAMED.fullmatch(key))}
    elsewhere = {
        name
        for module in model.modules()
        if isinstance(module, LoraLayer) and not isinstance(module, LoraExperts)
        for name in module.lora_A
    }
    if not names:  # the adapter is one of experts alone
        names = experts | elsewhere
    if len(names) > 1 or not names <= experts:
        raise CheckpointError(
            f"the adapter that is loaded has LoRA of experts, and the model's experts have "
            f"{', '.join(sorted(experts))}, not {', '.join(sorted(names))} alone; load it with "
            "kt_kernel.training.load_adapter(model, folder, adapter_name=...)."
        )
    for key, stem in lost.items():
        state[f"{stem}.{next(iter(names))}.weight"] = state.pop(key)
