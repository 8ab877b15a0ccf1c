"""What a user can say about the experts of a model, the same for every way to run one.

The fields have the names of the server's flags (doc/serving.md) without their prefix. The sentences of errors
spell them as the user did: SGLang's plug-in overrides `spelled`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.checkpoint.sources import open_experts
from kt_kernel.errors import ConfigurationError, FeatureUnavailableError
from kt_kernel.formats.methods import (
    AUTO,
    check_activations,
    check_weight_storage,
    require_method,
    resolve_method,
)
from kt_kernel.hybrid.activation import read_activation_counts
from kt_kernel.hybrid.layout import ExpertLayout
from kt_kernel.hybrid.options import ON_CPU, HybridOptions
from kt_kernel.hybrid.placement import FREQUENCY, device_expert_masks
from kt_kernel.layer_config import ACTIVATIONS, MAPPED, PACKED
from kt_kernel.moe import KTMoEWrapper
from kt_kernel.threads import ThreadPlan, check_thread_request, plan_threads

logger = logging.getLogger(__name__)

# Fields that count something, 0 = none of it.
_COUNTS = (
    "num_gpu_experts",
    "max_deferred_experts_per_token",
    "gpu_prefill_token_threshold",
    "expert_update_interval",
    "verify",
)


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """`weight_path`: directory with the expert weights, or their GGUF file. `method`: their format; AUTO
    finds it out. `gguf_mmap`: compute from the GGUF file itself, slower and without memory for the weights.
    `activations`: what the CPU rounds the experts' inputs to, "bf16" or "int8" (doc/kernels.md); "auto" is
    the faster one for this format on this CPU.

    Placement: `num_gpu_experts` of each layer live on the model's device (None: none), or instead
    `gpu_experts_ratio` (0 to 1) of all, chosen by `expert_placement_strategy`; `init_expert_location` is the
    file of counts for `frequency`. `max_deferred_experts_per_token`: added one MoE layer later. Prompts of
    at least `gpu_prefill_token_threshold` tokens run layer by layer on the device (0 = never).
    `enable_dynamic_expert_update` chooses the device's experts anew after such a call, and every
    `expert_update_interval` forward passes (0 = not then). `miss_policy`: "cpu", or "auto" to fetch
    experts that are not on the device where measurements say it is faster.

    `cpuinfer` threads (default: one per physical core) are shared out over `threadpool_count` pools (default:
    one per NUMA node) on `numa_nodes`. Raises ConfigurationError for values that cannot work.
    """

    weight_path: str | os.PathLike
    method: str = AUTO
    activations: str = "auto"
    gguf_mmap: bool = False
    num_gpu_experts: int | None = None
    gpu_experts_ratio: float | None = None
    expert_placement_strategy: str = "uniform"
    init_expert_location: str | os.PathLike | None = None
    max_deferred_experts_per_token: int = 0
    gpu_prefill_token_threshold: int = 0
    enable_dynamic_expert_update: bool = False
    expert_update_interval: int = 0
    miss_policy: str = ON_CPU
    verify: int = 0
    cpuinfer: int | None = None
    threadpool_count: int | None = None
    numa_nodes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.numa_nodes is not None:
            object.__setattr__(self, "numa_nodes", tuple(self.numa_nodes))
        self._check_values()
        check_thread_request(self.cpuinfer, self.threadpool_count, self.numa_nodes, self.spelled)
        self._check_update()
        self._check_statistics()
        self._check_verify()
        self.hybrid()

    def spelled(self, field: str) -> str:
        """How the user spells that field."""
        return field

    # ---- checks --------------------------------------------------------------------------------

    def _check_values(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigurationError(f"{self.spelled(name)} is {value}, expected at least 0.")
        ratio = self.gpu_experts_ratio
        if ratio is not None and not 0 <= ratio <= 1:
            raise ConfigurationError(
                f"{self.spelled('gpu_experts_ratio')} is {ratio}, expected a number from 0 to 1."
            )
        if self.activations not in ACTIVATIONS:
            raise ConfigurationError(
                f"{self.spelled('activations')} is {self.activations!r}, expected one of "
                f"{', '.join(ACTIVATIONS)}."
            )

    def _check_update(self) -> None:
        interval, update = self.expert_update_interval, self.spelled("enable_dynamic_expert_update")
        if interval and not self.enable_dynamic_expert_update:
            raise ConfigurationError(
                f"{self.spelled('expert_update_interval')} is {interval} without {update}, so no expert "
                "would move; turn that on, or leave the interval out."
            )
        if self.enable_dynamic_expert_update and not (interval or self.gpu_prefill_token_threshold):
            raise ConfigurationError(
                f"{update} is given without an occasion to move experts; add "
                f"{self.spelled('expert_update_interval')} (every so many steps) or "
                f"{self.spelled('gpu_prefill_token_threshold')} (after long prompts)."
            )

    def _check_verify(self) -> None:
        if self.verify and self.max_deferred_experts_per_token:
            raise ConfigurationError(
                f"{self.spelled('verify')} compares what a layer gives with the sum of its experts, which is "
                f"another one with {self.spelled('max_deferred_experts_per_token')}; leave one of them out."
            )

    def _check_statistics(self) -> None:
        strategy, file = self.expert_placement_strategy, self.init_expert_location
        if strategy == FREQUENCY and file is None:
            raise ConfigurationError(
                f"{self.spelled('expert_placement_strategy')} {FREQUENCY} needs counts of an earlier run; "
                f"name their file with {self.spelled('init_expert_location')}, or choose another strategy."
            )
        if strategy != FREQUENCY and file is not None:
            raise ConfigurationError(
                f"{self.spelled('init_expert_location')} {os.fspath(file)} is read by "
                f"{self.spelled('expert_placement_strategy')} {FREQUENCY}, but the strategy is {strategy}; "
                "give both, or neither."
            )

    # ---- what was left open ----------------------------------------------------------------------

    def weight_method(self) -> str:
        """The method that reads the weight path, by the name asked for where it has several.

        Raises a KTError if it is not the one asked for, or none, or has no kernels for the activations asked
        for. All layers are looked at, so that a wrong checkpoint is reported before the model is built.
        """
        asked = None if self.method == AUTO else require_method(self.method)
        found = resolve_method(AUTO, self.weight_path, asked.name if asked else "")
        if asked is not None and asked.file_method != found.file_method:
            option = self.spelled("method")
            raise ConfigurationError(
                f"{option} is {asked.name}, but {os.fspath(self.weight_path)} holds {found.name} experts; "
                f"give {option} {found.name}, or leave it out."
            )
        method = asked or found
        check_activations(method, self.activations, self.spelled("activations"))
        check_weight_storage(method, self._weight_storage, self.activations, self.spelled("gguf_mmap"))
        self._check_biases(method.name)
        return method.name

    def _check_biases(self, method: str) -> None:
        """Experts with biases are not copied to a device; those that SGLang loads there have theirs."""
        if self.hybrid().copies_experts and self._has_biases(method):
            raise self._not_copied(
                ("gpu_prefill_token_threshold", "enable_dynamic_expert_update", "miss_policy")
            )

    def check_slots_filled_by_copies(self) -> None:
        """For those who load no device experts of their own: can the CPU's be copied to fill the slots?

        Raises FeatureUnavailableError for experts with biases; the method must be known (`with_method`).
        """
        if (self.num_gpu_experts or self.gpu_experts_ratio) and self._has_biases(self.method):
            raise self._not_copied(("num_gpu_experts", "gpu_experts_ratio"))

    def _has_biases(self, method: str) -> bool:
        return open_experts(self.weight_path, method).has_biases()

    def _not_copied(self, options: tuple[str, ...]) -> FeatureUnavailableError:
        spelled = ", ".join(self.spelled(option) for option in options)
        return FeatureUnavailableError(
            f"not available yet: the experts of '{os.fspath(self.weight_path)}' have biases, and such "
            f"experts are not copied to a device; leave out {spelled}."
        )

    @property
    def _weight_storage(self) -> str:
        return MAPPED if self.gguf_mmap else PACKED

    def with_method(self) -> ExpertOptions:
        """With the method that reads the weight path; raises as `weight_method` does."""
        return replace(self, method=self.weight_method())

    def with_threads(self) -> ExpertOptions:
        """With threads, pools and nodes of this machine where none were asked for.

        Raises ConfigurationError if this machine cannot give what was asked for.
        """
        plan = self.thread_plan()
        if self.cpuinfer is None:
            logger.info(
                "%s is not given: %d threads, one per usable core", self.spelled("cpuinfer"), plan.threads
            )
        return replace(self, cpuinfer=plan.threads, threadpool_count=plan.pools, numa_nodes=plan.numa_nodes)

    def thread_plan(self) -> ThreadPlan:
        """Which threads compute on this machine; raises as `with_threads` does."""
        return plan_threads(
            kt_kernel_ext.topology(), self.cpuinfer, self.threadpool_count, self.numa_nodes, self.spelled
        )

    # ---- placement -------------------------------------------------------------------------------

    def device_experts(self, layout: ExpertLayout) -> int:
        """Experts of the whole model on the device; raises ConfigurationError for more than there are."""
        if self.gpu_experts_ratio is not None:
            return int(layout.num_experts * len(layout.moe_layers) * self.gpu_experts_ratio)
        wanted = self.num_gpu_experts or 0
        if wanted > layout.num_experts:
            raise ConfigurationError(
                f"{self.spelled('num_gpu_experts')} is {wanted}, but a layer of this model has "
                f"{layout.num_experts} experts; use a number from 0 to that."
            )
        return wanted * len(layout.moe_layers)

    def log_placement(self) -> None:
        """Say which of the numbers counts, where that is not plain."""
        number, ratio = self.spelled("num_gpu_experts"), self.spelled("gpu_experts_ratio")
        if self.gpu_experts_ratio is not None and self.num_gpu_experts is not None:
            logger.warning("%s overrides %s %d", ratio, number, self.num_gpu_experts)
        elif self.gpu_experts_ratio is None and self.num_gpu_experts is None:
            logger.info("%s is not given: all experts run on the CPU", number)

    def device_masks(self, layout: ExpertLayout) -> torch.Tensor:
        """bool [layers, experts], True = on the device at the start.

        Raises ConfigurationError for more experts than there are, or for the file of counts.
        """
        counts = None
        if self.expert_placement_strategy == FREQUENCY:
            counts = read_activation_counts(self.init_expert_location, layout.num_layers, layout.num_experts)
        return device_expert_masks(
            self.expert_placement_strategy,
            layout.num_layers,
            layout.moe_layers,
            layout.num_experts,
            self.device_experts(layout),
            counts,
        )

    # ---- what the layers are made from -----------------------------------------------------------

    def hybrid(self) -> HybridOptions:
        """What the hybrid engine may do."""
        return HybridOptions(
            prefill_threshold=self.gpu_prefill_token_threshold,
            update_after_prefill=self.enable_dynamic_expert_update and self.gpu_prefill_token_threshold > 0,
            update_interval=self.expert_update_interval,
            miss_policy=self.miss_policy,
            verify_every=self.verify,
        )

    def wrapper(self, *, num_experts_per_tok: int, **layer: Any) -> KTMoEWrapper:
        """The CPU experts of one layer, not loaded yet, with every expert on the CPU.

        `layer`: the other arguments of KTMoEWrapper that describe it. Of options `with_threads`. Raises what
        KTMoEWrapper does.
        """
        return KTMoEWrapper(
            num_experts_per_tok=num_experts_per_tok,
            weight_path=self.weight_path,
            method=self.method,
            activations=self.activations,
            weight_storage=self._weight_storage,
            cpuinfer_threads=self.cpuinfer,
            threadpool_count=self.threadpool_count,
            numa_nodes=self.numa_nodes,
            max_deferred_experts_per_token=min(self.max_deferred_experts_per_token, num_experts_per_tok),
            **layer,
        )
