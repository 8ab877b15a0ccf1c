"""Layerwise prefill: a long prompt's rows meet whole layers on the device instead of the CPU's experts.

Two slots, each with room for all experts of a layer:

    serving thread    compute L in slot 0      │ compute L+1 in slot 1    │ ...
    copying thread    fill slot 1 with L+1     │ fill slot 0 with L+2     │ ...

Which rows these are is decided request by request (pass_rows.py). A slot's contents never go stale, for
experts do not change: wherever a pass starts or ends, whatever a slot holds can be used. Filling copies what
is resident from its slot on the device, if that has the same format, and the rest from CPU memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from kt_kernel.errors import KTError
from kt_kernel.hybrid.context import HybridContext
from kt_kernel.hybrid.device import Event, is_out_of_memory
from kt_kernel.hybrid.experts import DeviceExperts, bytes_of_slots
from kt_kernel.hybrid.pass_rows import ALL_ROWS, PassRows, RequestRows, RowSplit
from kt_kernel.hybrid.placed import PlacedExperts
from kt_kernel.hybrid.prefill_plan import STREAMED_LAYERS
from kt_kernel.hybrid.slots import Placement

logger = logging.getLogger(__name__)

_SLOTS = STREAMED_LAYERS

# How one rank's part of a layer went; the least of all ranks counts.
_FAILED, _SHORT_OF_MEMORY, _DONE = range(3)


# Told of a layer that has run, and of the slots with all its experts: expert e in slot e.
Prefilled = Callable[[PlacedExperts, DeviceExperts], None]


class _FullLayer:
    """Room for all experts of a layer, expert e in slot e."""

    def __init__(self, experts: DeviceExperts) -> None:
        self.experts = experts
        self.layer: PlacedExperts | None = None
        self.filled: Future[tuple[None, Event]] | None = None


class LayerwisePrefill:
    """The prompts of at least `threshold` tokens, 0 = none; all methods belong to the thread that serves."""

    def __init__(
        self,
        context: HybridContext,
        layers: Sequence[PlacedExperts],
        threshold: int,
        prefilled: Prefilled,
    ) -> None:
        self.threshold = threshold
        self.chunks = 0
        self.mixed = 0  # calls of which some rows are streamed and some are not
        self.fallbacks = 0
        self.bytes_copied = 0
        self._context = context
        self._layers = layers
        self._prefilled = prefilled
        self._slots: list[_FullLayer] = []
        self._rows: PassRows | None = None  # of this pass; None = nobody said, so a call is one prompt
        self._last_position = -1  # of the layer that ran last in this pass
        self._given_up = False  # for the rest of this pass
        self._said_so = False

    @property
    def device_bytes(self) -> int:
        """Of the slots that there are now."""
        return sum(bytes_of_slots(slot.experts) for slot in self._slots)

    def prepare(self) -> None:
        """Make the slots now, when all layers are there, instead of at the first long prompt."""
        layer = next((layer for layer in self._layers if layer.has_cold_experts), None)
        if self.threshold and layer is not None and not self._have_slots(layer):
            self._say_that_memory_is_short()

    def begin_pass(self, requests: Sequence[RequestRows] | None = None) -> None:
        """A new forward pass begins, of these requests; the one before may have been given up.

        None: its calls are one prompt each.
        """
        wanted = requests is not None and self.threshold
        self._rows = PassRows(requests, self._context.device) if wanted else None
        self._begin()

    def _begin(self) -> None:
        self._last_position = -1
        self._given_up = False

    def rows(self, layer: PlacedExperts, hidden: torch.Tensor) -> RowSplit | None:
        """Which rows of a call are for `run`; None = none."""
        if not self.threshold or not layer.has_cold_experts or self._context.backend.capturing():
            return None
        if self._rows is None:
            return ALL_ROWS if hidden.shape[0] >= self.threshold else None
        split = self._rows.split(hidden.shape[0])
        self.mixed += split is not None and split.others is not None
        return split

    def run(
        self, layer: PlacedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """The sum of all experts of these rows from the device alone; None if memory is short.

        Raises what went wrong while filling or computing, on all ranks.
        """
        if layer.position <= self._last_position:
            self._begin()
        if self._last_position < 0:
            self.chunks += 1
        self._last_position = layer.position
        if self._given_up:
            return None
        if not self._have_slots(layer):
            self._fall_back()
            return None
        outcome, failure, output = _DONE, None, None
        try:
            output = self._compute(layer, hidden, ids, weights)
        except Exception as error:
            # One that is kept would keep the memory that its frames hold.
            outcome, failure = (_SHORT_OF_MEMORY, None) if is_out_of_memory(error) else (_FAILED, error)
        if not self._agreed(layer, outcome, failure):
            return None
        self._prefilled(layer, self._slot_with(layer).experts)
        return output

    # ---- one layer -----------------------------------------------------------------------------

    def _compute(
        self, layer: PlacedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        slot = self._slot_with(layer)
        if slot is None:
            slot = self._idle_slot(layer)
            self._fill(slot, layer)
        following = self._following(layer)
        if following is not None and self._slot_with(following) is None:
            self._fill(self._idle_slot(layer), following)
        self._wait_for(slot)
        return slot.experts.compute(hidden, ids, weights)

    def _agreed(self, layer: PlacedExperts, outcome: int, failure: Exception | None) -> bool:
        """All ranks take the worst outcome of any: is there an output?"""
        worst = self._context.ranks.minimum(outcome)
        if worst == _DONE:
            return True
        self._release()
        if worst == _SHORT_OF_MEMORY:
            self._fall_back()
            return False
        if failure is None:
            raise KTError(
                f"layer {layer.layer_idx}: another rank could not bring its experts to the device; its log "
                "says why."
            )
        raise failure

    # ---- the slots -----------------------------------------------------------------------------

    def _slot_with(self, layer: PlacedExperts) -> _FullLayer | None:
        return next((slot for slot in self._slots if slot.layer is layer), None)

    def _idle_slot(self, needed: PlacedExperts) -> _FullLayer:
        """A slot that does not hold `needed`."""
        return next(slot for slot in self._slots if slot.layer is not needed)

    def _following(self, layer: PlacedExperts) -> PlacedExperts | None:
        """The next layer of the pass that will want a slot."""
        later = self._layers[layer.position + 1 :]
        return next((other for other in later if other.has_cold_experts), None)

    def _fill(self, slot: _FullLayer, layer: PlacedExperts) -> None:
        """Start to copy all experts of `layer` into `slot`, behind the computation that may still read it."""
        placement = layer.placement.current
        slot.layer = layer
        slot.filled = self._context.copies.start(lambda: self._copy_all(slot.experts, layer, placement))

    def _copy_all(self, target: DeviceExperts, layer: PlacedExperts, placement: Placement) -> None:
        """On the copying thread. `placement` was current when the copy was started: an update's copy that
        may write to its slots comes behind this one.
        """
        on_device = placement.experts
        if layer.resident is None or not target.takes_slots_of(layer.resident):
            on_device = ()
        for expert in on_device:
            target.copy_slot(expert, layer.resident, placement.slot(expert))
        from_host = sorted(set(range(layer.num_experts)).difference(on_device))
        self.bytes_copied += layer.feed.fill(target, {expert: expert for expert in from_host})

    def _wait_for(self, slot: _FullLayer) -> None:
        """Until the slot's copies are on their way, and let the current stream wait for their end."""
        if slot.filled is None:
            return
        filled, slot.filled = slot.filled, None
        _, event = filled.result()
        event.wait()

    def _have_slots(self, layer: PlacedExperts) -> bool:
        """Make the slots at the first use. If one rank has no memory for them, none makes them now."""
        if self._slots:
            return True
        experts = self._new_experts(layer)
        if self._context.ranks.minimum(len(experts)) == _SLOTS:
            self._slots = [_FullLayer(slots) for slots in experts]
            return True
        del experts
        self._context.backend.release_memory()
        return False

    def _new_experts(self, layer: PlacedExperts) -> list[DeviceExperts]:
        try:
            return [layer.new_experts(layer.num_experts) for _ in range(_SLOTS)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return []

    def _release(self) -> None:
        """Free the slots once nobody works with them, also no job that broke off."""
        self._context.copies.start(lambda: None).result()
        # Freed memory is given away again in the order of the stream that it was taken on; those that copy
        # and compute may be others.
        self._context.backend.synchronize()
        self._slots = []
        self._context.backend.release_memory()

    def _fall_back(self) -> None:
        """Leave the rest of the pass to CPU and device together."""
        self._given_up = True
        self.fallbacks += 1
        self._say_that_memory_is_short()

    def _say_that_memory_is_short(self) -> None:
        if not self._said_so:
            self._said_so = True
            logger.warning(
                "the device has not enough free memory for %d whole layers of experts: prompts of %d tokens "
                "and more are computed by CPU and device together until it has; leave more memory free, or "
                "raise the threshold",
                _SLOTS,
                self.threshold,
            )
