"""What the engine asks of expert weights on a device: compute, and take an expert into a slot."""

from __future__ import annotations

from typing import Protocol

import torch

from kt_kernel.formats.expert_image import ExpertTensors


class DeviceExperts(Protocol):
    """Experts of one layer, or room for them, in numbered slots on a device.

    With R ranks each holds its part of the intermediate dimension, and its results are partial sums.
    """

    capacity: int  # slots
    bytes_per_expert: int  # device bytes of one slot

    def compute(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts: a new tensor [T, H] like `hidden`.

        `hidden` [T, H]; `slots` [T, k] of any integer type, -1 adds nothing; `weights` [T, k] float32. On
        CUDA it only enqueues, and can be captured for the batch sizes of a graph.
        """
        ...

    def places(self, slot: int) -> ExpertTensors | None:
        """Where on the device the bytes of an expert go as they are stored in main memory.

        Contiguous tensors as large as the parts of the encoding; None for a part that is not needed. None
        instead of all if experts are decoded or rearranged on their way: then `store` fills the slot. The
        tensors of all slots stay where they are, or are replaced together.
        """
        ...

    def store(self, slot: int, tensors: ExpertTensors) -> int:
        """Put an expert into `slot` from host memory or the device, in the order of the current stream.

        Decodes it if the slots hold another format. Returns the bytes that crossed the bus. The tensors may
        be overwritten once the stream has passed this point.
        """
        ...

    def takes_slots_of(self, source: DeviceExperts) -> bool:
        """Do slots of `source` hold the same format, so that `copy_slot` can copy them?"""
        ...

    def copy_slot(self, slot: int, source: DeviceExperts, source_slot: int) -> None:
        """Copy one slot of a `source` that `takes_slots_of` accepts, on the current stream."""
        ...


def bytes_of_slots(experts: DeviceExperts | None) -> int:
    """Device memory of all slots, empty ones too; None has none."""
    return 0 if experts is None else experts.capacity * experts.bytes_per_expert
