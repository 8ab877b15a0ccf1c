"""A device that works when it likes: its two streams are threads that dawdle.

    serving thread    enqueue ─> serving stream ─ ─ ─ ─ ─ ─ ─ ─> done some time later
    copying thread    enqueue ─> copying stream ─ ─ ─ ─ ─ ─> done some time later

`SimulatedDevice` is a Backend (kt_kernel/hybrid/device.py). The tensors are the CPU's; within `on_serving`
and `copy_stream` torch operations are enqueued as tests/api/fake_torch_device.py does it, so what nobody
waited for is not there yet, or is overwritten too early.
"""

from __future__ import annotations

import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.weak import WeakIdKeyDictionary

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


class SimulatedEvent:
    """See kt_kernel.hybrid.device.Event."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._reached = threading.Event()
        device.current_stream().then(self._reached.set)

    def wait(self) -> None:
        self._device.current_stream().then(self._reached.wait)

    def synchronize(self) -> None:
        self._reached.wait()


class SimulatedDevice:
    """See kt_kernel.hybrid.device.Backend; `event` is the type of its events."""

    device = torch.device("cpu")

    def __init__(self, seed: int, most_seconds: float, event: type[SimulatedEvent] = SimulatedEvent) -> None:
        self.serving = SimulatedStream(seed, most_seconds)
        self._copying = SimulatedStream(seed + 1, most_seconds)
        self._event = event
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
        return self._event(self)

    def synchronize(self) -> None:
        self.serving.wait()
        self._copying.wait()

    def close(self) -> None:
        self.serving.close()
        self._copying.close()

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
