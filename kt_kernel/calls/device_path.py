"""Forward calls whose tensors are on an accelerator: host buffers, and the CPU's work enqueued on the stream.

    stream:  route -> copy in -> [queue the task] -> the accelerator's own experts ->
             [wait] -> copy out

`route` packs all that the CPU reads into one block (device_ops/), so there is one copy each way.

What is in brackets is csrc/core/device_calls.h. Python never waits: the calls only enqueue, so they can be
captured in a graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.calls.buffers import BufferCache, BufferKey
from kt_kernel.calls.deferral import DeferralChain
from kt_kernel.calls.inputs import check_inputs, native_arguments_of_block
from kt_kernel.calls.path import CallPath
from kt_kernel.device_ops.block import BlockLayout
from kt_kernel.device_ops.routing import Split, route, route_deferring
from kt_kernel.layer_config import LayerConfig

_RELAXED = 2  # cudaStreamCaptureModeRelaxed


class CudaRuntime:
    """What the path needs of the accelerator's runtime; tests put another in its place."""

    def page_locked(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory the device can copy from and to; may be asked for while a stream captures."""
        before = kt_kernel_ext.exchange_capture_mode(_RELAXED)
        try:
            return self.allocate(shape, dtype)
        finally:
            kt_kernel_ext.exchange_capture_mode(before)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def capture_id(self, stream: int) -> int | None:
        """The number of the capture `stream` records; None if it runs."""
        return kt_kernel_ext.capture_id(stream)

    def current_stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def on_stream(self, stream: int, device: torch.device) -> AbstractContextManager:
        """Makes `stream` and its device the current ones: handle 0 is another stream on each device."""
        if stream == self.current_stream(device):
            return torch.cuda.device(device)
        return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))


class DevicePath(CallPath):
    """Calls of one loaded layer; the outputs of its calls are in host buffers."""

    def __init__(
        self,
        config: LayerConfig,
        engine: Any,
        chain: DeferralChain,
        native: Any,
        reads: Any,
        buffers: BufferCache,
        runtime: CudaRuntime,
    ) -> None:
        super().__init__(config, engine, chain, native, reads)
        self._buffers = buffers
        self._runtime = runtime

    def forward(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        stream: int | None,
        split: Split,
    ) -> torch.Tensor:
        """`submit` and `sync` in one call."""
        self.submit(hidden, ids, weights, stream, split)
        return self.sync(hidden, stream)

    def submit(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        stream: int | None,
        split: Split,
    ) -> torch.Tensor | None:
        """Enqueue the routing, the copy to the host and the task on `stream` (default: the current one).

        Returns the device's slots [tokens, k], filled in stream order, if `split` has a table of them.
        """
        if stream is None:
            stream = self._runtime.current_stream(hidden.device)
        with self._runtime.on_stream(stream, hidden.device):
            return self._submit(hidden, ids, weights, stream, split)

    def _submit(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, stream: int, split: Split
    ) -> torch.Tensor | None:
        config = self._config
        hidden, ids, weights = check_inputs(config, hidden, ids, weights)
        layout = BlockLayout(*ids.shape, config.hidden_size, hidden.dtype)
        key = BufferKey(hidden.device, hidden.dtype, config.hidden_size, config.num_experts_per_tok, stream)
        capture = self._runtime.capture_id(stream)
        ring = self._buffers.ring(key, max(layout.tokens, 1), self._runtime.page_locked, capture)
        host, kept = ring.next_slot(), (ring, self._reads)
        call, protected_k = self._begin(hidden, lambda _: host.output[: layout.tokens]), self._protected_k()
        call.keep_alive = kept if call.earlier is None else (kept, call.earlier.keep_alive)
        if protected_k is None:
            slots, block = route(ids, weights, hidden, split, config.num_experts)
        else:
            slots, block = route_deferring(ids, weights, hidden, split, protected_k, config.num_experts)
        host.block[: layout.packed_bytes].copy_(block, non_blocking=True)
        if not layout.packs_hidden:
            layout.hidden(host.block).copy_(hidden, non_blocking=True)
        later = {}
        if protected_k is not None:
            deferred_output = host.deferred_output[: layout.tokens]
            later["deferred_ids_ptr"] = host.block.data_ptr() + layout.deferred_ids_offset
            later["deferred_output_ptr"] = deferred_output.data_ptr()
            self._defer(call, deferred_output, kept)
        arguments = native_arguments_of_block(layout, host.block, call.output)
        self._native.submit_on_stream(
            stream, *arguments, call.incremental, keep_alive=call.keep_alive, **later
        )
        self._started(call)
        return slots

    def sync(self, hidden: torch.Tensor, stream: int | None) -> torch.Tensor:
        """Enqueue the wait and the copy back; returns a new tensor [tokens, H] like `hidden`, filled in
        stream order.

        Raises the error of an earlier call that failed on the CPU: what a stream does cannot raise.
        """
        call = self._end()
        if stream is None:
            stream = self._runtime.current_stream(hidden.device)
        with self._runtime.on_stream(stream, hidden.device):
            self._engine.sync_on_stream(stream, call.queued_behind)
            output = torch.empty(call.output.shape, dtype=hidden.dtype, device=hidden.device)
            output.copy_(call.output, non_blocking=True)
        try:
            self._engine.raise_pending_error()
        except ValueError as error:
            raise self._failed(f"layer {self._config.layer_idx} or one before it", error) from None
        return output

    def take_deferred(self, hidden: torch.Tensor, stream: int | None) -> torch.Tensor | None:
        """What the layer before deferred for this batch, filled in stream order; None if nothing."""
        earlier = self.chain.take(self._config.layer_idx, hidden)
        if earlier is None:
            return None
        if stream is None:
            stream = self._runtime.current_stream(hidden.device)
        with self._runtime.on_stream(stream, hidden.device):
            self._engine.sync_on_stream(stream, 0)
            output = torch.empty_like(earlier.output, device=hidden.device)
            return output.copy_(earlier.output, non_blocking=True)
