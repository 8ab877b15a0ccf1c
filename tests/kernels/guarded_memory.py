"""Arrays that touch forbidden memory: one byte too far is a SIGSEGV, not luck.

    | guard page | canary ... array | guard page |     side "after": the array ends at a page without access
    | guard page | array ... canary | guard page |     side "before": it starts behind one

The canary fills the rest of the array's pages and is checked by `canary_is_intact`. Placed "after", an array
is only aligned to its element size, as callers' tensors may be.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

SIDES = ("before", "after")
PAGE = mmap.PAGESIZE
CANARY = 0xA5

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_NONE, _READ, _WRITE = 0, 1, 2


def _check(status: int, what: str) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), what)


class GuardedArray:
    """A copy of `content` beside a guard page; `array` views it. Unmapped by close()."""

    def __init__(self, content: np.ndarray, side: str):
        content = np.ascontiguousarray(content)
        self._inner = max(PAGE, -(-content.nbytes // PAGE) * PAGE)
        self._bytes = self._inner + 2 * PAGE
        self._base = _libc.mmap(None, self._bytes, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if self._base in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap of a guarded array failed")
        self._protect(_READ | _WRITE)
        pages = np.frombuffer((ctypes.c_uint8 * self._inner).from_address(self._base + PAGE), np.uint8)
        pages[:] = CANARY
        offset = 0 if side == "before" else self._inner - content.nbytes
        self._around = [pages[:offset], pages[offset + content.nbytes :]]
        self.array = pages[offset : offset + content.nbytes].view(content.dtype).reshape(content.shape)
        self.array[...] = content

    def _protect(self, protection: int) -> None:
        _check(
            _libc.mprotect(self._base + PAGE, self._inner, protection), "mprotect of a guarded array failed"
        )

    def read_only(self) -> GuardedArray:
        self._protect(_READ)
        return self

    def canary_is_intact(self) -> bool:
        return all((part == CANARY).all() for part in self._around)

    def close(self) -> None:
        _check(_libc.munmap(self._base, self._bytes), "munmap of a guarded array failed")
