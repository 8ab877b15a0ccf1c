"""Moving experts to and from the device while the model serves.

    plan     every `update_interval` steps: which experts should have the slots, by decayed counts
    retire   those that leave a layer lose their slots; from this step on the CPU serves them
    copy     the copying thread writes those that enter into the free slots, while passes run
    admit    at the first step boundary after that the device serves them

One layer after the other, so that few experts are without their slot at any time. Retiring and admitting
happen in `begin_step`, between two forward passes: a pass sees one placement from start to end, and no slot
is written while a placement refers to it. After a layerwise prefill all experts of a layer are on the device
anyway; `update_from_full_layer` then copies from there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kt_kernel.hybrid.context import HybridContext
from kt_kernel.hybrid.device import Event
from kt_kernel.hybrid.experts import DeviceExperts
from kt_kernel.hybrid.placed import PlacedExperts
from kt_kernel.hybrid.plan import Move, admitted, choose, retired
from kt_kernel.hybrid.slots import Placement

logger = logging.getLogger(__name__)

# Experts enter over the bus only if they are ahead by more than chance. Simulated, 256 experts, 8 per token,
# 64 slots, a plan every 100 tokens, 2026-11-21: with 0, 1, 2 and 3 deviations an even load moves 7.8, 1.1,
# 0.5 and 0.05 experts per plan and layer, and one of power law 0.4 moves 1.9, 0.3, 0.3 and 0.3; the hit rates
# differ by less than 0.01.
_MARGIN = 1.0

# States of a copy, so numbered that the minimum over the ranks is what all must do: nobody goes on while one
# is still copying, and nobody admits what one has not got.
_RUNNING, _FAILED, _DONE = range(3)


@dataclass
class UpdateFigures:
    """Since the start: how often the placement of a layer was updated, experts that got a slot, and bytes
    that went from the host to the device for them.
    """

    updates: int = 0
    experts_moved: int = 0
    bytes_copied: int = 0


class _Copy(NamedTuple):
    """`result`: the bytes that went to the device, and when they were there."""

    layer: PlacedExperts
    moves: tuple[Move, ...]
    result: Future[tuple[int, Event]]

    def state(self) -> int:
        if not self.result.done():
            return _RUNNING
        return _DONE if self.result.exception() is None else _FAILED


class BackgroundUpdater:
    """The updates of the `layers` of one model.

    Its methods belong to the thread that serves, in the same order on all ranks.
    """

    def __init__(self, context: HybridContext, layers: Sequence[PlacedExperts]) -> None:
        self.figures = UpdateFigures()
        self._context = context
        self._layers = layers
        self._steps = 0
        self._planned: deque[tuple[PlacedExperts, torch.Tensor]] = deque()  # with the layer's counts
        self._copy: _Copy | None = None

    def begin_step(self) -> None:
        """To be called before each forward pass, on the stream that it will use, and not while a graph is
        captured.
        """
        interval = self._context.options.update_interval
        if not interval:
            return
        self._steps += 1
        if self._copy is not None:
            if not self._finished(self._copy):
                return
            self._copy = None
        elif self._steps >= interval:
            self._steps = 0
            self._plan()
        while self._planned and self._copy is None:
            self._start(*self._planned.popleft())

    def update_from_full_layer(self, layer: PlacedExperts, full: DeviceExperts) -> None:
        """Give the slots of `layer` to its most used experts at once; slot e of `full` holds expert e.

        Waits for the counts, and enqueues the copies on the current stream. A layer that has no slots, or
        is being updated already, is left alone.
        """
        if layer.resident is None or (self._copy is not None and self._copy.layer is layer):
            return
        layer.statistics.advance()
        moves = choose(self._context.ranks.broadcast(layer.statistics.decayed), layer.placement.current)
        if not moves:
            return
        self._switch(layer, retired(layer.placement.current, moves))
        for move in moves:
            layer.resident.copy_slot(move.slot, full, move.entering)
        self._admit(layer, moves)

    # ---- the steps of an update ----------------------------------------------------------------

    def _plan(self) -> None:
        layers = [layer for layer in self._layers if layer.resident is not None]
        for layer in layers:
            layer.statistics.advance()
        # Rank 0 decides: a router that rounds differently on another rank must not split them.
        counts = self._context.ranks.broadcast([layer.statistics.decayed for layer in layers])
        self._planned.extend(zip(layers, counts, strict=True))

    def _start(self, layer: PlacedExperts, uses: torch.Tensor) -> None:
        """Begin to copy what the layer's placement of this moment lacks, if anything."""
        moves = choose(uses, layer.placement.current, _MARGIN)
        if not moves:
            return
        self._switch(layer, retired(layer.placement.current, moves))
        slots = {move.entering: move.slot for move in moves}
        self._copy = _Copy(layer, moves, self._context.copies.start(lambda: layer.fill_slots(slots)))

    def _finished(self, copy: _Copy) -> bool:
        """Admit what all ranks have; False while one is still copying."""
        state = self._context.ranks.minimum(copy.state())
        if state == _RUNNING:
            return False
        if state == _FAILED:
            self._give_up(copy)
            return True
        written, copied = copy.result.result()
        copied.wait()
        self._admit(copy.layer, copy.moves)
        self.figures.bytes_copied += written
        return True

    def _admit(self, layer: PlacedExperts, moves: tuple[Move, ...]) -> None:
        self._switch(layer, admitted(layer.placement.current, moves))
        self.figures.updates += 1
        self.figures.experts_moved += len(moves)

    def _give_up(self, copy: _Copy) -> None:
        """The slots stay empty and the CPU serves their experts; the next plan fills them."""
        self._planned.clear()
        logger.error(
            "layer %d: moving %d experts to the device failed; they stay on the CPU until the next update",
            copy.layer.layer_idx,
            len(copy.moves),
            exc_info=copy.result.exception(),
        )

    def _switch(self, layer: PlacedExperts, new: Placement) -> None:
        layer.statistics.settle(layer.placement.tables(self._context.device))
        layer.placement.switch(new)
