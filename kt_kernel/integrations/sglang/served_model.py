"""The hybrid model of a serving process, and the failures of its CPU experts, which end requests and not the
server.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from kt_kernel.cpu_share import CpuShare
from kt_kernel.errors import KTError
from kt_kernel.faults import fails
from kt_kernel.hybrid.model import HybridModel
from kt_kernel.hybrid.pass_rows import RequestRows
from kt_kernel.hybrid.ranks import ALONE
from kt_kernel.hybrid.recording import DistributionRecorder
from kt_kernel.integrations.sglang.cpu_shares import served_ranks
from kt_kernel.integrations.sglang.prompt_rows import rows_of
from kt_kernel.integrations.sglang.settings import KTSettings

logger = logging.getLogger(__name__)

# What a CPU task may end with while the engine stays usable. Anything else leaves an unknown state behind.
FAILURES = (KTError, MemoryError)


class ServedModel:
    """One per server and rank. All methods belong to the thread that serves.

    `share`: what this rank computes of the CPU's experts.
    """

    def __init__(self, settings: KTSettings, device: torch.device, share: CpuShare) -> None:
        self.settings = settings
        self.ranks = served_ranks()
        readers = self.ranks if share.is_whole or not share.size else ALONE
        self.hybrid = HybridModel(settings.options.hybrid(), self.ranks, device, readers)
        self.recorder: DistributionRecorder | None = None
        if settings.records and self.ranks.rank == 0:
            self.recorder = DistributionRecorder(
                self.hybrid.layers, self.hybrid.backend, settings.layout.num_layers
            )
            self.hybrid.recorder = self.recorder
        self.is_a_stage: bool = get_parallel().pp_size > 1
        self._failure: str | None = None
        self._requests: list[RequestRows] | None = None  # of the batch that is being computed
        # Can a forward pass return before its CPU experts are done?
        self.is_asynchronous = device.type != "cpu"

    def begin_step(self) -> None:
        """Before each forward pass of the model, also before a graph is replayed."""
        if self.ranks.rank == self.ranks.size - 1 and fails("rank-death"):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            self.hybrid.begin_step(self._requests)
        except FAILURES as error:
            self.failed(error)

    @contextmanager
    def batch(self, batch: Any, chunk: int | None) -> Iterator[None]:
        """While one of SGLang's batches is computed, in however many passes. `chunk`: the most of a prompt.

        What is deferred depends on all rows of a call anyway: then a call counts as one prompt.
        """
        options = self.settings.options
        if not options.gpu_prefill_token_threshold or options.max_deferred_experts_per_token:
            yield
            return
        self._requests = rows_of(batch, options.gpu_prefill_token_threshold, chunk)
        try:
            yield
        finally:
            self._requests = None

    def failed(self, error: Exception) -> None:
        """Remember that this step's results are wrong. Raises `error` where there is no step: a graph that
        was captured without the experts would be wrong for good.
        """
        if self.hybrid.backend.capturing():
            raise error
        if self._failure is None:
            self._failure = str(error) or type(error).__name__
            logger.error("the CPU experts failed, so the requests of this step fail: %s", self._failure)

    def take_failure(self) -> str | None:
        """Why the steps since the last call failed, None if they did not; collective.

        The caller has waited for the device, whose callbacks cannot raise: their errors wait in the engine.
        """
        if self.is_asynchronous:
            self._raised_in_callbacks()
        failure, self._failure = self._failure, None
        if self.ranks.minimum(0 if failure else 1):
            return None
        # Rank 0 sends the answers, and any rank may have failed.
        return self.ranks.first(failure)

    def _raised_in_callbacks(self) -> None:
        wrapper = next((layer.wrapper for layer in self.hybrid.layers if layer.wrapper is not None), None)
        if wrapper is None:
            return
        try:
            wrapper.cpu_infer.raise_pending_error()
        except (ValueError, MemoryError) as error:
            self.failed(error)


_served: dict[KTSettings, ServedModel] = {}


def serve(settings: KTSettings, device: torch.device, share: CpuShare) -> ServedModel:
    """The model with these settings; made when its first layer asks."""
    if settings not in _served:
        _served[settings] = ServedModel(settings, device, share)
    return _served[settings]


def served_models() -> tuple[ServedModel, ...]:
    """All that this process serves: one, or none without CPU experts; and perhaps its draft model."""
    return tuple(_served.values())
