"""What forward calls have in common wherever their tensors are: one at a time, and their part in deferral.

begin    where does the sum go: to new memory, or on top of what the layer before deferred
defer    some of the experts are left to a second task, whose sum the next layer adds
started  the tasks are queued
end      the call that `sync` is asked for
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel.calls.deferral import DeferralChain, DeferredOutput
from kt_kernel.errors import CallOrderError, InputError
from kt_kernel.layer_config import LayerConfig


@dataclass
class Call:
    """`output` [tokens, H] gets the sum, on top of `earlier`'s if there is one.

    `queued_behind`: tasks this layer queued after the call's own. `keep_alive`: what the task reads.
    """

    output: torch.Tensor
    earlier: DeferredOutput | None
    queued_behind: int = 0
    keep_alive: Any = None

    @property
    def incremental(self) -> int:
        """The native calls' word for it: 1 = add to what `output` holds."""
        return 0 if self.earlier is None else 1


class CallPath:
    """Calls of one loaded layer. `native`, its extension object, reads the memory of `reads` whenever it
    computes: the mask, and weights that are mapped from a file.

    `chain` may be another from one pass to the next.
    """

    def __init__(
        self, config: LayerConfig, engine: Any, chain: DeferralChain, native: Any, reads: Any
    ) -> None:
        self._config = config
        self._engine = engine
        self.chain = chain
        self._native = native
        self._reads = reads
        self._in_flight: Call | None = None

    def _protected_k(self) -> int | None:
        """How many of each token's experts this call must compute at once; None = all, nothing is deferred.

        To be asked after `_begin`.
        """
        config = self._config
        if config.max_deferred_experts_per_token == 0 or not self.chain.may_defer(config.layer_idx):
            return None
        return config.num_experts_per_tok - config.max_deferred_experts_per_token

    def _begin(self, hidden: torch.Tensor, new_output: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """For checked `hidden` [tokens, H]. Raises InputError if another batch is on its way."""
        earlier = self.chain.take(self._config.layer_idx, hidden)
        return Call(new_output(hidden) if earlier is None else earlier.output, earlier)

    def _defer(self, call: Call, output: torch.Tensor, keep_alive: Any) -> None:
        """A second task of `call`, which reads `keep_alive`, is going to fill `output`."""
        call.queued_behind = 1
        self.chain.pending = DeferredOutput(self._config.layer_idx, output, keep_alive)

    def _started(self, call: Call) -> None:
        self._in_flight = call

    def _end(self) -> Call:
        """Raises CallOrderError if there is none."""
        call, self._in_flight = self._in_flight, None
        if call is None:
            raise CallOrderError(
                f"layer {self._config.layer_idx}: sync_forward without a submit_forward before it."
            )
        return call

    def _failed(self, where: str, error: ValueError) -> InputError:
        """The error to raise; what the failed pass had deferred is dropped."""
        self._in_flight = None
        self.chain.drop()
        return InputError(f"{where}: {error}")
