"""The flags with every default filled in: what the layers of one server are made from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import ConfigurationError
from kt_kernel.formats.methods import AUTO, require_method, resolve_method
from kt_kernel.hybrid.activation import read_activation_counts
from kt_kernel.hybrid.layout import ExpertLayout
from kt_kernel.hybrid.placement import FREQUENCY, device_expert_masks
from kt_kernel.integrations.sglang.flags import AUTOMATIC, ON_CPU, KTFlags
from kt_kernel.threads import ThreadPlan, plan_threads, usable_nodes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KTSettings:
    """What every layer of one server has in common.

    `device_experts`: how many experts of the whole model live on the device.
    `statistics`: the file with the counts of the frequency strategy.
    `max_tokens`: the most of one call.
    `prefill_threshold`: calls of at least as many tokens run wholly on the device, 0 = none.
    `updates`: do experts move while serving; `update_interval`: look every so many steps, 0 = after prefill.
    `records`: can be told to record where experts were.
    `draft`: the settings of the draft model, whose layers follow the model's own; None = it has no experts,
    or they are all SGLang's. `for_draft_model`: these are such settings.
    """

    weight_path: str
    method: str
    threads: int
    pools: int
    numa_nodes: tuple[int, ...] | None
    layout: ExpertLayout
    strategy: str
    device_experts: int
    max_deferred: int
    max_tokens: int
    statistics: str | None = None
    prefill_threshold: int = 0
    updates: bool = False
    update_interval: int = 0
    miss_policy: str = ON_CPU
    records: bool = False
    draft: KTSettings | None = None
    for_draft_model: bool = False

    @property
    def moves_experts(self) -> bool:
        """Are experts written to the device while serving?"""
        return self.prefill_threshold > 0 or self.updates or self.miss_policy == AUTOMATIC

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
        return _all_masks(self)[layer_idx]


@lru_cache(maxsize=2)
def _all_masks(settings: KTSettings) -> torch.Tensor:
    layout = settings.layout
    counts = None
    if settings.strategy == FREQUENCY:
        counts = read_activation_counts(settings.statistics, layout.num_layers, layout.num_experts)
    return device_expert_masks(
        settings.strategy,
        layout.num_layers,
        layout.moe_layers,
        layout.num_experts,
        settings.device_experts,
        counts,
    )


def weight_method(flags: KTFlags) -> str:
    """The method that reads the weight path; raises a KTError if it is not the one asked for, or none.

    All layers are looked at, so that a wrong checkpoint is reported before the model is built.
    """
    if flags.method != AUTO:
        require_method(flags.method)
    found = resolve_method(AUTO, flags.weight_path).name
    if flags.method not in (AUTO, found):
        raise ConfigurationError(
            f"--kt-method is {flags.method}, but {flags.weight_path} holds {found} experts; give "
            f"--kt-method {found}, or leave it out."
        )
    return found


def make_settings(flags: KTFlags, layout: ExpertLayout, max_tokens: int) -> KTSettings:
    """Fill the defaults from the machine and the model; raises ConfigurationError where they do not fit."""
    plan = _plan_threads(flags)
    settings = KTSettings(
        weight_path=flags.weight_path,
        method=flags.method,
        threads=plan.threads,
        pools=plan.pools,
        numa_nodes=plan.numa_nodes,
        layout=layout,
        strategy=flags.expert_placement_strategy,
        device_experts=_device_experts(flags, layout),
        max_deferred=flags.max_deferred_experts_per_token or 0,
        max_tokens=max_tokens,
        statistics=flags.init_expert_location if flags.expert_placement_strategy == FREQUENCY else None,
        prefill_threshold=flags.gpu_prefill_token_threshold or 0,
        updates=flags.enable_dynamic_expert_update,
        update_interval=flags.expert_update_interval or 0,
        miss_policy=flags.miss_policy,
        records=flags.record_gpu_expert_distribution,
    )
    if settings.updates and settings.device_experts in (0, layout.num_experts * len(layout.moe_layers)):
        logger.warning(
            "--kt-enable-dynamic-expert-update has nothing to move: %d experts are on the device",
            settings.device_experts,
        )
    _all_masks(settings)  # a damaged statistics file is reported now, not by the processes that load layers
    return settings


def _plan_threads(flags: KTFlags) -> ThreadPlan:
    """Raises ConfigurationError for nodes this process may not use, and for more pools than threads."""
    topology = kt_kernel_ext.topology()
    present = usable_nodes(topology)
    absent = [node for node in flags.numa_nodes or () if node not in present]
    if absent:
        raise ConfigurationError(
            f"--kt-numa-nodes names node {absent[0]}, but this process may use the nodes {list(present)}; "
            "choose from these."
        )
    plan = plan_threads(topology, flags.cpuinfer, flags.threadpool_count, flags.numa_nodes)
    if plan.pools > plan.threads:
        raise ConfigurationError(
            f"{plan.pools} thread pools need as many threads, but there are {plan.threads}; set "
            "--kt-threadpool-count lower or "
            "--kt-cpuinfer higher."
        )
    if flags.cpuinfer is None:
        logger.info("--kt-cpuinfer is not given: %d threads, one per usable core", plan.threads)
    return plan


def _device_experts(flags: KTFlags, layout: ExpertLayout) -> int:
    """Experts of the whole model on the device. Neither flag given means none: all stay on the CPU."""
    if flags.gpu_experts_ratio is not None:
        if flags.num_gpu_experts is not None:
            logger.warning("--kt-gpu-experts-ratio overrides --kt-num-gpu-experts %d", flags.num_gpu_experts)
        return int(layout.num_experts * len(layout.moe_layers) * flags.gpu_experts_ratio)
    if flags.num_gpu_experts is None:
        logger.info("--kt-num-gpu-experts is not given: all experts run on the CPU")
        return 0
    if flags.num_gpu_experts > layout.num_experts:
        raise ConfigurationError(
            f"--kt-num-gpu-experts is {flags.num_gpu_experts}, but a layer of this model has "
            f"{layout.num_experts} "
            "experts; use a number from 0 to that."
        )
    return flags.num_gpu_experts * len(layout.moe_layers)
