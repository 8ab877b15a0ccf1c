"""A device that works when it likes: its streams are threads that dawdle, or work in an order that is set.

    serving thread    enqueue ─> serving stream ─ ─ ─ ─ ─ ─ ─ ─> done some time later
    copying thread    enqueue ─> copying stream ─ ─ ─ ─ ─ ─> done some time later

`SimulatedDevice` is a Backend (kt_kernel/hybrid/device.py). The tensors are the CPU's; within `on_serving`
and `copy_stream` torch operations are enqueued as tests/api/fake_torch_device.py does it, so what nobody
waited for is not there yet, or is overwritten too early.
"""

from __future__ import annotations

import collections
import ctypes
import enum
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from kt_kernel import kt_kernel_ext

_TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(_TESTS / "api"), str(_TESTS / "kernels")]

from fake_torch_device import OnStream  # noqa: E402

_SHARE_OF_SLOW_WORK = 0.3


class SimulatedStream:
    """Does its work in order on a thread of its own; some of it takes up to `most_seconds` to begin."""

    def __init__(self, seed: int, most_seconds: float) -> None:
        self._random = random.Random(seed)
        self._most_seconds = most_seconds
        self._work: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def then(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def wait(self) -> None:
        """Until all is done; raises what went wrong first."""
        self._work.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._random.random() < _SHARE_OF_SLOW_WORK:
                time.sleep(self._random.random() * self._most_seconds)
            try:
                work()
            except BaseException as error:
                self._failure = self._failure or error
            self._work.task_done()


class Late(enum.Enum):
    NEVER = enum.auto()
    AS_LATE_AS_POSSIBLE = enum.auto()


class OrderedStream:
    """Does its work at once, or only when somebody waits for it: an order that no chance decides.

    `turn`: of the device; one thread at a time does any work, whoever waits.
    """

    def __init__(self, turn: threading.RLock, late: Late) -> None:
        self._turn = turn
        self._late = late
        self._work: collections.deque[Callable[[], object]] = collections.deque()

    def then(self, work: Callable[[], object]) -> None:
        with self._turn:
            self._work.append(work)
            if self._late is Late.NEVER:
                self.wait()

    def wait(self) -> None:
        """Does all of it, on this thread."""
        self.wait_for(lambda: not self._work)

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Works until it is reached."""
        with self._turn:
            while not reached():
                work = self._work.popleft()
                # Whoever waits may be enqueuing torch operations.
                with _disable_current_modes(), torch.inference_mode():
                    work()

    def close(self) -> None:
        self._work.clear()


class SimulatedEvent:
    """See kt_kernel.hybrid.device.Event."""

    def __init__(self, device: SimulatedDevice, stream: SimulatedStream | OrderedStream) -> None:
        self._device = device
        self._stream = stream
        self._reached = threading.Event()
        stream.then(self._reached.set)

    def wait(self) -> None:
        self.hold(self._device.current_stream())

    def hold(self, stream: SimulatedStream | OrderedStream) -> None:
        """Let `stream` wait for it."""
        stream.then(self._wait)

    def reached(self) -> bool:
        return self._reached.is_set()

    def synchronize(self) -> None:
        self._wait()

    def _wait(self) -> None:
        if isinstance(self._stream, OrderedStream):
            self._stream.wait_for(self._reached.is_set)
        else:
            self._reached.wait()


class SimulatedCopies(kt_kernel_ext.DeviceCopies):
    """Copies on streams of the device, see csrc/core/device_copy.h; called on any thread."""

    def __init__(self, device: SimulatedDevice, buffers: int) -> None:
        super().__init__()
        self._device = device
        self._copied: list[SimulatedEvent | None] = [None] * buffers
        self._used: list[SimulatedEvent | None] = [None] * buffers
        self.bus = self.user = device.serving

    def copy(self, to: int, source: int, size: int) -> None:
        self.bus.then(lambda: ctypes.memmove(to, source, size))

    def mark_copied(self, buffer: int) -> None:
        self._copied[buffer] = self._device.event(self._device, self.bus)

    def copied(self, buffer: int) -> bool:
        return self._copied[buffer].reached()

    def wait_until_copied(self, buffer: int) -> None:
        self._copied[buffer].synchronize()

    def let_user_wait(self, buffer: int) -> None:
        self._copied[buffer].hold(self.user)

    def mark_used(self, buffer: int) -> None:
        self._used[buffer] = self._device.event(self._device, self.user)

    def wait_until_used(self, buffer: int) -> None:
        self._used[buffer].hold(self.bus)


Streams = tuple[SimulatedStream | OrderedStream, ...]


def dawdling_streams(seed: int, most_seconds: float) -> Streams:
    return tuple(SimulatedStream(seed + i, most_seconds) for i in range(3))


def ordered_streams(serving: Late, copying: Late) -> Streams:
    turn = threading.RLock()
    return OrderedStream(turn, serving), OrderedStream(turn, copying), OrderedStream(turn, copying)


class SimulatedDevice:
    """See kt_kernel.hybrid.device.Backend. `streams`: that which serves, that which copies and the bus;
    `event`: the type of its events.
    """

    device = torch.device("cpu")

    def __init__(self, streams: Streams, event: type[SimulatedEvent] = SimulatedEvent) -> None:
        self.serving, self._copying, self._bus = streams
        self.event = event
        self._of_thread = threading.local()

    def current_stream(self) -> SimulatedStream:
        """That of this thread; outside of all blocks the serving stream."""
        return getattr(self._of_thread, "stream", self.serving)

    @contextmanager
    def _on(self, stream: SimulatedStream) -> Iterator[None]:
        before, self._of_thread.stream = self.current_stream(), stream
        try:
            with OnStream(stream, WeakIdKeyDictionary()):
                yield
        finally:
            self._of_thread.stream = before

    def on_serving(self):
        """Torch operations of this thread are enqueued on the serving stream inside."""
        return self._on(self.serving)

    def copy_stream(self):
        return self._on(self._copying)

    def record(self) -> SimulatedEvent:
        return self.event(self, self.current_stream())

    def copies(self, buffers: int) -> SimulatedCopies:
        return SimulatedCopies(self, buffers)

    def direct(self, copies: SimulatedCopies) -> None:
        copies.bus = copies.user = self.current_stream()

    def beside(self, copies: SimulatedCopies) -> None:
        copies.bus, copies.user = self._bus, self.current_stream()

    def synchronize(self) -> None:
        for stream in (self.serving, self._bus, self._copying):
            stream.wait()

    def close(self) -> None:
        for stream in (self.serving, self._bus, self._copying):
            stream.close()

    def host_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def page_lock(self, memory: torch.Tensor) -> None:
        return None

    def begin_copying_thread(self) -> None:
        return None

    def capturing(self) -> bool:
        return False

    def release_memory(self) -> None:
        return None
