"""`lora_config`: a PEFT configuration that puts LoRA on the experts, too."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

from peft import LoraConfig

from kt_kernel.adapters.files import EXPERTS
from kt_kernel.adapters.layout import NAMINGS, ProjectionNames
from kt_kernel.adapters.limits import PATTERNS
from kt_kernel.errors import ConfigurationError
from kt_kernel.training.experts import TrainableExperts
from kt_kernel.training.lora import LoraExperts

_EXPERTS_TOO = rf"|(?:.*\.{EXPERTS})"


class ExpertLoraConfig(LoraConfig):
    """A LoraConfig whose `target_modules` include the experts of models of `kt_kernel.training.load`.

    On disk it names what other software finds in a model: the projections of an expert.
    """

    names: ProjectionNames = NAMINGS[0]

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Write adapter_config.json."""
        stored = copy.copy(self)
        stored.__class__ = LoraConfig
        stored.target_modules = _stored_targets(self.target_modules, self.names)
        if self.use_rslora:  # which PEFT scales wrongly once it has fused gate and up, with twice the rank
            stored.use_rslora, stored.lora_alpha = False, self.lora_alpha * math.sqrt(self.r)
        stored.save_pretrained(save_directory, **options)


def lora_config(config: LoraConfig, *, experts: bool = True) -> LoraConfig:
    """`config` with LoRA on gate, up and down of every routed expert, or as it is; a new object.

    Rank, alpha, dropout and the rest are those of `config`; other `target_modules` stay, None becomes the
    experts alone. Raises ConfigurationError for "all-linear", which means other modules in every model, and
    for ranks and alphas of experts that are not `config`'s own.
    """
    if not experts:
        return copy.copy(config)
    targets = config.target_modules
    if targets == "all-linear":
        raise ConfigurationError(
            "target_modules is 'all-linear', in which experts have no place; name the other modules, such as "
            "['q_proj', 'k_proj', 'v_proj', 'o_proj']."
        )
    if config.target_parameters:
        raise ConfigurationError(
            f"target_parameters is {config.target_parameters}, but the experts of this model are no "
            "parameters; leave it out, experts=True stands for them."
        )
    for pattern in PATTERNS:
        for key in getattr(config, pattern) or ():
            if re.fullmatch(rf"(?:.*\.)?(?:{key})", f"model.layers.0.mlp.{EXPERTS}"):
                raise ConfigurationError(
                    f"{pattern} has '{key}', which means experts, but they have one rank and alpha, r and "
                    "lora_alpha; give these what experts should have, and other modules patterns."
                )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ConfigurationError(
            "use_rslora is set beside rank_pattern or alpha_pattern, which is not available with experts; "
            "leave out one of them."
        )
    new = copy.copy(config)
    new.__class__ = ExpertLoraConfig
    if isinstance(targets, str):
        new.target_modules = f"(?:{targets}){_EXPERTS_TOO}"
    else:
        new.target_modules = {*(targets or ()), EXPERTS}
    new._register_custom_module({TrainableExperts: LoraExperts})
    return new


def _stored_targets(targets: str | set[str] | None, names: ProjectionNames) -> str | set[str] | None:
    if isinstance(targets, str):
        own = targets.removesuffix(_EXPERTS_TOO)
        return rf"{own}|(?:.*\.{EXPERTS}\.(?:\d+\.)?(?:{'|'.join(names.all)}))"
    return (set(targets or ()) - {EXPERTS}) | set(names.all)
