"""The learning rate by step: a straight rise, then half a cosine down to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Of `steps` steps, the first `warmup` share rises to `peak`."""

    peak: float
    steps: int
    warmup: float

    def rate(self, step: int) -> float:
        """Of step 0, 1, ..."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.peak * (step + 1) / rising
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))
