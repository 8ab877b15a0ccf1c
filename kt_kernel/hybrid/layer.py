"""One MoE layer split between the CPU and a device: the forward pass.

    hybrid     tokens ─> CPU: experts without a slot ──────┐
                    └──> device: experts with a slot ───> sum
    prefill    long prompts ─> device: all experts, copied there for this pass (prefill.py)
    all CPU    no slots: the CPU's sum is the result

Each rank computes its share of the CPU's experts (ranks.py) and of the device's; the model's usual sum over
the ranks then counts everything once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from kt_kernel.device_ops.routing import Split, route
from kt_kernel.errors import InputError
from kt_kernel.hybrid.experts import DeviceExperts
from kt_kernel.hybrid.model import HybridModel
from kt_kernel.hybrid.pass_rows import RowSplit
from kt_kernel.hybrid.placed import PlacedExperts
from kt_kernel.hybrid.slots import LayerPlacement
from kt_kernel.hybrid.verify import Computed
from kt_kernel.moe import KTMoEWrapper

# hidden, ids, weights -> their sum
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class HybridLayer(PlacedExperts):
    """`PlacedExperts` that compute. `cpu_weight_factor`: what the device's experts multiply their sums by and
    the CPU's do not.

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
        super().__init__(layer_idx, wrapper, resident, placement, new_experts, model.context)
        self._model = model
        self._cpu_weight_factor = cpu_weight_factor
        self.position = model.add(self)
        self.open_feeds()

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts, this rank's share of it: a new tensor like `hidden`.

        `hidden` [T, H]; `ids` [T, k] of any integer type, -1 = none; `weights` [T, k]. All on the model's
        device; none is changed. Raises InputError.
        """
        self._check_ids(ids)
        output = self._computed(hidden, ids, weights)
        if self._model.verifier is not None:
            call = Computed(hidden, ids, weights * self._cpu_weight_factor, output)
            self._model.verifier.look(self, call)
        return output

    def _computed(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = self._model.prefill.rows(self, hidden)
        if rows is None:
            return self._hybrid(hidden, ids, weights, self.statistics.counts_of_pass(ids.shape[1]))
        self.statistics.count(ids)
        output = self._streamed(hidden, ids, weights, rows)
        return self._hybrid(hidden, ids, weights, counts=None) if output is None else output

    def _streamed(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, rows: RowSplit
    ) -> torch.Tensor | None:
        """The whole call's output, `rows` of it by layerwise prefill; None if memory is short."""
        if rows.others is None:
            output = self._model.prefill.run(self, hidden, ids, weights)
            return None if output is None else self.with_deferred(output, hidden)
        some, others = rows.streamed, rows.others
        streamed = self._model.prefill.run(self, hidden[some], ids[some], weights[some])
        if streamed is None:
            return None
        output = torch.empty_like(hidden)
        output[some] = streamed
        output[others] = self._hybrid(hidden[others], ids[others], weights[others], counts=None)
        return output

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
        fetch = self._model.misses.plan(self, ids)
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
