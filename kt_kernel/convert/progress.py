"""How far a conversion is: a bar that is drawn over itself on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

_BAR = 24
_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 10.0


class Progress:
    """Counts input bytes; `add` may be called from any thread."""

    def __init__(self, total_bytes: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._drawn_over = self._stream.isatty()
        self._lock = threading.Lock()
        self._total, self._done, self._label = total_bytes, 0, ""
        self._begin = self._shown = time.monotonic()

    def layer(self, text: str) -> None:
        """What is being worked on."""
        with self._lock:
            self._label = text
            self._show()

    def add(self, input_bytes: int) -> None:
        """So much more of the input is done."""
        with self._lock:
            self._done += input_bytes
            if time.monotonic() - self._shown > (_REDRAW_SECONDS if self._drawn_over else _LINE_SECONDS):
                self._show()

    def end(self) -> None:
        """The last state, and the end of the bar's line."""
        with self._lock:
            self._show()
            if self._drawn_over:
                self._stream.write("\n")
                self._stream.flush()

    def _show(self) -> None:
        self._shown = time.monotonic()
        text = describe(self._done, self._total, self._shown - self._begin)
        share = self._done / self._total if self._total else 1.0
        if self._drawn_over:
            bar = ("#" * int(_BAR * min(share, 1.0))).ljust(_BAR, "-")
            self._stream.write(f"\r\x1b[K[{bar}] {text}, {self._label}")
        else:
            self._stream.write(f"{text}, {self._label}\n")
        self._stream.flush()


def describe(done: int, total: int, seconds: float) -> str:
    """ "37 %, 1.24 GB/s, 2:05 left"."""
    done = min(done, total)
    share = f"{100 * done // total if total else 100:3d} %"
    if not done or seconds <= 0:
        return share
    left = int((total - done) * seconds / done)
    hours, minutes = divmod(left // 60, 60)
    clock = f"{hours}:{minutes:02d}:{left % 60:02d}" if hours else f"{minutes}:{left % 60:02d}"
    return f"{share}, {done / seconds / 1e9:.2f} GB/s, {clock} left"
