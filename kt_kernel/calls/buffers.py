"""Page-locked host buffers through which an accelerator's stream exchanges tensors with the CPU engine.

The stream's host callbacks and copies hold raw addresses, so a buffer must outlive everything enqueued with
it, and, once captured in a graph, every replay. Who holds a ring therefore decides how long it lives:

- A call that runs finds its ring here, by (device, dtype, hidden size, top-k, stream), and reuses it in
stream order. Token counts announced by `set_capture_batch_sizes` have rings of exactly that size; other
counts share rings whose capacity is a power of two.
- A captured call takes a ring for its capture alone, shared by the layers of that graph and held by the
graph (`keep_alive` of the native calls): no other call ever uses it, and it goes when the graph goes. The
first captured call takes over the ring of the warm-up calls before it, so that nothing is allocated while
capturing.

What is still in use when a ring is let go stays valid: queued tasks hold their ring, and torch's
page-locked memory is handed out again only after the copies enqueued with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.device_ops.block import BlockLayout
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
    """Host memory of one call of up to `capacity` tokens.

    `block`: what the CPU reads, as bytes; the call's own BlockLayout says where the parts are.
    """

    def __init__(self, key: BufferKey, capacity: int, allocate: Allocate) -> None:
        layout = BlockLayout(capacity, key.top_k, key.hidden_size, key.dtype)
        self.block = allocate((layout.bytes,), torch.uint8)
        self.output = allocate((capacity, key.hidden_size), key.dtype)
        self.deferred_output = allocate((capacity, key.hidden_size), key.dtype)

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in (self.block, self.output, self.deferred_output))


class Ring:
    """Two slots used in turn: while layer n+1 fills one, layer n's deferred task may still read the other."""

    def __init__(self, key: BufferKey, capacity: int, allocate: Allocate) -> None:
        self.capacity = capacity
        self._slots = (Slot(key, capacity, allocate), Slot(key, capacity, allocate))
        self._turn = 0

    @property
    def bytes(self) -> int:
        return sum(slot.bytes for slot in self._slots)

    def next_slot(self) -> Slot:
        self._turn = 1 - self._turn
        return self._slots[self._turn]


class BufferCache:
    """The rings of the process that calls may use now."""

    def __init__(self) -> None:
        self._capture_sizes: tuple[int, ...] = ()
        self._announced: dict[tuple[BufferKey, int], Ring] = {}
        self._shared: defaultdict[BufferKey, list[Ring]] = defaultdict(list)
        self._captured: WeakValueDictionary[tuple[BufferKey, int, int], Ring] = WeakValueDictionary()

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

    def ring(self, key: BufferKey, tokens: int, allocate: Allocate, capture: int | None = None) -> Ring:
        """The ring for calls of `tokens` tokens; `capture` numbers the capture the call is part of.

        A captured call's ring is for the caller to hold, as long as the graph may be replayed.
        """
        if capture is not None:
            return self._of_capture(key, tokens, allocate, capture)
        if tokens in self._capture_sizes:
            if (key, tokens) not in self._announced:
                self._announced[key, tokens] = Ring(key, tokens, allocate)
            return self._announced[key, tokens]
        rings = self._shared[key]
        for ring in rings:
            if ring.capacity >= tokens:
                return ring
        # Smaller rings stay: callbacks of earlier calls may still use them.
        rings.append(Ring(key, 1 << (tokens - 1).bit_length(), allocate))
        return rings[-1]

    def _of_capture(self, key: BufferKey, tokens: int, allocate: Allocate, capture: int) -> Ring:
        ring = self._captured.get((key, tokens, capture))
        if ring is None:
            # Whoever captures waits for the warm-up calls first (torch does), so they no longer use theirs.
            ring = self._announced.pop((key, tokens), None) or Ring(key, tokens, allocate)
            self._captured[key, tokens, capture] = ring
        return ring

    @property
    def bytes_of_calls(self) -> int:
        """Host memory of the rings that calls may use now."""
        shared = (ring for rings in self._shared.values() for ring in rings)
        return sum(ring.bytes for ring in (*self._announced.values(), *shared))

    @property
    def bytes_of_graphs(self) -> int:
        """Host memory of the rings that captured graphs hold."""
        return sum(ring.bytes for ring in self._captured.values())

    def clear(self) -> None:
        """Let all rings go; graphs and calls on their way keep theirs."""
        self._announced.clear()
        self._shared.clear()
        kt_kernel_ext.release_finished()


BUFFERS = BufferCache()
