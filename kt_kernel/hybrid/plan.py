"""Which experts should have the slots of a layer, and the fewest copies that get them there."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from kt_kernel.hybrid.slots import EMPTY, Placement


class Move(NamedTuple):
    """`entering` takes `slot` from `leaving` (EMPTY = the slot is free)."""

    slot: int
    leaving: int
    entering: int


def choose(counts: torch.Tensor, current: Placement, margin: float = 0.0) -> tuple[Move, ...]:
    """The moves after which the most used experts have the slots; the most useful move comes first.

    `counts` [E]: how often each expert was used, on the CPU. An expert moves only if it gains something: it
    was used more often than the one that leaves, or at all if the slot is empty. So with equal counts
    whoever has a slot keeps it, and each move costs one copy that no other plan could save.

    `margin`: it must be ahead by more than so many standard deviations of what chance does to two counts n
    and m, sqrt(n + m).
    """
    uses = counts.tolist()
    waiting = [expert for expert in range(current.num_experts) if current.slot(expert) == EMPTY]
    waiting.sort(key=lambda expert: (-uses[expert], expert))
    slots = list(range(current.capacity))
    slots.sort(key=lambda slot: _uses_in(slot, current, uses))
    moves = []
    # The best without a slot against the worst with one; each pair gains less than the one before.
    for expert, slot in zip(waiting, slots, strict=False):
        new, old = uses[expert], max(0, _uses_in(slot, current, uses))
        if new <= old or new - old <= margin * math.sqrt(new + old):
            break
        moves.append(Move(slot, current.expert_of_slot[slot], expert))
    return tuple(moves)


def _uses_in(slot: int, placement: Placement, uses: list[float]) -> float:
    """Empty slots are given away before any other."""
    expert = placement.expert_of_slot[slot]
    return -1 if expert == EMPTY else uses[expert]


def retired(current: Placement, moves: tuple[Move, ...]) -> Placement:
    """The next version without the experts that leave: the slots of `moves` may then be written."""
    return current.with_slots({move.slot: EMPTY for move in moves})


def admitted(current: Placement, moves: tuple[Move, ...]) -> Placement:
    """The next version with the experts that enter, once their slots hold them."""
    return current.with_slots({move.slot: move.entering for move in moves})
