"""The figures of a model as plain values, for servers to expose and `kt top` to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kt_kernel.hybrid.context import HybridContext
from kt_kernel.hybrid.fetch import MissFetcher
from kt_kernel.hybrid.memory_plan import MemoryRow
from kt_kernel.hybrid.placed import PlacedExperts
from kt_kernel.hybrid.prefill import LayerwisePrefill
from kt_kernel.hybrid.update import UpdateFigures


def report(
    context: HybridContext,
    layers: Sequence[PlacedExperts],
    *,
    prefill: LayerwisePrefill,
    misses: MissFetcher,
    updates: UpdateFigures,
    memory: list[MemoryRow],
) -> dict[str, Any]:
    """Where the experts are, how often they were found there, and what was copied and computed.

    Rates are None before there is anything to divide by; `cpu` is that of this process's engine. A layer's
    `expert_uses` are those of each expert.
    """
    rows = [_layer(layer) for layer in layers]
    hits = sum(row.pop("hits") for row in rows)
    copied = {
        "update": updates.bytes_copied,
        "prefill": prefill.bytes_copied,
        "misses": misses.bytes_copied,
    }
    return {
        "layers": rows,
        "experts": sum(layer.num_experts for layer in layers),
        "device_experts": sum(len(row["device_experts"]) for row in rows),
        "hit_rate": _ratio(hits, sum(row["uses"] for row in rows)),
        "updates": updates.updates,
        "experts_moved": updates.experts_moved,
        "bytes_copied": sum(copied.values()),
        "bytes": copied,
        "prefill": {
            "threshold": prefill.threshold,
            "chunks": prefill.chunks,
            "mixed": prefill.mixed,
            "fallbacks": prefill.fallbacks,
        },
        "cpu": _cpu(layers),
        "memory": [asdict(row) for row in memory],
        "cpu_share": _share(layers),
        "deferred": max((_deferred(layer) for layer in layers), default=0),
        "miss_policy": context.options.miss_policy,
    }


def _layer(layer: PlacedExperts) -> dict[str, Any]:
    current = layer.placement.current
    hits, uses = layer.statistics.hits(layer.placement.tables(layer.context.device))
    return {
        "layer": layer.layer_idx,
        "device_experts": list(current.experts),
        "capacity": current.capacity,
        "version": current.version,
        "hit_rate": _ratio(hits, uses),
        "hits": hits,
        "uses": uses,
        "expert_uses": layer.statistics.totals().tolist(),
    }


def _deferred(layer: PlacedExperts) -> int:
    return 0 if layer.wrapper is None else layer.wrapper.max_deferred_experts_per_token


def _share(layers: Sequence[PlacedExperts]) -> dict[str, int] | None:
    """What this rank's CPU computes of every expert, in rows; None = nothing."""
    share = next((layer.wrapper.share for layer in layers if layer.wrapper is not None), None)
    return None if share is None else asdict(share)


def _cpu(layers: Sequence[PlacedExperts]) -> dict[str, Any]:
    """Summed over the engines of the layers, normally one."""
    engines = {layer.wrapper.cpu_infer for layer in layers if layer.wrapper is not None}
    stats = [engine.stats() for engine in engines]
    seconds, bytes_read = (sum(entry[name] for entry in stats) for name in ("seconds", "bytes"))
    return {
        "calls": sum(entry["calls"] for entry in stats),
        "seconds": seconds,
        "bytes": bytes_read,
        "gb_per_s": _ratio(bytes_read / 1e9, seconds),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
