"""The figures of the page as Prometheus metrics.

They are written in the scheduler's process into files that SGLang's /metrics adds up over all processes: a
second scheduler (data parallelism) counts beside the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]
# (label's value or None, number)
Samples = Iterator[tuple[str | None, float | None]]


@dataclass(frozen=True)
class Metric:
    """A counter if its name ends in `_total`, as Prometheus wants it, else a gauge."""

    name: str
    help: str
    samples: Callable[[Report], Samples]
    label: str | None = None


def _one(*path: str) -> Callable[[Report], Samples]:
    def samples(report: Report) -> Samples:
        value: Any = report
        for name in path:
            value = value[name]
        yield None, value

    return samples


def _uses(report: Report) -> Samples:
    yield None, sum(layer["uses"] for layer in report["layers"])


def _hits(report: Report) -> Samples:
    yield None, sum(round(layer["uses"] * (layer["hit_rate"] or 0)) for layer in report["layers"])


def _copied(report: Report) -> Samples:
    yield from report["bytes"].items()


def _cores(report: Report) -> Samples:
    cores = report["machine"]["cores"]
    yield "busy", cores["busy_seconds"]
    yield "idle", cores["idle_seconds"]


def _gpus(figure: str) -> Callable[[Report], Samples]:
    def samples(report: Report) -> Samples:
        for index, gpu in enumerate(report["machine"]["gpus"]):
            yield str(index), gpu[figure]

    return samples


# Each rank has its own.
OF_EACH_RANK = (
    Metric("kt_cpu_calls_total", "Calls of the CPU's experts", _one("cpu", "calls")),
    Metric("kt_cpu_seconds_total", "Seconds in which the CPU's experts computed", _one("cpu", "seconds")),
    Metric("kt_cpu_read_bytes_total", "Bytes of weights that they read", _one("cpu", "bytes")),
)

METRICS = (
    *OF_EACH_RANK,
    Metric(
        "kt_cpu_read_limit_bytes_per_second",
        "Bytes per second that the CPU reads at most, as measured",
        _one("machine", "read_limit"),
    ),
    Metric("kt_experts", "Experts of all layers", _one("experts")),
    Metric("kt_device_experts", "Experts that are on the device", _one("device_experts")),
    Metric("kt_expert_uses_total", "Experts that tokens were sent to", _uses),
    Metric("kt_expert_hits_total", "Those among them that were on the device", _hits),
    Metric("kt_experts_moved_total", "Experts that changed places", _one("experts_moved")),
    Metric("kt_copied_bytes_total", "Bytes of experts copied to the device", _copied, "purpose"),
    Metric("kt_prompt_tokens_total", "Tokens of prompts that were computed", _one("tokens", "prompt")),
    Metric("kt_cached_tokens_total", "Tokens of prompts found in the prefix cache", _one("tokens", "cached")),
    Metric("kt_output_tokens_total", "Tokens written", _one("tokens", "output")),
    Metric(
        "kt_memory_total_bytes", "Main memory that the server may use", _one("machine", "memory", "total")
    ),
    Metric("kt_memory_available_bytes", "What is left of it", _one("machine", "memory", "available")),
    Metric("kt_core_seconds_total", "Seconds of the cores since the machine's start", _cores, "state"),
    Metric("kt_gpu_busy_ratio", "Share of time in which a GPU computes", _gpus("busy"), "gpu"),
    Metric("kt_gpu_memory_used_bytes", "Memory of a GPU that is taken", _gpus("used"), "gpu"),
)


class StatusMetrics:
    """`METRICS` in `registry`, brought up to date by `update`."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self._before: dict[tuple[str, str | None], float] = {}
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            if metric.name.endswith("_total"):
                self._of(metric)

    def _of(self, metric: Metric) -> Any:
        """Gauges are made with their first value: one without would be shown as 0, which a limit is not."""
        from prometheus_client import Counter, Gauge

        if metric.name in self._metrics:
            return self._metrics[metric.name]
        labels = [metric.label] if metric.label else []
        if metric.name.endswith("_total"):
            made = Counter(metric.name, metric.help, labels, registry=self._registry)
        else:
            made = Gauge(
                metric.name, metric.help, labels, registry=self._registry, multiprocess_mode="mostrecent"
            )
        return self._metrics.setdefault(metric.name, made)

    def update(self, report: Report, metrics: Sequence[Metric] = METRICS) -> None:
        """Figures of `metrics` that are None stay away. Counters never go back: what was counted anew
        (`forget`) adds nothing until it has passed what was known.
        """
        for metric in metrics:
            for label, value in metric.samples(report):
                if value is not None:
                    self._set(metric, label, value)

    def _set(self, metric: Metric, label: str | None, value: float) -> None:
        child = self._of(metric)
        if label is not None:
            child = child.labels(label)
        if not metric.name.endswith("_total"):
            child.set(value)
            return
        key = (metric.name, label)
        before = self._before.get(key, 0.0)
        if value > before:
            child.inc(value - before)
            self._before[key] = value


@functools.cache
def default_metrics() -> StatusMetrics:
    """Those of this process, in the registry that SGLang's /metrics reads."""
    from prometheus_client import REGISTRY

    return StatusMetrics(REGISTRY)
