"""One sentence instead of a stack trace when a scheduler process cannot make or load its layers."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import TypeVar

from kt_kernel.errors import KTError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Our own errors inside end the scheduler the way SGLang's do, by SIGQUIT to its parent, but readably.

    In a process without a parent (a program that builds layers itself) they are raised as usual.
    """
    try:
        yield
    except KTError as error:
        parent = multiprocessing.parent_process()
        if parent is None:
            raise
        logger.critical("error: %s", error)
        os.kill(parent.pid, signal.SIGQUIT)
        os._exit(1)


def reported_stream(stream: Iterator[Item]) -> Iterator[Item]:
    """The same items; our errors while somebody else consumes them end the server with one sentence."""
    while True:
        with reported():
            try:
                item = next(stream)
            except StopIteration:
                return
        yield item
