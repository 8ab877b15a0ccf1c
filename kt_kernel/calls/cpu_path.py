"""Forward calls whose tensors are in CPU memory: the kernels read and write the caller's tensors in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel.calls.deferral import (
    DeferralChain,
    DeferredOutput,
    select_deferred_experts,
    wait_ignoring_errors,
    without_experts,
)
from kt_kernel.calls.inputs import check_inputs, native_arguments
from kt_kernel.errors import CallOrderError, InputError
from kt_kernel.layer_config import LayerConfig


@dataclass
class _InFlight:
    """A submitted call."""

    output: torch.Tensor
    queued_behind: int  # tasks this layer queued after it
    keep_alive: Any  # what the task reads


class CpuPath:
    """Calls of one loaded layer. `native`, its extension object, reads `mask` whenever it computes.

    `chain` may be another from one pass to the next.
    """

    def __init__(
        self, config: LayerConfig, engine: Any, chain: DeferralChain, native: Any, mask: torch.Tensor
    ) -> None:
        self._config = config
        self._engine = engine
        self.chain = chain
        self._native = native
        self._mask = mask
        self._in_flight: _InFlight | None = None

    def forward(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        device_experts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute now, on this thread and the engine's. Copies nothing unless deferral is in play."""
        config = self._config
        if self.chain.pending is not None or self._defers():
            self.submit(hidden, ids, weights, device_experts)
            return self.sync(hidden)
        hidden, ids, weights = check_inputs(config, hidden, ids, weights)
        if device_experts is not None:
            ids = without_experts(ids, device_experts)
        output = torch.empty_like(hidden)
        try:
            self._native.forward(*native_arguments(hidden, ids, weights, output), 0)
        except ValueError as error:
            raise InputError(f"layer {config.layer_idx}: {error}") from None
        return output

    def submit(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        device_experts: torch.Tensor | None = None,
    ) -> None:
        """Queue the call. `hidden` must stay unchanged until `sync`; ids and weights are copied at once."""
        config = self._config
        self._give_up_unfetched()
        hidden, ids, weights = check_inputs(config, hidden, ids, weights)
        earlier = self.chain.take(config.layer_idx, hidden)
        # Serving code masks ids in place right after submitting; a few hundred bytes make that harmless.
        ids, weights = ids.clone(), weights.clone()
        deferred_ids = None
        if self._defers():
            protected_k = config.num_experts_per_tok - config.max_deferred_experts_per_token
            ids, deferred_ids = select_deferred_experts(ids, weights, protected_k, config.num_experts)
        if device_experts is not None:
            # Only now: experts on the device take part in the ranking.
            ids = without_experts(ids, device_experts)
            if deferred_ids is not None:
                deferred_ids = without_experts(deferred_ids, device_experts)
        output = torch.empty_like(hidden) if earlier is None else earlier.output
        self._in_flight = _InFlight(output, 0 if deferred_ids is None else 1, (hidden, ids, weights, earlier))
        self._submit(hidden, ids, weights, output, 0 if earlier is None else 1)
        if deferred_ids is not None:
            # The model goes on and may overwrite hidden before the deferred task reads it.
            hidden, later = hidden.clone(), torch.empty_like(hidden)
            self.chain.pending = DeferredOutput(
                config.layer_idx, later, (hidden, deferred_ids, weights, self._mask)
            )
            self._submit(hidden, deferred_ids, weights, later, 0)

    def sync(self, hidden: torch.Tensor) -> torch.Tensor:
        """Wait for the submitted call, return its output [tokens, H]; `hidden` says which batch is meant."""
        call, self._in_flight = self._in_flight, None
        if call is None:
            raise CallOrderError(
                f"layer {self._config.layer_idx}: sync_forward without a submit_forward before it."
            )
        try:
            self._engine.sync(call.queued_behind)
        except ValueError as error:
            self.chain.drop()
            raise InputError(f"layer {self._config.layer_idx}: {error}") from None
        if hidden.numel() != call.output.numel():
            raise CallOrderError(
                f"layer {self._config.layer_idx}: sync_forward was given {hidden.numel()} values, but "
                f"{call.output.numel()} were submitted; pass the same hidden_states to both."
            )
        return call.output

    def take_deferred(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """What the layer before deferred for this batch, once it is there; None if nothing."""
        earlier = self.chain.take(self._config.layer_idx, hidden)
        if earlier is None:
            return None
        try:
            self._engine.sync(0)
        except ValueError as error:
            raise InputError(f"layer {earlier.layer_idx}: {error}") from None
        return earlier.output

    def _defers(self) -> bool:
        config = self._config
        return config.max_deferred_experts_per_token > 0 and self.chain.may_defer(config.layer_idx)

    def _submit(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, add: int
    ) -> None:
        try:
            self._native.submit(*native_arguments(hidden, ids, weights, output), add)
        except ValueError as error:
            self._in_flight = None
            self.chain.drop()
            raise InputError(f"layer {self._config.layer_idx}: {error}") from None

    def _give_up_unfetched(self) -> None:
        """A submitted call whose result nobody fetched (its caller failed) must end before its tensors go."""
        if self._in_flight is not None:
            wait_ignoring_errors(self._engine)
            self._in_flight = None

    def __del__(self) -> None:
        self._give_up_unfetched()
