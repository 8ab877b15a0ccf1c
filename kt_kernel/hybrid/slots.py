"""From expert numbers to places in a weight tensor that holds only some of the experts."""

from __future__ import annotations

import torch


class ExpertSlots:
    """The device's weight tensors hold the experts of a mask, in ascending order of their numbers.

    `mask`: bool [experts], True = has a slot. `count`: how many slots. `slot_of_expert`: int32 [experts],
    -1 = none.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask
        self.count = int(mask.sum())
        self.slot_of_expert = torch.where(mask, mask.cumsum(0) - 1, -1).to(torch.int32)
        self._slots = self.slot_of_expert.tolist()
        self._lookup: dict[torch.device, torch.Tensor] = {}

    def slot(self, expert: int) -> int:
        """The slot of one expert, -1 if it has none."""
        return self._slots[expert]

    def from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Slots of a tensor of expert ids, -1 where the expert has none or the id is negative; `ids` stays
        as it is.
        """
        # One entry more: an id of -1 indexes it from the end.
        lookup = self._lookup.get(ids.device)
        if lookup is None:
            none = self.slot_of_expert.new_full((1,), -1)
            lookup = torch.cat([self.slot_of_expert, none]).to(ids.device)
            self._lookup[ids.device] = lookup
        return lookup[ids.long()].to(ids.dtype)
