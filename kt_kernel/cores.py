"""The cores that one process of several on a host computes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from kt_kernel import kt_kernel_ext

logger = logging.getLogger(__name__)


def bind(cores: Sequence[int]) -> None:
    """This thread and all that it will start run on these cores, on any of their hardware threads."""
    cpus = {cpu for core in cores for cpu in _siblings(core)} & os.sched_getaffinity(0)
    if not cpus:
        logger.warning("this rank's cores %s are not for this process: it is not bound to them", list(cores))
        return
    os.sched_setaffinity(0, cpus)
    kt_kernel_ext.allow_only_cpus(sorted(cpus))
    logger.info("kt-kernel: this rank computes on the CPUs %s", ",".join(map(str, sorted(cpus))))


def _siblings(cpu: int) -> set[int]:
    """The hardware threads of its core."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return {cpu}
    return set(parsed_cores(text))


def parsed_cores(text: str) -> list[int]:
    """The numbers of "0-2,5"."""
    cores: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.extend(range(int(first), int(last or first) + 1))
    return cores
