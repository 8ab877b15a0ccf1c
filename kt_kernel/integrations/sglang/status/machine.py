"""Use of cores, memory and GPUs as this process sees them, and the read bandwidth that they could reach."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import psutil
import torch

from kt_kernel.hybrid.speeds import cpu_name
from kt_kernel.machine_limits import known_limits, limits_key
from kt_kernel.usable_memory import usable_memory

logger = logging.getLogger(__name__)

_IDLE = ("idle", "iowait")
# Contained in `user` and `nice`.
_COUNTED_TWICE = ("guest", "guest_nice")


def machine_use(device: torch.device, threads: int | None) -> dict[str, Any]:
    """As plain values: seconds since the machine's start for cores, bytes for memory, shares for GPUs.

    `device`: the model's. `threads`: those that compute experts.
    """
    busy, idle = core_seconds()
    total, available = usable_memory()
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "read_limit": read_limit(),
        "cores": {"busy_seconds": busy, "idle_seconds": idle},
        "memory": {
            "total": total,
            "available": available,
            "scheduler": psutil.Process().memory_info().rss,
        },
        "gpus": [] if device.type != "cuda" else [gpu for i in range(_gpus()) if (gpu := _gpu(i))],
    }


def core_seconds() -> tuple[float, float]:
    """(busy, idle), summed over the cores that the machine lets this process use, whoever keeps them busy."""
    allowed = os.sched_getaffinity(os.getppid())  # a scheduler binds itself to fewer than its server may use
    busy = idle = 0.0
    for core, times in enumerate(psutil.cpu_times(percpu=True)):
        if core not in allowed:
            continue
        values = times._asdict()
        waiting = sum(values.get(name, 0.0) for name in _IDLE)
        idle += waiting
        busy += sum(values.values()) - waiting - sum(values.get(name, 0.0) for name in _COUNTED_TWICE)
    return busy, idle


@functools.cache
def read_limit() -> float | None:
    """Bytes per second that all threads read at most, as `kt run` has measured; None where it has not."""
    from kt_kernel import kt_kernel_ext
    from kt_kernel.threads import plan_threads

    topology = kt_kernel_ext.topology()
    variant = kt_kernel_ext.cpu_features()["variant"]
    key = limits_key(cpu_name(), variant, plan_threads(topology).threads, len(topology["numa_nodes"]))
    limits, _ = known_limits(key)
    return None if limits is None else limits.read


def _gpus() -> int:
    return torch.cuda.device_count()


def _gpu(index: int) -> dict[str, Any] | None:
    """By the driver's management library alone: a context on another rank's GPU would take memory there."""
    try:
        properties = torch.cuda.get_device_properties(index)
        return {
            "name": properties.name,
            "used": torch.cuda.device_memory_used(index),
            "total": properties.total_memory,
            "busy": torch.cuda.utilization(index) / 100,
        }
    except Exception as error:
        logger.debug("GPU %d tells nothing of its use: %s", index, error)
        return None
