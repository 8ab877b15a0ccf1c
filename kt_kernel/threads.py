"""Which threads compute: one decision for the command line, the server and transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kt_kernel.errors import ConfigurationError

# The name of an option -> how whoever gives it spells it, for the sentences of errors.
Spelling = Callable[[str], str]


@dataclass(frozen=True)
class ThreadPlan:
    """`threads` in total, shared out over `pools`. `numa_nodes`: the node of each pool, None = the usable
    ones in turn.
    """

    threads: int
    pools: int
    numa_nodes: tuple[int, ...] | None


def plan_threads(
    topology: Mapping[str, Any],
    threads: int | None = None,
    pools: int | None = None,
    numa_nodes: Sequence[int] | None = None,
    spelled: Spelling = str,
) -> ThreadPlan:
    """What was asked for, and the machine's own numbers where nothing was (None).

    `topology` is the extension's: what this process may use. The threads are one per usable core, at least
    one per pool; the pools are one per NUMA node with cores. `spelled`: of `cpuinfer`, `threadpool_count`
    and `numa_nodes`. Raises ConfigurationError for what cannot work, also on this machine.
    """
    check_thread_request(threads, pools, numa_nodes, spelled)
    present = usable_nodes(topology)
    absent = [node for node in numa_nodes or () if node not in present]
    if absent:
        raise ConfigurationError(
            f"{spelled('numa_nodes')} names node {absent[0]}, but this process may use the nodes "
            f"{list(present)}; choose from these."
        )
    if numa_nodes is None and pools is None:
        numa_nodes = present
    pools = pools or len(numa_nodes)
    if threads is None:
        threads = max(usable_cores(topology), pools)
    if pools > threads:
        raise ConfigurationError(
            f"{pools} thread pools need as many threads, but there are {threads}; set "
            f"{spelled('threadpool_count')} lower or {spelled('cpuinfer')} higher."
        )
    return ThreadPlan(threads, pools, None if numa_nodes is None else tuple(numa_nodes))


def check_thread_request(
    threads: int | None, pools: int | None, numa_nodes: Sequence[int] | None, spelled: Spelling = str
) -> None:
    """Raise ConfigurationError for what can work on no machine; None = not given."""
    for name, value in (("cpuinfer", threads), ("threadpool_count", pools)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{spelled(name)} is {value}, expected at least 1.")
    if numa_nodes is not None and not numa_nodes:
        raise ConfigurationError(f"{spelled('numa_nodes')} names no node; name one for each pool.")
    if numa_nodes is not None and pools is not None and len(numa_nodes) != pools:
        raise ConfigurationError(
            f"{spelled('numa_nodes')} names {len(numa_nodes)} nodes ({' '.join(map(str, numa_nodes))}), but "
            f"{spelled('threadpool_count')} is {pools}; name one node for each pool."
        )
    if threads is not None and pools is not None and pools > threads:
        raise ConfigurationError(
            f"{spelled('threadpool_count')} is {pools}, more than the {threads} threads of "
            f"{spelled('cpuinfer')}; every pool needs a thread."
        )


def usable_cores(topology: Mapping[str, Any]) -> int:
    """Physical cores, or fewer where a control group grants less of their time.

    One thread per physical core: two threads of a core share the vector units that the kernels saturate.
    """
    cores = max(1, topology["physical_cores"])
    quota = topology["cpu_quota"]
    return cores if quota is None else min(cores, max(1, int(quota)))


def cores_of_processes(topology: Mapping[str, Any], processes: int) -> list[list[int]]:
    """The first hardware thread of each core, node by node, in as many equal parts; the cores that are left
    over are nobody's. All cores for all where there are fewer than processes.
    """
    cores = [core for node in topology["numa_nodes"] for core in node["cores"]]
    share = len(cores) // processes
    return [cores[part * share : (part + 1) * share] or cores for part in range(processes)]


def usable_nodes(topology: Mapping[str, Any]) -> tuple[int, ...]:
    """The NUMA nodes that have cores for this process."""
    return tuple(node["node"] for node in topology["numa_nodes"] if node["cores"])
