"""From expert numbers to places in a weight tensor that holds only some of the experts of a layer.

`Placement` says which expert is in which slot at one time, and never changes. `LayerPlacement` holds the
one that is current. A forward pass reads `LayerPlacement.tables` once and uses them for both of its halves,
so the CPU skips exactly the experts that the device computes:

    ids [tokens, k] ──> tables.slots(ids)   the device's slots, -1 = the CPU computes it
                   └──> tables.on_device    what the CPU skips
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from kt_kernel.errors import CallOrderError, ConfigurationError

EMPTY = -1


@dataclass(frozen=True)
class Placement:
    """`expert_of_slot`: the expert in each slot, EMPTY = none; versions of one layer count up from 0.

    Raises ConfigurationError if an expert is none of `num_experts`, or in two slots.
    """

    version: int
    expert_of_slot: tuple[int, ...]
    num_experts: int

    def __post_init__(self) -> None:
        experts = [expert for expert in self.expert_of_slot if expert != EMPTY]
        impossible = [expert for expert in experts if not 0 <= expert < self.num_experts]
        if impossible:
            raise ConfigurationError(
                f"expert {impossible[0]} was given a slot, but the layer has {self.num_experts} experts; use "
                f"numbers from 0 to {self.num_experts - 1}, or {EMPTY} for an empty slot."
            )
        if len(set(experts)) != len(experts):
            twice = next(expert for expert in experts if experts.count(expert) > 1)
            raise ConfigurationError(
                f"expert {twice} was given two slots of {self.expert_of_slot}; empty one of them."
            )

    @classmethod
    def initial(cls, mask: torch.Tensor, capacity: int | None = None) -> Placement:
        """The experts of `mask` (bool [E]) in ascending order in the first of `capacity` slots.

        No capacity given = as many slots as experts. Raises ConfigurationError if they do not fit.
        """
        experts = mask.nonzero().flatten().tolist()
        empty = 0 if capacity is None else capacity - len(experts)
        if empty < 0:
            raise ConfigurationError(
                f"{len(experts)} experts were chosen for {capacity} slots; choose fewer, or give more slots."
            )
        return cls(version=0, expert_of_slot=(*experts, *[EMPTY] * empty), num_experts=mask.numel())

    def with_slots(self, changes: Mapping[int, int]) -> Placement:
        """The next version: `changes` gives slots their new expert, or EMPTY."""
        slots = list(self.expert_of_slot)
        for slot, expert in changes.items():
            slots[slot] = expert
        return Placement(self.version + 1, tuple(slots), self.num_experts)

    @property
    def capacity(self) -> int:
        """How many slots there are, empty ones too."""
        return len(self.expert_of_slot)

    @property
    def count(self) -> int:
        """How many experts have a slot."""
        return len(self._slot_of)

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """The experts that have a slot, ascending."""
        return tuple(sorted(self._slot_of))

    def slot(self, expert: int) -> int:
        """The slot of one expert, EMPTY if it has none."""
        return self._slot_of.get(expert, EMPTY)

    @cached_property
    def mask(self) -> torch.Tensor:
        """bool [E] on the CPU, True = has a slot; not to be changed."""
        mask = torch.zeros(self.num_experts, dtype=torch.bool)
        mask[list(self.experts)] = True
        return mask

    @cached_property
    def _slot_of(self) -> dict[int, int]:
        return {expert: slot for slot, expert in enumerate(self.expert_of_slot) if expert != EMPTY}


class Tables:
    """One placement as tensors on one device. Their last entry stands for an id of -1, which indexes from
    the end: no slot, not on the device.

    `slot_of`: int32 [E+1], -1 = none. `on_device`: bool [E+1], True = the CPU skips the expert.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        # Tensors made in inference mode could later be rewritten in that mode only.
        with torch.inference_mode(mode=False):
            slot_of = torch.tensor([placement.slot(e) for e in range(placement.num_experts)] + [EMPTY])
            self.slot_of = slot_of.to(device, torch.int32)
            self.on_device = (slot_of != EMPTY).to(device)

    def slots(self, ids: torch.Tensor) -> torch.Tensor:
        """Slots of a tensor of expert ids, in its shape and dtype; `ids` stays as it is."""
        return self.slot_of[ids.long()].to(ids.dtype)

    def become(self, other: Tables) -> None:
        """Take the values of `other` in the order of the current stream; the addresses stay."""
        self.slot_of.copy_(other.slot_of, non_blocking=True)
        self.on_device.copy_(other.on_device, non_blocking=True)


class LayerPlacement:
    """The current placement of one layer, and its tables. All methods belong to the thread that serves."""

    def __init__(self, placement: Placement) -> None:
        self._current = placement
        self._tables: dict[torch.device, Tables] = {}

    @property
    def current(self) -> Placement:
        return self._current

    def tables(self, device: torch.device) -> Tables:
        """The current placement's tables on `device`.

        On a CPU every version has tables of its own: whoever took some keeps a consistent picture. An
        accelerator has one set at a fixed address, which `switch` rewrites in stream order, so that a
        captured graph reads the placement that is current when it is replayed; the first call for a device
        must come before any capture.
        """
        tables = self._tables.get(device)
        if tables is None:
            tables = Tables(self._current, device)
            self._tables[device] = tables
        return tables

    def switch(self, new: Placement) -> None:
        """Make `new` current for all later forward passes. Raises CallOrderError if it was not made from
        the current one.
        """
        if new.version != self._current.version + 1 or new.capacity != self._current.capacity:
            raise CallOrderError(
                f"placement version {new.version} with {new.capacity} slots cannot follow version "
                f"{self._current.version} with {self._current.capacity}; make it from the current one."
            )
        fresh = Tables(new, torch.device("cpu"))
        self._current = new
        for device, tables in self._tables.items():
            if device.type == "cpu":
                self._tables[device] = fresh
            else:
                tables.become(fresh)
