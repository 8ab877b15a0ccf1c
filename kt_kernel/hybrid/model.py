"""The hybrid layers of one model, those who move their experts, and what happens between two passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from kt_kernel.errors import InputError
from kt_kernel.hybrid.context import HybridContext
from kt_kernel.hybrid.device import Backend, log_signals
from kt_kernel.hybrid.experts import DeviceExperts
from kt_kernel.hybrid.fetch import MissFetcher
from kt_kernel.hybrid.memory_plan import MemoryRow, memory_plan, table
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.pass_rows import RequestRows
from kt_kernel.hybrid.placed import PlacedExperts
from kt_kernel.hybrid.prefill import LayerwisePrefill
from kt_kernel.hybrid.ranks import ALONE, Ranks
from kt_kernel.hybrid.recording import DistributionRecorder
from kt_kernel.hybrid.report import report
from kt_kernel.hybrid.update import BackgroundUpdater
from kt_kernel.hybrid.verify import Verifier

logger = logging.getLogger(__name__)


class HybridModel:
    """One per model and rank. `device` is where the model's tensors are; `readers`: see HybridContext.

    All methods belong to the thread that serves.
    """

    def __init__(
        self,
        options: HybridOptions,
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
        readers: Ranks | None = None,
    ) -> None:
        self.context = context = HybridContext(options, ranks, device, readers)
        self.layers: list[PlacedExperts] = []  # in the order in which they run
        self.updater = BackgroundUpdater(context, self.layers)
        self.prefill = LayerwisePrefill(
            context, self.layers, options.prefill_threshold, self._layer_prefilled
        )
        self.misses = MissFetcher(context, self.layers)
        # Where rank 0 alone has the CPU's experts, no rank has what gives its own result.
        verifies = options.verify_every and context.readers.size == 1
        self.verifier = Verifier(options.verify_every) if verifies else None
        # Set by the program that serves, to record which experts ran.
        self.recorder: DistributionRecorder | None = None

    @property
    def device(self) -> torch.device:
        return self.context.device

    @property
    def ranks(self) -> Ranks:
        return self.context.ranks

    @property
    def backend(self) -> Backend:
        return self.context.backend

    # ---- for the layers ------------------------------------------------------------------------

    def add(self, layer: PlacedExperts) -> int:
        """Called by each layer in the order in which they run; returns its position, from 0."""
        self.layers.append(layer)
        return len(self.layers) - 1

    def _layer_prefilled(self, layer: PlacedExperts, full: DeviceExperts) -> None:
        """All experts of `layer` are on the device at this point: expert e in slot e of `full`."""
        if self.context.options.update_after_prefill:
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
        logger.info("memory of experts on rank %d:\n%s", self.ranks.rank, table(self.memory_plan()))

    def begin_step(self, requests: Sequence[RequestRows] | None = None) -> None:
        """Before each forward pass of the model, also before a graph is replayed, on the pass's stream.

        `requests`: whose rows its calls have, the same on all ranks; None = each call is one prompt, as it
        must be where experts are deferred (what is, depends on all tokens of a call anyway).

        Does nothing inside a capture. Raises InputError for what went wrong on the CPU in a pass before
        without anybody noticing, as it does in the replay of a graph; the step may go on all the same.
        """
        if self.backend.capturing():
            return
        if self.recorder is not None:
            self.recorder.begin_step()  # before any placement changes
        for chain in self.context.chains.values():
            chain.drop()  # what a pass that was given up had deferred
        self.prefill.begin_pass(requests)
        self.updater.begin_step()
        self.misses.begin_step()
        if self.device.type != "cpu":
            self._raise_errors_of_callbacks()

    def _raise_errors_of_callbacks(self) -> None:
        """Last of all: the other ranks have no such errors, and expect this one in their collective calls."""
        for engine in self.context.chains:
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
        return report(
            self.context,
            self.layers,
            prefill=self.prefill,
            misses=self.misses,
            updates=self.updater.figures,
            memory=self.memory_plan(),
        ) | ({} if self.verifier is None else {"verify": asdict(self.verifier.figures)})

    def memory_plan(self) -> list[MemoryRow]:
        """The memory that is taken now, by purpose."""
        return memory_plan(self.context, self.layers, prefill=self.prefill, misses=self.misses)

    def close(self) -> None:
        """Finish what is being copied or checked, and end the threads that do it."""
        self.context.copies.close()
        if self.verifier is not None:
            self.verifier.close()
