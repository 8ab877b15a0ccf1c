"""Which threads compute: one decision for the command line, the server and transformers' models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ThreadPlan:
    """`threads` in total, shared out over `pools`. `numa_nodes`: the node of each pool, None = the first
    ones.
    """

    threads: int
    pools: int
    numa_nodes: tuple[int, ...] | None


def plan_threads(
    topology: Mapping[str, Any],
    threads: int | None = None,
    pools: int | None = None,
    numa_nodes: Sequence[int] | None = None,
) -> ThreadPlan:
    """What was asked for, and the machine's own numbers where nothing was (None).

    `topology` is the extension's: what this process may use. The threads are one per usable core, at least
    one per pool; the pools are one per NUMA node with cores.
    """
    if numa_nodes is None and pools is None:
        numa_nodes = usable_nodes(topology)
    pools = pools or len(numa_nodes)
    threads = threads or max(usable_cores(topology), pools)
    return ThreadPlan(threads, pools, None if numa_nodes is None else tuple(numa_nodes))


def usable_cores(topology: Mapping[str, Any]) -> int:
    """Physical cores, or fewer where a control group grants less of their time.

    One thread per physical core: two threads of a core share the vector units that the kernels saturate.
    """
    cores = max(1, topology["physical_cores"])
    quota = topology["cpu_quota"]
    return cores if quota is None else min(cores, max(1, int(quota)))


def usable_nodes(topology: Mapping[str, Any]) -> tuple[int, ...]:
    """The NUMA nodes that have cores for this process."""
    return tuple(node["node"] for node in topology["numa_nodes"] if node["cores"])
