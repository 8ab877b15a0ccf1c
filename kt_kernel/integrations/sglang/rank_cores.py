"""The cores of one rank: with several ranks on a host, each has its part of them, and its experts there.

A rank that computes a share of the CPU's experts is bound to its cores, in node order, so that two ranks of a
host with two NUMA nodes have one each: threads, and with them the memory of the weights, are on that node.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from kt_kernel import kt_kernel_ext
from kt_kernel.cores import bind, parsed_cores
from kt_kernel.errors import ConfigurationError
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.integrations.sglang.settings import KTSettings
from kt_kernel.threads import ThreadPlan, cores_of_processes, usable_nodes

CORES_OF_RANKS = "SGLANG_CPU_OMP_THREADS_BIND"  # SGLang's: "0-3|4-7"
_ALL = "all"  # SGLang's own way of saying nothing


@dataclass(frozen=True)
class RanksHere:
    """Which of this host's ranks a process is: `index` of `count`; `hosts` of one tensor-parallel group."""

    index: int
    count: int
    hosts: int

    @classmethod
    def of(cls, parallel: Any) -> RanksHere:
        """`parallel`: SGLang's, or any object with its sizes, ranks and number of nodes."""
        stages = max(parallel.pp_size // parallel.nnodes, 1)
        hosts = max(parallel.nnodes // parallel.pp_size, 1)
        ranks = parallel.tp_size // hosts
        stage = parallel.pp_rank % stages if stages > 1 else 0  # not known where there are no stages
        return cls(stage * ranks + parallel.tp_rank % ranks, stages * ranks, hosts)


def ranks_of_a_host(options: Any) -> int:
    """`options`: SGLang's."""
    return max(1, options.dp_size * options.tp_size * options.pp_size // options.nnodes)


@lru_cache
def options_of_rank(settings: KTSettings) -> ExpertOptions:
    """The settings' options with the threads of this process alone, which is bound to its cores at the first
    call. The host's where it computes the experts of all ranks.
    """
    from sglang.srt.runtime_context import get_parallel

    here = RanksHere.of(get_parallel())
    if here.count == 1 or not settings.shares_experts:
        return settings.options
    _bind_once(here)
    nodes = usable_nodes(kt_kernel_ext.topology())
    part = part_of_threads(threads_of(settings.options), here.count, nodes)
    return replace(
        settings.options, cpuinfer=part.threads, threadpool_count=part.pools, numa_nodes=part.numa_nodes
    )


def threads_of(options: ExpertOptions) -> ThreadPlan:
    """Of options with threads."""
    assert options.cpuinfer is not None and options.threadpool_count is not None
    return ThreadPlan(options.cpuinfer, options.threadpool_count, options.numa_nodes)


@lru_cache
def _bind_once(here: RanksHere) -> None:
    bind(_cores_of(here))


def _cores_of(here: RanksHere) -> list[int]:
    said = os.environ.get(CORES_OF_RANKS)
    if said and said != _ALL:
        try:
            return parsed_cores(said.split("|")[here.index])
        except (ValueError, IndexError):
            raise ConfigurationError(
                f"{CORES_OF_RANKS} is {said!r}, expected the cores of each of the {here.count} ranks of this "
                'host, such as "0-3|4-7".'
            ) from None
    return cores_of_processes(kt_kernel_ext.topology(), here.count)[here.index]


def part_of_threads(host: ThreadPlan, ranks: int, nodes: Sequence[int]) -> ThreadPlan:
    """One of `ranks` equal parts of the host's threads, in pools on those of its nodes that are `nodes`."""
    threads = max(1, host.threads // ranks)
    if host.numa_nodes is None:
        return ThreadPlan(threads, max(1, host.pools // ranks), None)
    pools = tuple(node for node in host.numa_nodes if node in nodes)[:threads] or tuple(nodes[:1])
    return ThreadPlan(threads, len(pools), pools)
