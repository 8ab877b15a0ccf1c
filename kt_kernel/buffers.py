"""Page-locked host buffers through which an accelerator's stream exchanges tensors with the CPU engine.

The stream's host callbacks hold raw addresses, so a buffer must outlive every callback already enqueued, and,
once captured in a graph, every replay. Therefore no buffer is ever freed or resized behind the caller's back:

- A ring belongs to one (device, dtype, hidden size, top-k, stream) and is reused in stream order.
- Batch sizes announced by `set_capture_batch_sizes` have rings of their own, exactly that large, that graphs
may hold.
- Other sizes share rings whose capacity is a power of two, so there are few of them.

Only `clear` frees, after waiting for the device; graphs captured before it must not be replayed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from kt_kernel.errors import ConfigurationError

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class BufferKey(NamedTuple):
    """Everything that decides whether two calls may use the same memory."""

    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    top_k: int
    stream: int


class Slot:
    """Host memory of one call of up to `capacity` tokens."""

    def __init__(self, key: BufferKey, capacity: int, allocate: Allocate) -> None:
        wide, narrow = (capacity, key.hidden_size), (capacity, key.top_k)
        self.hidden = allocate(wide, key.dtype)
        self.ids = allocate(narrow, torch.int64)
        self.deferred_ids = allocate(narrow, torch.int64)
        self.weights = allocate(narrow, torch.float32)
        self.output = allocate(wide, key.dtype)
        self.deferred_output = allocate(wide, key.dtype)


class Ring:
    """Two slots used in turn: while layer n+1 fills one, layer n's deferred task may still read the other."""

    def __init__(self, key: BufferKey, capacity: int, allocate: Allocate) -> None:
        self.capacity = capacity
        self._slots = (Slot(key, capacity, allocate), Slot(key, capacity, allocate))
        self._turn = 0

    def next_slot(self) -> Slot:
        self._turn = 1 - self._turn
        return self._slots[self._turn]


class BufferCache:
    """All rings of the process."""

    def __init__(self) -> None:
        self._capture_sizes: tuple[int, ...] = ()
        self._captured: dict[tuple[BufferKey, int], Ring] = {}
        self._shared: defaultdict[BufferKey, list[Ring]] = defaultdict(list)

    @property
    def capture_sizes(self) -> list[int]:
        return list(self._capture_sizes)

    def set_capture_sizes(self, sizes: Iterable[int]) -> None:
        """Replace the batch sizes (tokens) that have rings of their own."""
        sizes = tuple(sizes)
        for size in sizes:
            if size < 1:
                raise ConfigurationError(f"a capture batch size is {size}, expected a number of tokens >= 1.")
        self._capture_sizes = sizes

    def ring(self, key: BufferKey, tokens: int, allocate: Allocate) -> Ring:
        """The ring for calls of `tokens` tokens."""
        if tokens in self._capture_sizes:
            if (key, tokens) not in self._captured:
                self._captured[key, tokens] = Ring(key, tokens, allocate)
            return self._captured[key, tokens]
        rings = self._shared[key]
        for ring in rings:
            if ring.capacity >= tokens:
                return ring
        # Smaller rings stay: callbacks of earlier calls may still use them.
        rings.append(Ring(key, 1 << (tokens - 1).bit_length(), allocate))
        return rings[-1]

    def clear(self) -> None:
        """Free all rings; the device must have finished every call that used them."""
        self._captured.clear()
        self._shared.clear()


BUFFERS = BufferCache()
