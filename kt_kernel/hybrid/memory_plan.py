"""What the engine's memory is for and where it is, as a server logs it at its start and reports it later.

What SGLang or transformers hold (other weights, KV cache, graphs) is theirs to report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kt_kernel.calls.buffers import BUFFERS
from kt_kernel.hybrid.context import HybridContext
from kt_kernel.hybrid.experts import bytes_of_slots
from kt_kernel.hybrid.fetch import MissFetcher
from kt_kernel.hybrid.placed import PlacedExperts
from kt_kernel.hybrid.prefill import LayerwisePrefill

DEVICE, PAGE_LOCKED, HOST = "device", "page-locked host", "host"


@dataclass(frozen=True)
class MemoryRow:
    """`bytes` that this process holds at one `where` for one purpose."""

    what: str
    where: str
    bytes: int


def memory_plan(
    context: HybridContext,
    layers: Sequence[PlacedExperts],
    *,
    prefill: LayerwisePrefill,
    misses: MissFetcher,
) -> list[MemoryRow]:
    """The memory that is taken now, by purpose; purposes that take none are left out."""
    wrappers = [layer.wrapper for layer in layers if layer.wrapper is not None]
    # On a CPU in the place of a device nothing is page-locked.
    exchanged = HOST if context.device.type == "cpu" else PAGE_LOCKED
    rows = (
        MemoryRow("CPU experts, packed", HOST, sum(wrapper.moe.weight_bytes for wrapper in wrappers)),
        MemoryRow("resident experts", DEVICE, sum(bytes_of_slots(layer.resident) for layer in layers)),
        MemoryRow("slots of layerwise prefill", DEVICE, prefill.device_bytes),
        MemoryRow("slots of fetched experts", DEVICE, misses.device_bytes),
        MemoryRow("staging of copied experts", DEVICE, sum(c.device_bytes for c in context.channels)),
        MemoryRow("staging of copied experts", exchanged, sum(c.host_bytes for c in context.channels)),
        MemoryRow("exchange with the CPU", exchanged, BUFFERS.bytes_of_calls),
        MemoryRow("exchange with the CPU in graphs", exchanged, BUFFERS.bytes_of_graphs),
    )
    return [row for row in rows if row.bytes]


def table(rows: list[MemoryRow]) -> str:
    """For people: a line per row and one per place with its sum."""
    places = dict.fromkeys(row.where for row in rows)
    sums = [MemoryRow("sum", where, sum(row.bytes for row in rows if row.where == where)) for where in places]
    return "\n".join(
        f"  {row.what:<32} {row.where:<17} {row.bytes / 1e6:>14,.1f} MB" for row in (*rows, *sums)
    )
