"""The figures that a scheduler adds to the report of its experts, gathered when somebody asks."""

from __future__ import annotations

import logging
import time
from typing import Any

from kt_kernel.integrations.sglang.served_model import ServedModel
from kt_kernel.integrations.sglang.status import metrics
from kt_kernel.integrations.sglang.status.machine import machine_use
from kt_kernel.integrations.sglang.status.tokens import COUNTS

logger = logging.getLogger(__name__)


def add_figures(report: dict[str, Any], served: ServedModel, scheduler: Any) -> dict[str, Any]:
    """`report` with them, and published. Without them where something fails: the scheduler must live on."""
    try:
        whole = report | figures(served, scheduler)
        publish(whole)
    except Exception as error:
        logger.warning("the status page has no figures: %s: %s", type(error).__name__, error)
        return report
    return whole


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
    """To Prometheus, where the server keeps metrics at all.

    /metrics adds up over processes: what all ranks of a model know comes from the first one.
    """
    from sglang.srt.runtime_context import get_observability, get_parallel

    if get_observability().enable_metrics:
        parallel = get_parallel()
        is_first = parallel.tp_rank == parallel.pp_rank == 0
        metrics.default_metrics().update(report, metrics.METRICS if is_first else metrics.OF_EACH_RANK)
