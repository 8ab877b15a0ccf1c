"""The figures of a model as plain values, for servers to expose and `kt top` to show."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kt_kernel.hybrid.memory_plan import memory_plan

if TYPE_CHECKING:
    from kt_kernel.hybrid.layer import HybridLayer
    from kt_kernel.hybrid.model import HybridModel


def report(model: HybridModel) -> dict[str, Any]:
    """Where the experts are, how often they were found there, and what was copied and computed.

    Rates are None before there is anything to divide by; `cpu` is that of this process's engine.
    """
    layers = [_layer(layer) for layer in model.layers]
    hits = sum(layer.pop("hits") for layer in layers)
    updates = model.updater.figures
    copied = {
        "update": updates.bytes_copied,
        "prefill": model.prefill.bytes_copied,
        "misses": model.misses.bytes_copied,
    }
    return {
        "layers": layers,
        "experts": sum(layer.num_experts for layer in model.layers),
        "device_experts": sum(len(layer["device_experts"]) for layer in layers),
        "hit_rate": _ratio(hits, sum(layer["uses"] for layer in layers)),
        "updates": updates.updates,
        "experts_moved": updates.experts_moved,
        "bytes_copied": sum(copied.values()),
        "bytes": copied,
        "prefill": {
            "threshold": model.prefill.threshold,
            "chunks": model.prefill.chunks,
            "fallbacks": model.prefill.fallbacks,
        },
        "cpu": _cpu(model),
        "memory": [asdict(row) for row in memory_plan(model)],
        "deferred": max((_deferred(layer) for layer in model.layers), default=0),
        "miss_policy": model.options.miss_policy,
    }


def _layer(layer: HybridLayer) -> dict[str, Any]:
    current = layer.placement.current
    hits, uses = layer.statistics.hits(layer.placement.tables(layer.model.device))
    return {
        "layer": layer.layer_idx,
        "device_experts": list(current.experts),
        "capacity": current.capacity,
        "version": current.version,
        "hit_rate": _ratio(hits, uses),
        "hits": hits,
        "uses": uses,
    }


def _deferred(layer: HybridLayer) -> int:
    return 0 if layer.wrapper is None else layer.wrapper.max_deferred_experts_per_token


def _cpu(model: HybridModel) -> dict[str, Any]:
    """Summed over the engines of the layers, normally one."""
    engines = {layer.wrapper.cpu_infer for layer in model.layers if layer.wrapper is not None}
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
