"""What the layers of one model and those who move their experts share: options, ranks, device, and the ways
between CPU and device. It knows no layer.
"""

from __future__ import annotations

from typing import Any

import torch

from kt_kernel.calls.deferral import DeferralChain
from kt_kernel.formats.expert_image import ExpertEncoding
from kt_kernel.hybrid.copies import CopyWorker
from kt_kernel.hybrid.device import backend_of
from kt_kernel.hybrid.feed import Channel, ExpertFeed
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.ranks import ALONE, Ranks
from kt_kernel.moe import KTMoEWrapper


class HybridContext:
    """One per model and rank. `device` is where the model's tensors are.

    `readers`: the ranks that read CPU experts from the same rank's memory, whose rank 0 has them: all `ranks`
    by default, and ALONE where each rank has what its own device computes.

    All methods belong to the thread that serves.
    """

    def __init__(
        self,
        options: HybridOptions,
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
        readers: Ranks | None = None,
    ) -> None:
        self.options = options
        self.ranks = ranks
        self.readers = ranks if readers is None else readers
        self.device = torch.empty(0, device=device).device  # with its number, as the tensors will have it
        self.backend = backend_of(self.device)
        self.copies = CopyWorker(self.backend)
        self._channels: dict[str, Channel] = {}
        self._chains: dict[Any, DeferralChain] = {}  # by engine; normally one

    def feed(self, wrapper: KTMoEWrapper | None, encoding: ExpertEncoding, user: str) -> ExpertFeed:
        """The way from a layer's CPU experts to the device, through memory that only `user` uses.

        The first call for a user is collective. Raises CallOrderError if layers are stored differently.
        """
        if user not in self._channels:
            self._channels[user] = Channel(encoding, self.readers, self.backend)
        return ExpertFeed(wrapper, encoding, self._channels[user])

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Through which experts go to the device."""
        return tuple(self._channels.values())

    def chain(self, engine: Any) -> DeferralChain:
        """What this model's layers on one CPU engine defer with."""
        if engine not in self._chains:
            self._chains[engine] = DeferralChain(engine)
        return self._chains[engine]

    @property
    def chains(self) -> dict[Any, DeferralChain]:
        """By engine."""
        return self._chains
