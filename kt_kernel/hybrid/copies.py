"""The one thread that copies experts in the background, one job after another.

Layerwise prefill and dynamic update both use it, so a copy never reads a slot that another is writing, and
all ranks do the same jobs in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from kt_kernel.errors import CallOrderError
from kt_kernel.faults import fails
from kt_kernel.hybrid.device import Backend, Event

T = TypeVar("T")


class CopyWorker:
    """Runs jobs on a thread and a stream of its own."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="kt-copies", initializer=backend.begin_copying_thread
        )

    def start(self, job: Callable[[], T]) -> Future[tuple[T, Event]]:
        """Run `job` behind those started before and behind what the caller's stream holds now.

        The result comes with an event: whoever uses what was copied lets its stream wait for that.
        """
        if os.getpid() != self._process:
            raise CallOrderError(
                f"these experts belong to process {self._process}, and its forked child {os.getpid()} has "
                "none of the threads that copy them; call them in that process, or start the child by spawn "
                "and load the experts there."
            )
        before = self._backend.record()

        def run() -> tuple[T, Event]:
            # Weights made in inference mode, as servers do, may be written in that mode only.
            with torch.inference_mode(), self._backend.copy_stream():
                before.wait()
                if fails("copy-job"):
                    raise RuntimeError("copying experts was made to fail by KT_FAULT")
                result = job()
                return result, self._backend.record()

        return self._pool.submit(run)

    def close(self) -> None:
        """Finish the jobs that were started; none can be started afterwards."""
        self._pool.shutdown()
