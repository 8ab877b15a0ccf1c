"""What the layers of one server are made from: its options with every default filled in, and its model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch

from kt_kernel.errors import ConfigurationError
from kt_kernel.hybrid.layout import ExpertLayout
from kt_kernel.hybrid.shares import AUTO as AUTO_RANKS
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.integrations.sglang.flags import KTFlags

logger = logging.getLogger(__name__)

SETTINGS_ATTRIBUTE = "_kt_settings"  # of SGLang's ServerArgs


@dataclass(frozen=True)
class KTSettings:
    """What every layer of one server has in common.

    `options`: with the weights' method, threads and pools. `max_tokens`: the most of one call. `records`: can
    be told to record where experts were. `adapter`: the folder of one that is served with the model.
    `shares_experts`: each rank computes its share of the CPU's experts, else rank 0 all of them. `draft`: the
    settings of the draft model, whose layers follow the model's own; None = it has no experts, or they are
    all SGLang's. `for_draft_model`: these are such settings.
    """

    options: ExpertOptions
    layout: ExpertLayout
    max_tokens: int
    records: bool = False
    adapter: str | None = None
    shares_experts: bool = False
    draft: KTSettings | None = None
    for_draft_model: bool = False

    @property
    def device_experts(self) -> int:
        """How many experts of the whole model live on the device at the start."""
        return self.options.device_experts(self.layout)

    def device_mask(self, layer_idx: int, num_experts: int) -> torch.Tensor:
        """bool [num_experts], True = on the device. Raises ConfigurationError if the layer is not as
        announced.
        """
        if self.device_experts == 0:
            return torch.zeros(num_experts, dtype=torch.bool)
        if layer_idx not in self.layout.moe_layers or num_experts != self.layout.num_experts:
            raise ConfigurationError(
                f"layer {layer_idx} has {num_experts} experts, but the model's config.json announces "
                f"{self.layout.num_experts} in the layers {list(self.layout.moe_layers)}; serve it with "
                "--kt-num-gpu-experts 0."
            )
        return _all_masks(self.options, self.layout)[layer_idx]


@lru_cache(maxsize=2)
def _all_masks(options: ExpertOptions, layout: ExpertLayout) -> torch.Tensor:
    return options.device_masks(layout)


def make_settings(flags: KTFlags, layout: ExpertLayout, max_tokens: int) -> KTSettings:
    """Fill the defaults from the machine and the model; raises ConfigurationError where they do not fit."""
    options = flags.options().with_threads()
    options.log_placement()
    settings = KTSettings(
        options,
        layout,
        max_tokens,
        records=flags.record_gpu_expert_distribution,
        adapter=flags.expert_lora_path or flags.lora_path,
        shares_experts=flags.cpu_ranks == AUTO_RANKS,
    )
    all_experts = layout.num_experts * len(layout.moe_layers)
    if options.enable_dynamic_expert_update and settings.device_experts in (0, all_experts):
        logger.warning(
            "--kt-enable-dynamic-expert-update has nothing to move: %d experts are on the device",
            settings.device_experts,
        )
    # A damaged file of statistics is reported now, not by the processes that load layers.
    _all_masks(options, layout)
    return settings
