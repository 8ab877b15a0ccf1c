"""Fine-tuning of models whose experts are in main memory: doc/training.md.

function.py    the autograd function over a backend (kt_kernel/adapters); chosen.py takes one
reference.py   a backend in plain torch, in any float dtype
experts.py     the module in a model
full.py        the same with its weights as parameters
lora.py        PEFT's layer of LoRA over it; peft_config.py puts it there
weights.py     the packed experts, in the format asked for
loading.py     load: a model of transformers with such modules
host.py        one copy of the packed experts for the processes of a host
processes.py   average_gradients: of experts, beside DDP and FSDP2
adapters.py    load_adapter, also from the original's files
merging.py     merge: a checkpoint with an adapter in its weights
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "load": "loading",
    "lora_config": "peft_config",
    "load_adapter": "adapters",
    "merge": "merging",
    "average_gradients": "processes",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Fetched when they are first used: transformers and PEFT take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
