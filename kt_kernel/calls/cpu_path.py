"""Forward calls whose tensors are in CPU memory: the kernels read and write the caller's tensors in place."""

from __future__ import annotations

import torch

from kt_kernel.calls.deferral import (
    select_deferred_experts,
    wait_ignoring_errors,
    without_experts,
)
from kt_kernel.calls.inputs import check_inputs, native_arguments
from kt_kernel.calls.path import CallPath
from kt_kernel.errors import CallOrderError, InputError


class CpuPath(CallPath):
    """Calls of one loaded layer."""

    def forward(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        device_experts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute now, on this thread and the engine's. Copies nothing unless deferral is in play."""
        config = self._config
        if self.chain.pending is not None or self._protected_k() is not None:
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
        call = self._begin(hidden, torch.empty_like)
        # Serving code masks ids in place right after submitting; a few hundred bytes make that harmless.
        ids, weights = ids.clone(), weights.clone()
        deferred_ids, protected_k = None, self._protected_k()
        if protected_k is not None:
            ids, deferred_ids = select_deferred_experts(ids, weights, protected_k, config.num_experts)
        if device_experts is not None:
            # Only now: experts on the device take part in the ranking.
            ids = without_experts(ids, device_experts)
            if deferred_ids is not None:
                deferred_ids = without_experts(deferred_ids, device_experts)
        call.keep_alive = hidden, ids, weights
        self._started(call)
        self._submit(hidden, ids, weights, call.output, call.incremental)
        if deferred_ids is not None:
            # The model goes on and may overwrite hidden before the deferred task reads it.
            hidden, later = hidden.clone(), torch.empty_like(hidden)
            self._defer(call, later, (hidden, deferred_ids, weights, self._reads))
            self._submit(hidden, deferred_ids, weights, later, 0)

    def sync(self, hidden: torch.Tensor) -> torch.Tensor:
        """Wait for the submitted call, return its output [tokens, H]; `hidden` says which batch is meant."""
        call = self._end()
        try:
            self._engine.sync(call.queued_behind)
        except ValueError as error:
            raise self._failed(f"layer {self._config.layer_idx}", error) from None
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

    def _submit(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        incremental: int,
    ) -> None:
        try:
            self._native.submit(*native_arguments(hidden, ids, weights, output), incremental)
        except ValueError as error:
            raise self._failed(f"layer {self._config.layer_idx}", error) from None

    def _give_up_unfetched(self) -> None:
        """A submitted call whose result nobody fetched (its caller failed) must end before its tensors go."""
        if self._in_flight is not None:
            wait_ignoring_errors(self._engine)
            self._in_flight = None

    def __del__(self) -> None:
        self._give_up_unfetched()
