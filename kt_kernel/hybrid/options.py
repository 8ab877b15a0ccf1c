"""What the hybrid engine may do beside the plain split of a layer between CPU and device."""

from __future__ import annotations

from dataclasses import dataclass

from kt_kernel.errors import ConfigurationError

ON_CPU, AUTOMATIC = MISS_POLICIES = ("cpu", "auto")


@dataclass(frozen=True)
class HybridOptions:
    """By default nothing.

    `prefill_threshold`: tokens of a prompt from which on it meets whole layers on the device, 0 = never.
    `update_after_prefill`: choose the resident experts anew after every such call. `update_interval`:
    choose them anew every so many steps, 0 = never. `miss_policy`: who computes the experts that are not on
    the device, "cpu" or "auto" (some are fetched, where that is quicker). `verify_every`: check one token
    of every so many calls of a layer against the slow reference (verify.py), 0 = never.
    """

    prefill_threshold: int = 0
    update_after_prefill: bool = False
    update_interval: int = 0
    miss_policy: str = ON_CPU
    verify_every: int = 0

    def __post_init__(self) -> None:
        for name in ("prefill_threshold", "update_interval", "verify_every"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected 0 (off) or more.")
        if self.miss_policy not in MISS_POLICIES:
            raise ConfigurationError(
                f"the miss policy {self.miss_policy!r} is unknown; use one of {', '.join(MISS_POLICIES)}."
            )

    @property
    def copies_experts(self) -> bool:
        """May experts have to be written for the device while serving?"""
        return bool(self.prefill_threshold or self.update_interval or self.miss_policy != ON_CPU)
