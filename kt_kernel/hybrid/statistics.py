"""How often each expert of a layer was chosen: counted by the forward pass, read when a decision is due.

    count(ids)       every forward pass: adds 1 per use, where the ids are, without waiting for the device
    settle(tables)   before every change of the placement: books the uses since the last one as hits or not
    advance()        when a decision is due: brings the decayed counts up to date
    totals(), hits() when a report is due
    count_from(f)    calls that go to the CPU's experts past `count` are counted there

All belong to the thread that serves. Reading waits for the device, counting and settling do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from kt_kernel.device_ops.routing import count_uses
from kt_kernel.hybrid.slots import Tables

# Uses older than this many tokens weigh half. Of 256 experts with 8 per token an average one is used 128
# times meanwhile, so chance blurs its share by 9 %, and a new topic rules the counts after a few answers.
HALF_LIFE_TOKENS = 4096


class LayerStatistics:
    """Counts of one layer's experts; its tensors live on `device`, where the ids will be."""

    def __init__(
        self,
        num_experts: int,
        device: torch.device | str = "cpu",
        half_life_tokens: float = HALF_LIFE_TOKENS,
    ) -> None:
        # Made here and not when the first ids come: that may be inside the capture of a graph, which would
        # make them anew at every replay. Made in inference mode, they could be written in that mode only.
        with torch.inference_mode(mode=False):
            # Entry 0 takes the ids of -1.
            self._counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
            self._settled = torch.zeros_like(self._counts)
            self._hits = torch.zeros_like(self._counts)
        self._cpu_uses: Callable[[], Sequence[int]] = list
        self._cpu_uses_forgotten: Sequence[int] = []
        self._uses_per_token = 1
        self._half_life_tokens = half_life_tokens
        self._advanced_to = torch.zeros(num_experts, dtype=torch.int64)
        self._decayed = torch.zeros(num_experts, dtype=torch.float64)

    def count(self, ids: torch.Tensor) -> None:
        """Add the uses in `ids` [tokens, k], any integer type, -1 = none; can be captured in a graph."""
        count_uses(self.counts_of_pass(ids.shape[1]), ids)

    def counts_of_pass(self, uses_per_token: int) -> torch.Tensor:
        """What `count` adds to, for a pass that does so itself (device_ops/routing.py)."""
        self._uses_per_token = uses_per_token
        return self._counts

    def totals(self) -> torch.Tensor:
        """Uses of each expert since the start: int64 [E] on the CPU."""
        return self._counts[1:].to("cpu", copy=True) + self._counted_by_cpu()

    def count_from(self, cpu_uses: Callable[[], Sequence[int]]) -> None:
        """`cpu_uses()`: uses of each expert since its start, by calls that `count` does not see."""
        self._cpu_uses = cpu_uses

    def _counted_by_cpu(self) -> torch.Tensor:
        """int64 [E]; all zero unless `count_from` was called."""
        none = [0] * (self._counts.numel() - 1)
        now, forgotten = (torch.tensor(uses or none) for uses in (self._cpu_uses(), self._cpu_uses_forgotten))
        return now - forgotten

    def forget(self) -> None:
        """Begin anew, in the order of the current stream; the tensors stay those that graphs write to."""
        for counts in (self._counts, self._settled, self._hits):
            counts.zero_()
        self._cpu_uses_forgotten = self._cpu_uses()
        self._advanced_to = torch.zeros_like(self._advanced_to)
        self._decayed = torch.zeros_like(self._decayed)

    # ---- hits ----------------------------------------------------------------------------------

    def settle(self, tables: Tables) -> None:
        """Book the uses since the last call: a hit where the expert has a slot in `tables`, which held
        for all of them.
        """
        # The tables' last entry stands for -1, ours is the first.
        on_device = tables.on_device.roll(1)
        now = self._counts.clone()  # a pass on another stream may be counting
        self._hits += (now - self._settled) * on_device
        self._settled.copy_(now)

    def hits(self, tables: Tables) -> tuple[int, int]:
        """(uses of experts that had a slot at the time, all uses) since the start; `tables` are the current
        ones.
        """
        self.settle(tables)
        uses = int(self._settled[1:].sum()) + int(self._counted_by_cpu().sum())
        return int(self._hits.sum()), uses

    # ---- decayed counts ------------------------------------------------------------------------

    def advance(self) -> None:
        """Fade the decayed counts by the tokens since the last call, and add their uses.

        The uses of one interval are taken as spread evenly over it: a steady load gives the same counts
        however often this is called.
        """
        totals = self.totals()
        uses = totals - self._advanced_to
        self._advanced_to = totals
        half_lives = float(uses.sum()) / self._uses_per_token / self._half_life_tokens
        if half_lives > 0:
            fade = 2.0**-half_lives
            mean_weight = (1 - fade) / (half_lives * math.log(2))
            self._decayed = self._decayed * fade + uses * mean_weight

    @property
    def decayed(self) -> torch.Tensor:
        """float64 [E] on the CPU as of the last `advance`; a new tensor after each, the old ones stay."""
        return self._decayed


def totals_of(layers: Sequence[LayerStatistics]) -> torch.Tensor:
    """`totals` of several layers: int64 [layers, E] on the CPU, for one wait."""
    return torch.stack([layer._counts for layer in layers])[:, 1:].cpu()
