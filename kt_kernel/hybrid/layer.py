"""One MoE layer split between the CPU and a device: the forward pass.

    hybrid     tokens ─> CPU: experts without a slot ──────┐
                    └──> device: experts with a slot ───> sum
    prefill    many tokens ─> device: all experts, copied there for this call (prefill.py)
    all CPU    no slots: the CPU's sum is the result

Only rank 0 has CPU experts, in full width; the others compute their share of the device's experts, and the
model's usual sum over the ranks then counts everything once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kt_kernel.device_ops.routing import Split, route
from kt_kernel.errors import ConfigurationError, InputError
from kt_kernel.formats.expert_image import ExpertEncoding
from kt_kernel.hybrid.experts import DeviceExperts
from kt_kernel.hybrid.feed import COPIES, MISSES, ExpertFeed
from kt_kernel.hybrid.slots import LayerPlacement
from kt_kernel.hybrid.statistics import LayerStatistics

if TYPE_CHECKING:
    from kt_kernel.hybrid.model import HybridModel
    from kt_kernel.moe import KTMoEWrapper

# hidden, ids, weights -> their sum
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class HybridLayer:
    """The routed experts of decoder layer `layer_idx`.

    `wrapper`: all experts on the CPU, loaded, with no expert masked; None on other ranks than 0. `resident`:
    the device's experts, whose slots `placement` describes; None if there are no slots. `new_experts(n)`
    makes room for n experts of this layer's kind. `cpu_weight_factor`: what the device's experts multiply
    their sums by and the CPU's do not.

    Layers of a model are made in the order in which they run, by all ranks, after their weights are loaded.
    """

    def __init__(
        self,
        layer_idx: int,
        wrapper: KTMoEWrapper | None,
        resident: DeviceExperts | None,
        placement: LayerPlacement,
        new_experts: Callable[[int], DeviceExperts],
        model: HybridModel,
        cpu_weight_factor: float = 1.0,
    ) -> None:
        self.layer_idx = layer_idx
        self.wrapper = wrapper
        self.resident = resident
        self.placement = placement
        self._new_experts = new_experts
        self.model = model
        self.num_experts = placement.current.num_experts
        self.statistics = LayerStatistics(self.num_experts, model.device)
        self._cpu_weight_factor = cpu_weight_factor
        self._encoding: ExpertEncoding | None = None
        slots = 0 if resident is None else resident.capacity
        if slots != placement.current.capacity:
            raise ConfigurationError(
                f"layer {layer_idx}: the device's tensors have {slots} slots, but the placement has "
                f"{placement.current.capacity}; make both for the same number."
            )
        if wrapper is not None:
            wrapper.join_chain(model.chain(wrapper.cpu_infer))
            # Settled for good: if updates fill all slots later, what was deferred to here is still added.
            wrapper.has_cpu_experts = placement.current.count < self.num_experts
        placement.tables(model.device)  # made now: a capture could not
        self.position = model.add(self)  # among the model's MoE layers
        self._feed = model.feed(self, COPIES) if model.options.copies_experts else None
        if model.options.miss_policy != "cpu":
            model.feed(self, MISSES)

    def new_experts(self, count: int) -> DeviceExperts:
        """Room for `count` experts of this layer's kind."""
        # Made in inference mode, the tensors could be written in that mode only.
        with torch.inference_mode(mode=False):
            return self._new_experts(count)

    @property
    def feed(self) -> ExpertFeed:
        """This layer's experts for the copying thread; the first use is collective."""
        if self._feed is None:
            self._feed = self.model.feed(self, COPIES)
        return self._feed

    @property
    def encoding(self) -> ExpertEncoding:
        """How rank 0 writes this layer's experts for one rank; the first use is collective."""
        if self._encoding is None:
            ranks = self.model.ranks
            mine = None if self.wrapper is None else self.wrapper.encoding(ranks.size)
            self._encoding = ranks.broadcast(mine)
        return self._encoding

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts, this rank's share of it: a new tensor like `hidden`.

        `hidden` [T, H]; `ids` [T, k] of any integer type, -1 = none; `weights` [T, k]. All on the model's
        device; none is changed. Raises InputError.
        """
        self._check_ids(ids)
        if not self.model.prefill.takes(self, hidden):
            return self._hybrid(hidden, ids, weights, self.statistics.counts_of_pass(ids.shape[1]))
        self.statistics.count(ids)
        output = self.model.prefill.run(self, hidden, ids, weights)
        return self._hybrid(hidden, ids, weights, counts=None) if output is None else output

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

    # ---- the split -----------------------------------------------------------------------------

    def _hybrid(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor | None
    ) -> torch.Tensor:
        """`counts`: where the uses are still to be counted."""
        tables = self.placement.tables(hidden.device)  # read once: both halves see one version
        split = Split(tables.slot_of, tables.on_device, counts, self._cpu_weight_factor)
        if self.resident is None:
            split = replace(split, slot_of=None)
        if self.placement.current.count == self.num_experts:
            slots = self._route_alone(ids, weights, split)
            return self.with_deferred(self.resident.compute(hidden, slots, weights), hidden)
        fetch = self.model.misses.plan(self, ids)
        if self.resident is None and fetch is None:
            return self._on_cpu_alone(hidden, ids, weights, replace(split, on_device=None))
        if fetch is None:
            return self._split(hidden, ids, weights, split)
        with fetch:
            split = replace(split, on_device=fetch.skipped_by_cpu(tables))
            return self._split(hidden, ids, weights, split, fetch.compute)

    def _split(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        split: Split,
        compute_others: Compute | None = None,
    ) -> torch.Tensor:
        """The CPU's experts, and meanwhile the resident ones and what `compute_others` adds."""
        if self.wrapper is None:
            slots = self._route_alone(ids, weights, split)
        else:
            slots = self.wrapper.submit_split(hidden, ids, weights, split)
        if self.resident is None:
            output = torch.zeros_like(hidden)
        else:
            output = self.resident.compute(hidden, slots, weights)
        if compute_others is not None:
            output = output + compute_others(hidden, ids, weights)
        return output if self.wrapper is None else output + self.wrapper.sync_forward(hidden)

    def _on_cpu_alone(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, split: Split
    ) -> torch.Tensor:
        if self.wrapper is None:
            self._route_alone(ids, weights, split)
            return torch.zeros_like(hidden)
        return self.wrapper.forward_split(hidden, ids, weights, split)

    def _route_alone(self, ids: torch.Tensor, weights: torch.Tensor, split: Split) -> torch.Tensor | None:
        """The device's slots, where the CPU has no part in the call."""
        return route(ids.contiguous(), weights, None, split, self.num_experts)[0]

    # ---- checks --------------------------------------------------------------------------------

    def _check_ids(self, ids: torch.Tensor) -> None:
        """On a CPU, where looking is free, impossible ids are an error of ours and not of an index."""
        if ids.is_cpu and ids.numel():
            least, most = (int(value) for value in ids.aminmax())
            if least < -1 or most >= self.num_experts:
                raise InputError(
                    f"layer {self.layer_idx}: topk_ids holds {least if least < -1 else most}, expected "
                    f"numbers from -1 (none) to {self.num_experts - 1}."
                )
