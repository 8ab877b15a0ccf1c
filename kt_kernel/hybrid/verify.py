"""Every so many calls one token of one layer is computed once more, by the slow reference, and compared.

It is for machines that may be broken: memory that flips bits, a CPU that computes wrongly, a device whose
slots hold something else. The reference runs on a thread of its own, one token at a time, and holds the
engine meanwhile: calls that come then wait for it.
"""

from __future__ import annotations

import logging
import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel.calls.inputs import native_arguments
from kt_kernel.hybrid.placed import PlacedExperts

logger = logging.getLogger(__name__)

# Normalised mean squared error. Activations of 8 bits and results of bfloat16 stay below 1e-3
# (doc/accuracy.md); one wrong expert of eight is above 0.1.
MOST_ERROR = 1e-2


@dataclass
class VerifyFigures:
    """`wrong` of `checked` tokens differed; `skipped`: calls whose turn came while one was being checked;
    `failed`: checks that could not be made.
    """

    every: int
    checked: int = 0
    wrong: int = 0
    skipped: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Computed:
    """What a layer was given and gave, a row per token. `weights`: those that the sum was made with."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor

    def row(self, row: int) -> Computed:
        """A copy of one, in main memory."""
        whole = self.hidden, self.ids, self.weights, self.output
        return Computed(*(tensor[row : row + 1].detach().cpu().clone() for tensor in whole))


class Verifier:
    """Looks at every `every`th call of a model's layers. `look` belongs to the thread that serves."""

    def __init__(self, every: int) -> None:
        self.figures = VerifyFigures(every)
        self._calls = 0
        self._choices = random.Random(0)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kt-verify")
        self._running: Future[None] | None = None

    def look(self, layer: PlacedExperts, call: Computed) -> None:
        """At a call of `layer`; a row is copied if it is its turn."""
        self._calls += 1
        if self._calls % self.figures.every or not len(call.hidden) or layer.wrapper is None:
            return
        if self._running is not None and not self._running.done():
            self.figures.skipped += 1
            return
        row = call.row(self._choices.randrange(len(call.hidden)))
        self._running = self._pool.submit(self._check, layer, row)

    def wait(self) -> None:
        """Until the check that runs, if one does, is done."""
        if self._running is not None:
            self._running.result()

    def _check(self, layer: PlacedExperts, token: Computed) -> None:
        try:
            self._compare(layer, token)
        except Exception as error:
            self.figures.failed += 1
            logger.warning("a token of layer %d could not be verified: %s", layer.layer_idx, error)

    def _compare(self, layer: PlacedExperts, token: Computed) -> None:
        native: Any = layer.wrapper and layer.wrapper.moe
        expected = torch.empty_like(token.hidden)
        call = token.hidden, token.ids.to(torch.int64), token.weights.float().contiguous()
        native.forward_reference(*native_arguments(*call, expected), 0)
        size = float(expected.double().square().sum())
        error = float((token.output.double() - expected.double()).square().sum())
        self.figures.checked += 1
        if error > MOST_ERROR * size or not bool(token.output.isfinite().all()):
            self.figures.wrong += 1
            logger.error(
                "layer %d computed a token wrongly: its experts %s gave a result whose error is %.1e of its "
                "square, at most %.0e is right; the memory, the CPU or the device may be broken",
                layer.layer_idx,
                token.ids.flatten().tolist(),
                error / size if size else float("inf"),
                MOST_ERROR,
            )

    def close(self) -> None:
        """Finish the check that runs."""
        self._pool.shutdown()
