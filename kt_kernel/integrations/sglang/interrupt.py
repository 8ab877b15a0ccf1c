"""Ctrl-C on a server: one process decides, and no stack traces.

A terminal sends SIGINT to every process of the server. Stock SGLang 0.5.23 stops, with four stack traces.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys

logger = logging.getLogger(__name__)


def stop_quietly() -> None:
    """Child processes leave it to the launching one to end them; that one says so in a sentence."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        sys.excepthook = _one_line_for_an_interrupt(sys.excepthook)


def _one_line_for_an_interrupt(other):
    def excepthook(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            logger.info("interrupted: the server has stopped")
        else:
            other(kind, error, trace)

    return excepthook
