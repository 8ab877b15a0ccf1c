"""How much of the copying to a GPU runs beside its computing, from a trace that torch.profiler wrote.

copying     host-to-device copies
computing   kernels on streams without such copies: what decodes experts behind their copy is not counted
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """Seconds in which the GPU copied, computed, and did both."""

    copying: float
    computing: float
    both: float

    @property
    def share(self) -> float | None:
        """Of the shorter of the two, what ran beside the other; None if one did not happen."""
        shorter = min(self.copying, self.computing)
        return self.both / shorter if shorter else None


def overlap_of_trace(trace: dict[str, Any]) -> Overlap:
    """`trace`: the content of a file by `torch.profiler.profile.export_chrome_trace`."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]]
    copy_streams = {_stream(event) for event in copies}
    kernels = [
        event for event in events if event.get("cat") == "kernel" and _stream(event) not in copy_streams
    ]
    copying, computing = union(map(_interval, copies)), union(map(_interval, kernels))
    return Overlap(length(copying), length(computing), length(intersection(copying, computing)))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in ascending order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def intersection(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """Points in both; each list disjoint and ascending."""
    common, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            common.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return common


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def _stream(event: dict[str, Any]) -> Any:
    return event["args"].get("stream")


def _interval(event: dict[str, Any]) -> Interval:
    """In seconds; the trace counts microseconds."""
    return event["ts"] * 1e-6, (event["ts"] + event["dur"]) * 1e-6
