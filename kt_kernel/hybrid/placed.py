"""The experts of one MoE layer in both places, CPU memory and the device's slots: what there is, before
anything is computed (layer.py) or moved (prefill.py, fetch.py, update.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kt_kernel.errors import ConfigurationError
from kt_kernel.faults import fails
from kt_kernel.formats.expert_image import ExpertEncoding
from kt_kernel.hybrid.context import HybridContext
from kt_kernel.hybrid.experts import DeviceExperts
from kt_kernel.hybrid.feed import COPIES, MISSES, ExpertFeed
from kt_kernel.hybrid.options import ON_CPU
from kt_kernel.hybrid.slots import LayerPlacement
from kt_kernel.hybrid.statistics import LayerStatistics
from kt_kernel.moe import KTMoEWrapper


class PlacedExperts:
    """The routed experts of decoder layer `layer_idx`.

    `wrapper`: this rank's share of all experts on the CPU, loaded, with no expert masked; None on ranks that
    have none (ranks.py). `resident`: the device's experts, whose slots `placement` describes; None if there
    are no slots. `new_experts(n)` makes room for n experts of this layer's kind.
    """

    position: int  # among the model's MoE layers

    def __init__(
        self,
        layer_idx: int,
        wrapper: KTMoEWrapper | None,
        resident: DeviceExperts | None,
        placement: LayerPlacement,
        new_experts: Callable[[int], DeviceExperts],
        context: HybridContext,
    ) -> None:
        self.layer_idx = layer_idx
        self.wrapper = wrapper
        self.resident = resident
        self.placement = placement
        self.context = context
        self._new_experts = new_experts
        self.num_experts = placement.current.num_experts
        self.statistics = LayerStatistics(self.num_experts, context.device)
        self._encoding: ExpertEncoding | None = None
        self._feed: ExpertFeed | None = None
        slots = 0 if resident is None else resident.capacity
        if slots != placement.current.capacity:
            raise ConfigurationError(
                f"layer {layer_idx}: the device's tensors have {slots} slots, but the placement has "
                f"{placement.current.capacity}; make both for the same number."
            )
        if wrapper is not None:
            wrapper.join_chain(context.chain(wrapper.cpu_infer))
            # Settled for good: if updates fill all slots later, what was deferred to here is still added.
            wrapper.has_cpu_experts = placement.current.count < self.num_experts
        placement.tables(context.device)  # made now: a capture could not

    def open_feeds(self) -> None:
        """Make the ways to the device that the options may need; collective."""
        if self.context.options.copies_experts:
            self._feed = self.feed_for(COPIES)
        if self.context.options.miss_policy != ON_CPU:
            self.feed_for(MISSES)

    def new_experts(self, count: int) -> DeviceExperts:
        """Room for `count` experts of this layer's kind."""
        if fails("device-memory"):
            raise torch.OutOfMemoryError(f"no memory for {count} experts")
        # Made in inference mode, the tensors could be written in that mode only.
        with torch.inference_mode(mode=False):
            return self._new_experts(count)

    @property
    def feed(self) -> ExpertFeed:
        """This layer's experts for the copying thread; the first use is collective."""
        if self._feed is None:
            self._feed = self.feed_for(COPIES)
        return self._feed

    def feed_for(self, user: str) -> ExpertFeed:
        """This layer's experts for `user` (feed.py); the first use is collective."""
        return self.context.feed(self.wrapper, self.encoding, user)

    @property
    def encoding(self) -> ExpertEncoding:
        """How this layer's experts are written for one rank; the first use is collective."""
        if self._encoding is None:
            readers = self.context.readers
            mine = None if self.wrapper is None else self.wrapper.encoding(readers.size)
            self._encoding = readers.broadcast(mine)
        return self._encoding

    @property
    def has_cold_experts(self) -> bool:
        """Are there experts without a slot?"""
        return self.placement.current.count < self.num_experts

    def load_residents(self) -> None:
        """Fill the slots from the CPU's experts; collective, for models that load no device weights."""
        current = self.placement.current
        self.fill_slots({expert: current.slot(expert) for expert in current.experts})

    def fill_slots(self, slots: Mapping[int, int]) -> int:
        """Put experts (the keys) from CPU memory into slots that no placement refers to.

        On the copying thread, in the same order on all ranks; returns the bytes copied to the device.
        """
        return self.feed.fill(self.resident, slots)

    def with_deferred(self, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`output` plus what the layer before deferred, for calls that do not run the CPU's experts."""
        deferred = None if self.wrapper is None else self.wrapper.take_deferred(hidden)
        return output if deferred is None else output + deferred
