"""Which cores a rank has: none of another one, whole nodes where they go round, those of its own host."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kt_kernel.cores import parsed_cores
from kt_kernel.integrations.sglang.rank_cores import RanksHere, part_of_threads, ranks_of_a_host
from kt_kernel.threads import ThreadPlan, cores_of_processes

TWO_NODES = {"numa_nodes": [{"node": 0, "cores": [0, 1, 2, 3]}, {"node": 1, "cores": [4, 5, 6, 7]}]}


@pytest.mark.parametrize(
    ("processes", "cores"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (3, [[0, 1], [2, 3], [4, 5]]),
        (9, [[0, 1, 2, 3, 4, 5, 6, 7]] * 9),
    ],
)
def test_cores_are_shared_out_in_the_order_of_nodes(processes, cores):
    assert cores_of_processes(TWO_NODES, processes) == cores


@pytest.mark.parametrize(
    ("host", "ranks", "nodes", "part"),
    [
        (ThreadPlan(64, 2, (0, 1)), 2, (1,), ThreadPlan(32, 1, (1,))),
        (ThreadPlan(64, 2, (0, 1)), 4, (1,), ThreadPlan(16, 1, (1,))),
        (ThreadPlan(64, 4, (0, 1, 2, 3)), 2, (2, 3), ThreadPlan(32, 2, (2, 3))),
        (ThreadPlan(2, 1, (0,)), 2, (1,), ThreadPlan(1, 1, (1,))),  # asked for another node's pool
        (ThreadPlan(4, 4, None), 2, (0,), ThreadPlan(2, 2, None)),  # more pools than nodes
        (ThreadPlan(1, 1, None), 2, (0,), ThreadPlan(1, 1, None)),
    ],
)
def test_threads_are_shared_out_and_stay_on_the_ranks_nodes(host, ranks, nodes, part):
    assert part_of_threads(host, ranks, nodes) == part


@pytest.mark.parametrize(
    ("sizes", "rank", "here"),
    [
        ((4, 1, 1), (3, 0), RanksHere(3, 4, 1)),  # --tp-size 4
        ((1, 2, 1), (0, 1), RanksHere(1, 2, 1)),  # --pp-size 2
        ((2, 2, 1), (1, 1), RanksHere(3, 4, 1)),
        ((4, 1, 2), (3, 0), RanksHere(1, 2, 2)),  # --tp-size 4 --nnodes 2
        ((2, 2, 2), (1, 1), RanksHere(1, 2, 1)),  # a stage on each host
        ((2, 2, 4), (1, 1), RanksHere(0, 1, 2)),
    ],
)
def test_a_rank_knows_its_place_on_its_host(sizes, rank, here):
    tp_size, pp_size, nnodes = sizes
    parallel = SimpleNamespace(
        tp_size=tp_size, pp_size=pp_size, nnodes=nnodes, tp_rank=rank[0], pp_rank=rank[1]
    )
    assert RanksHere.of(parallel) == here
    options = SimpleNamespace(tp_size=tp_size, pp_size=pp_size, nnodes=nnodes, dp_size=1)
    assert ranks_of_a_host(options) == here.count


def test_numbers_of_cores_are_read_as_sglang_and_the_kernel_write_them():
    assert parsed_cores("0-2,5\n") == [0, 1, 2, 5]


_BOUND = """
import os
from kt_kernel import kt_kernel_ext
from kt_kernel.cores import bind
core = kt_kernel_ext.topology()["numa_nodes"][0]["cores"][-1]
bind([core])
assert core in os.sched_getaffinity(0)
topology = kt_kernel_ext.topology()
assert topology["physical_cores"] == 1 and topology["numa_nodes"][0]["cores"][-1:] == [core]
try:
    kt_kernel_ext.allow_only_cpus([-1])
except ValueError as error:
    assert "was given 1 CPUs" in str(error)
else:
    raise SystemExit("an impossible CPU was accepted")
assert kt_kernel_ext.topology() == topology
"""


def test_a_bound_process_makes_pools_on_its_own_cores_only():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KT_")}
    subprocess.run([sys.executable, "-c", _BOUND], check=True, timeout=120, env=environment)
