"""What the experts of a model did, step by step, for a file that `--init-expert-location` can read.

    logical_count      int32 [steps, layers, experts]   uses of each expert in each step
    gpu_expert_masks   bool  [steps, layers, experts]   True = the expert had a slot on the device

Rows of layers without experts are zero. The last `steps` steps are kept. Masks are kept as the placements
they come from, which rarely change. Recording waits for the device once a step; it costs nothing while off.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kt_kernel.errors import CallOrderError
from kt_kernel.hybrid.activation import COUNTS_KEY
from kt_kernel.hybrid.device import Backend
from kt_kernel.hybrid.placed import PlacedExperts
from kt_kernel.hybrid.slots import Placement
from kt_kernel.hybrid.statistics import totals_of

MASKS_KEY = "gpu_expert_masks"
STEPS_KEPT = 1000


class _Step(NamedTuple):
    """`uses` int32 [MoE layers, E], and the placement of each of these layers."""

    uses: torch.Tensor
    placements: tuple[Placement, ...]


class DistributionRecorder:
    """Records `layers`, the layers with experts of a model of `num_layers` decoder layers.

    For the thread that serves; all but `begin_step` may be called while another stream is current than the
    one of the passes.
    """

    def __init__(
        self,
        layers: Sequence[PlacedExperts],
        backend: Backend,
        num_layers: int,
        steps: int = STEPS_KEPT,
    ) -> None:
        self._layers = layers
        self._backend = backend
        self._num_layers = num_layers
        self._steps: deque[_Step] = deque(maxlen=steps)
        self._counted: torch.Tensor | None = None  # int64 [MoE layers, E] at the last step; None = off

    def start(self) -> None:
        """Begin to record; what was recorded before is forgotten."""
        self._steps.clear()
        self._backend.synchronize()
        self._counted = self._totals()

    def stop(self) -> None:
        """Record no further steps; those recorded are kept."""
        self._backend.synchronize()
        self.begin_step()
        self._counted = None

    def begin_step(self) -> None:
        """Book the step that has ended, if it had tokens; to be called before its placements change."""
        if self._counted is None:
            return
        totals = self._totals()
        uses = (totals - self._counted).to(torch.int32)
        self._counted = totals
        if bool(uses.any()):
            self._steps.append(_Step(uses, tuple(layer.placement.current for layer in self._layers)))

    def recorded(self) -> dict[str, torch.Tensor]:
        """The two tensors of this file's head, by name. Raises CallOrderError if no step was recorded."""
        self._backend.synchronize()
        self.begin_step()
        if not self._steps:
            raise CallOrderError(
                "no expert distribution was recorded, expected at least one step; start recording, let the "
                "model answer, then ask again."
            )
        rows = [layer.layer_idx for layer in self._layers]
        shape = (len(self._steps), self._num_layers, self._steps[0].uses.shape[1])
        counts = torch.zeros(shape, dtype=torch.int32)
        masks = torch.zeros(shape, dtype=torch.bool)
        for step, (uses, placements) in enumerate(self._steps):
            counts[step, rows] = uses
            masks[step, rows] = torch.stack([placement.mask for placement in placements])
        return {COUNTS_KEY: counts, MASKS_KEY: masks}

    def save(self, folder: str | Path) -> Path:
        """Write what was recorded to a new file in `folder`, whole or not at all; returns its path."""
        content = self.recorded()
        path = Path(folder) / f"gpu_expert_distribution_{time.time()}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        torch.save(content, part)
        part.replace(path)
        return path

    def _totals(self) -> torch.Tensor:
        return totals_of([layer.statistics for layer in self._layers])
