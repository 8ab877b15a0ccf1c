"""What `patch` can be told about the experts; the names are those of the server's flags (doc/serving.md)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import ConfigurationError
from kt_kernel.formats.methods import AUTO, require_method, resolve_method
from kt_kernel.hybrid.activation import read_activation_counts
from kt_kernel.hybrid.model import HybridOptions
from kt_kernel.hybrid.placement import FREQUENCY, device_expert_masks
from kt_kernel.threads import plan_threads


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """`weight_path`: directory with the expert weights. `method`: their format; AUTO finds it out.

    Placement: `num_gpu_experts` of each layer live on the model's device, or `gpu_experts_ratio` (0 to 1) of
    all, chosen by `expert_placement_strategy`; `init_expert_location` is the file of counts for `frequency`.
    `max_deferred_experts_per_token`: added one MoE layer later. Calls of at least
    `gpu_prefill_token_threshold` tokens run layer by layer on the device (0 = never).
    `enable_dynamic_expert_update` chooses the device's experts anew after such a call, and every
    `expert_update_interval` forward passes (0 = not then). `miss_policy`: "cpu", or "auto" to fetch
    experts that are not on the device where measurements say it is faster.

    `cpuinfer` threads (default: one per physical core) are shared out over `threadpool_count` pools (default:
    one per NUMA node) on `numa_nodes`. Raises ConfigurationError for values that cannot work.
    """

    weight_path: str | os.PathLike
    method: str = AUTO
    num_gpu_experts: int | None = None
    gpu_experts_ratio: float | None = None
    expert_placement_strategy: str = "uniform"
    init_expert_location: str | os.PathLike | None = None
    max_deferred_experts_per_token: int = 0
    gpu_prefill_token_threshold: int = 0
    enable_dynamic_expert_update: bool = False
    expert_update_interval: int = 0
    miss_policy: str = "cpu"
    cpuinfer: int | None = None
    threadpool_count: int | None = None
    numa_nodes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_combinations()
        self.hybrid()

    def _check_numbers(self) -> None:
        for name in (
            "max_deferred_experts_per_token",
            "gpu_prefill_token_threshold",
            "expert_update_interval",
        ):
            if getattr(self, name) < 0:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)}, expected a number >= 0 (0 = off)."
                )
        if self.gpu_experts_ratio is not None and not 0 <= self.gpu_experts_ratio <= 1:
            raise ConfigurationError(
                f"gpu_experts_ratio is {self.gpu_experts_ratio}, expected a share from 0 to 1."
            )

    def _check_combinations(self) -> None:
        if self.num_gpu_experts is not None and self.gpu_experts_ratio is not None:
            raise ConfigurationError(
                f"num_gpu_experts is {self.num_gpu_experts} and gpu_experts_ratio is "
                f"{self.gpu_experts_ratio}; give one of them."
            )
        if self.init_expert_location is None and self.expert_placement_strategy == FREQUENCY:
            raise ConfigurationError(
                "expert_placement_strategy is 'frequency', which needs counts of an earlier run; name their "
                "file as init_expert_location."
            )
        if self.expert_update_interval and not self.enable_dynamic_expert_update:
            raise ConfigurationError(
                f"expert_update_interval is {self.expert_update_interval}, but "
                "enable_dynamic_expert_update is off; turn it on."
            )
        if self.enable_dynamic_expert_update and not (
            self.gpu_prefill_token_threshold or self.expert_update_interval
        ):
            raise ConfigurationError(
                "enable_dynamic_expert_update is on, but nothing would ever update: give "
                "gpu_prefill_token_threshold (updates after long prompts) or expert_update_interval."
            )

    def weight_method(self) -> str:
        """The method that reads the weight path; raises a KTError if it is not the one asked for, or none."""
        if self.method != AUTO:
            require_method(self.method)
        found = resolve_method(AUTO, self.weight_path).name
        if self.method not in (AUTO, found):
            raise ConfigurationError(
                f"method is {self.method}, but '{os.fspath(self.weight_path)}' holds {found} experts; give "
                f"{found}, or leave it out."
            )
        return found

    def hybrid(self) -> HybridOptions:
        """What the hybrid engine may do."""
        return HybridOptions(
            prefill_threshold=self.gpu_prefill_token_threshold,
            update_after_prefill=self.enable_dynamic_expert_update,
            update_interval=self.expert_update_interval,
            miss_policy=self.miss_policy,
        )

    def device_masks(self, num_layers: int, moe_layers: Sequence[int], num_experts: int) -> torch.Tensor:
        """bool [num_layers, num_experts], True = on the device at the start.

        Raises ConfigurationError for more experts than there are, or for the file of counts.
        """
        counts = None
        if self.expert_placement_strategy == FREQUENCY:
            counts = read_activation_counts(self.init_expert_location, num_layers, num_experts)
        return device_expert_masks(
            self.expert_placement_strategy,
            num_layers,
            moe_layers,
            num_experts,
            self.device_experts(len(moe_layers), num_experts),
            counts,
        )

    def device_experts(self, moe_layers: int, num_experts: int) -> int:
        """Experts of the whole model on the device; raises ConfigurationError for more than there are."""
        if self.gpu_experts_ratio is not None:
            return int(num_experts * moe_layers * self.gpu_experts_ratio)
        wanted = self.num_gpu_experts or 0
        if not 0 <= wanted <= num_experts:
            raise ConfigurationError(
                f"num_gpu_experts is {wanted}, but a layer of this model has {num_experts} experts; use a "
                "number from 0 to that."
            )
        return wanted * moe_layers

    def engine(self) -> dict[str, Any]:
        """The arguments of KTMoEWrapper that say which threads compute."""
        plan = plan_threads(kt_kernel_ext.topology(), self.cpuinfer, self.threadpool_count, self.numa_nodes)
        return {
            "cpuinfer_threads": plan.threads,
            "threadpool_count": plan.pools,
            "numa_nodes": plan.numa_nodes,
        }
