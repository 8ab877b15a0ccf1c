"""What the files of a model's family call the projections of an expert."""

from __future__ import annotations

import torch

from kt_kernel.adapters.layout import NAMINGS, ProjectionNames


def projection_names(model: torch.nn.Module) -> ProjectionNames:
    """From the renamings with which transformers reads the family's checkpoints."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for entry in get_checkpoint_conversion_mapping(model.config.get_text_config().model_type) or ():
        if any(str(target).endswith("gate_up_proj") for target in _patterns(entry, "target_patterns")):
            sources = [str(source) for source in _patterns(entry, "source_patterns")]
            for names in NAMINGS:
                if any(f".{names.gate}" in source for source in sources):
                    return names
    return NAMINGS[0]


def _patterns(entry: object, name: str) -> list:
    found = getattr(entry, name, None) or []
    return [found] if isinstance(found, str) else list(found)
