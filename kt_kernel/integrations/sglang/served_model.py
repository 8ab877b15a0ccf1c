"""The hybrid model of a serving process, and the failures of its CPU experts, which end requests and not the
server.
"""

from __future__ import annotations

import logging

import torch
from sglang.srt.runtime_context import get_parallel

from kt_kernel.errors import KTError
from kt_kernel.hybrid.model import HybridModel
from kt_kernel.hybrid.ranks import ALONE, TorchRanks
from kt_kernel.hybrid.recording import DistributionRecorder
from kt_kernel.integrations.sglang.settings import KTSettings

logger = logging.getLogger(__name__)

# What a CPU task may end with while the engine stays usable. Anything else leaves an unknown state behind.
FAILURES = (KTError, MemoryError)

# What the ranks that have no CPU experts say of a failure; rank 0 sends the answers, so nobody reads it.
_ELSEWHERE = "the CPU experts of rank 0 failed."


class ServedModel:
    """One per server and rank. All methods belong to the thread that serves."""

    def __init__(self, settings: KTSettings, device: torch.device) -> None:
        self.settings = settings
        group = get_parallel().tp_group
        self.ranks = ALONE if group.world_size == 1 else TorchRanks(group.cpu_group)
        self.hybrid = HybridModel(settings.options.hybrid(), self.ranks, device)
        self.recorder: DistributionRecorder | None = None
        if settings.records and self.ranks.rank == 0:
            self.recorder = DistributionRecorder(
                self.hybrid.layers, self.hybrid.backend, settings.layout.num_layers
            )
            self.hybrid.recorder = self.recorder
        self._failure: str | None = None
        # Can a forward pass return before its CPU experts are done?
        self.is_asynchronous = device.type != "cpu"

    def begin_step(self) -> None:
        """Before each forward pass of the model, also before a graph is replayed."""
        try:
            self.hybrid.begin_step()
        except FAILURES as error:
            self.failed(error)

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
        if self.ranks.size > 1 and not self.ranks.minimum(0 if failure else 1):
            return failure or _ELSEWHERE
        return failure

    def _raised_in_callbacks(self) -> None:
        wrapper = next((layer.wrapper for layer in self.hybrid.layers if layer.wrapper is not None), None)
        if wrapper is None:
            return
        try:
            wrapper.cpu_infer.raise_pending_error()
        except (ValueError, MemoryError) as error:
            self.failed(error)


_served: dict[KTSettings, ServedModel] = {}


def serve(settings: KTSettings, device: torch.device) -> ServedModel:
    """The model with these settings; made when its first layer asks."""
    if settings not in _served:
        _served[settings] = ServedModel(settings, device)
    return _served[settings]


def served_models() -> tuple[ServedModel, ...]:
    """All that this process serves: one, or none without CPU experts; and perhaps its draft model."""
    return tuple(_served.values())
