"""The figures that a scheduler adds to the report of its experts, gathered when somebody asks."""

from __future__ import annotations

import time
from typing import Any

from kt_kernel.integrations.sglang.served_model import ServedModel
from kt_kernel.integrations.sglang.status import metrics
from kt_kernel.integrations.sglang.status.machine import machine_use
from kt_kernel.integrations.sglang.status.tokens import COUNTS


def figures(served: ServedModel, scheduler: Any) -> dict[str, Any]:
    """`time` (seconds, of a clock that only advances) lets two readings be compared, whenever they came."""
    options = served.settings.options
    return {
        "time": time.monotonic(),
        "method": options.method,
        "tokens": {"prompt": COUNTS.prompt, "cached": COUNTS.cached, "output": COUNTS.output},
        "requests": {
            "running": len(scheduler.running_batch.reqs),
            "waiting": len(scheduler.waiting_queue),
        },
        "machine": machine_use(served.hybrid.device, options.cpuinfer),
    }


def publish(report: dict[str, Any]) -> None:
    """To Prometheus, where the server keeps metrics at all."""
    from sglang.srt.runtime_context import get_observability

    if get_observability().enable_metrics:
        metrics.default_metrics().update(report)
