"""Which rows of a pass meet whole layers on the device: decided request by request.

A prompt's sums on the device are rounded differently from those that CPU and device compute together. So what
decides is the request alone, and not what else happens to be computed in the same pass:

    new tokens of one prompt     0 ────────── chunk ────────── 2 chunks ──── length
    streamed                     ├── all of the chunks, counted from its first token, ──┤── a last one of ──┤
                                     that have at least `threshold` tokens                 fewer is not

The server may cut the prompt elsewhere, where other requests took part of a pass: its rows go the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def streamed_tokens(length: int, threshold: int, chunk: int | None) -> int:
    """Of a prompt's `length` new tokens, so many from its beginning are streamed.

    `threshold`: 0 = none ever. `chunk`: the most of one pass, None = no limit.
    """
    chunk = length if chunk is None else min(chunk, length)
    if not 0 < threshold <= chunk:
        return 0
    whole, rest = divmod(length, chunk)
    return whole * chunk + (rest if rest >= threshold else 0)


@dataclass(frozen=True)
class RequestRows:
    """One request's part of a pass: `rows` in all, the first `streamed` of them by whole layers."""

    rows: int
    streamed: int


@dataclass(frozen=True)
class RowSplit:
    """The rows of a call that are streamed and the others, int64 in ascending order; None = no others."""

    streamed: torch.Tensor | None
    others: torch.Tensor | None


ALL_ROWS = RowSplit(None, None)


class PassRows:
    """What the layers of one pass ask. `requests` in the order of their rows."""

    def __init__(self, requests: Sequence[RequestRows], device: torch.device) -> None:
        flags = [place < part.streamed for part in requests for place in range(part.rows)]
        self.streamed = sum(flags)
        self._flags = torch.tensor(flags, dtype=torch.bool)
        self._device = device
        self._splits: dict[int, RowSplit] = {}

    def split(self, rows: int) -> RowSplit | None:
        """For a call of `rows` rows; None = nothing is streamed.

        Rows behind those of the requests only fill up the call. One with fewer is none of this pass.
        """
        known = self._flags.numel()
        if self.streamed == 0 or rows < known:
            return None
        if self.streamed == rows:
            return ALL_ROWS
        if rows not in self._splits:
            flags = torch.zeros(rows, dtype=torch.bool)
            flags[:known] = self._flags
            self._splits[rows] = RowSplit(
                *(part.nonzero()[:, 0].to(self._device) for part in (flags, ~flags))
            )
        return self._splits[rows]
