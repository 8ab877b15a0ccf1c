"""What the hybrid layers of one model share: options, the ranks, the copying, and the figures."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from kt_kernel.calls.deferral import DeferralChain
from kt_kernel.errors import InputError
from kt_kernel.hybrid.copies import CopyWorker
from kt_kernel.hybrid.device import backend_of, log_signals
from kt_kernel.hybrid.experts import DeviceExperts
from kt_kernel.hybrid.feed import Channel, ExpertFeed
from kt_kernel.hybrid.fetch import MissFetcher
from kt_kernel.hybrid.memory_plan import memory_plan, table
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.prefill import LayerwisePrefill
from kt_kernel.hybrid.ranks import ALONE, Ranks
from kt_kernel.hybrid.recording import DistributionRecorder
from kt_kernel.hybrid.report import report
from kt_kernel.hybrid.update import BackgroundUpdater

if TYPE_CHECKING:
    from kt_kernel.hybrid.layer import HybridLayer

logger = logging.getLogger(__name__)


class HybridModel:
    """One per model and rank. `device` is where the model's tensors are.

    All methods belong to the thread that serves.
    """

    def __init__(
        self, options: HybridOptions, ranks: Ranks = ALONE, device: torch.device | str = "cpu"
    ) -> None:
        self.options = options
        self.ranks = ranks
        self.device = torch.empty(0, device=device).device  # with its number, as the tensors will have it
        self.backend = backend_of(self.device)
        self.copies = CopyWorker(self.backend)
        self.layers: list[HybridLayer] = []
        self.prefill = LayerwisePrefill(self, options.prefill_threshold)
        self.misses = MissFetcher(self)
        # Set by the program that serves, to record which experts ran.
        self.recorder: DistributionRecorder | None = None
        self._channels: dict[str, Channel] = {}
        self._chains: dict[Any, DeferralChain] = {}  # by engine; normally one
        self.updater = BackgroundUpdater(self)

    # ---- for the layers ------------------------------------------------------------------------

    def add(self, layer: HybridLayer) -> int:
        """Called by each layer in the order in which they run; returns its position, from 0."""
        self.layers.append(layer)
        return len(self.layers) - 1

    def feed(self, layer: HybridLayer, user: str) -> ExpertFeed:
        """The way from `layer`'s CPU experts to the device, through memory that only `user` uses.

        The first call for a user is collective. Raises CallOrderError if layers are stored differently.
        """
        if user not in self._channels:
            self._channels[user] = Channel(layer.encoding, self.ranks, self.backend)
        return ExpertFeed(layer.wrapper, layer.encoding, self._channels[user])

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Through which experts go to the device."""
        return tuple(self._channels.values())

    def chain(self, engine: Any) -> DeferralChain:
        """What this model's layers on one CPU engine defer with."""
        if engine not in self._chains:
            self._chains[engine] = DeferralChain(engine)
        return self._chains[engine]

    def layer_prefilled(self, layer: HybridLayer, full: DeviceExperts) -> None:
        """All experts of `layer` are on the device at this point: expert e in slot e of `full`."""
        if self.options.update_after_prefill:
            self.updater.update_from_full_layer(layer, full)

    # ---- for the program that serves -----------------------------------------------------------

    def prepare(self) -> None:
        """Take now what serving will need: memory on the device, measured speeds. Collective.

        After the last layer is made and before the rest of the memory is shared out. May be left out: then
        the first use takes it.
        """
        if self.device.type == "cuda":
            log_signals()
        self.prefill.prepare()
        self.misses.begin_step()
        logger.info("memory of experts on rank %d:\n%s", self.ranks.rank, table(memory_plan(self)))

    def begin_step(self) -> None:
        """Before each forward pass of the model, also before a graph is replayed, on the pass's stream.

        Does nothing inside a capture. Raises InputError for what went wrong on the CPU in a pass before
        without anybody noticing, as it does in the replay of a graph; the step may go on all the same.
        """
        if self.backend.capturing():
            return
        if self.recorder is not None:
            self.recorder.begin_step()  # before any placement changes
        for chain in self._chains.values():
            chain.drop()  # what a pass that was given up had deferred
        self.prefill.begin_pass()
        self.updater.begin_step()
        self.misses.begin_step()
        if self.device.type != "cpu":
            self._raise_errors_of_callbacks()

    def _raise_errors_of_callbacks(self) -> None:
        """Last of all: the other ranks have no such errors, and expect this one in their collective calls."""
        for engine in self._chains:
            try:
                engine.raise_pending_error()
            except ValueError as error:
                raise InputError(f"a forward pass before this one failed on the CPU: {error}") from None

    def forget(self) -> None:
        """Leave the uses of experts so far out of all counts: warming up says nothing about what users ask.

        Between two passes, on their stream, and not while the recorder records.
        """
        for layer in self.layers:
            layer.statistics.forget()

    def report(self) -> dict[str, Any]:
        """The figures that servers expose (report.py); waits for the device, between two passes."""
        # The stream of whoever asks need not be that of the passes, which count and switch.
        self.backend.synchronize()
        return report(self)

    def close(self) -> None:
        """Finish what is being copied, and end the copying thread."""
        self.copies.close()
