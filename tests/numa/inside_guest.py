"""What is looked at inside the machine of two_nodes.py: each check says what it saw, or raises.

python inside_guest.py CORES_OF_NODE_0 CORES_OF_NODE_1
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import traceback
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

import numpy as np
from formats import BF16, Format
from harness import build_layer as layer_of
from harness import ext, random_call, random_experts, run

CORES = tuple(int(word) for word in sys.argv[1:])
PAGE, HUGE_PAGE = 4096, 2 << 20
_MOVE_PAGES = 279  # x86-64
FORMATS = (Format("BF16"), Format("FP8"), Format("RAWINT4", 32, BF16))
# threads, pools, nodes of the pools (none: as they come), threads of each pool
ENGINES = (
    (sum(CORES) - 1, 2, [], None),
    (2, 2, [1, 0], [1, 0]),
    (1, 1, [1], [1]),
)


def topology_is_the_machines() -> str:
    nodes = ext.topology()["numa_nodes"]
    assert [node["node"] for node in nodes] == [0, 1], nodes
    assert tuple(len(node["cores"]) for node in nodes) == CORES, nodes
    assert all(node["memory_bytes"] > 2**28 for node in nodes), nodes
    return f"cores {[node['cores'] for node in nodes]}"


def one_thread_too_many_on_the_smaller_node_is_warned_about() -> str:
    warnings = ext.Engine(2 * (min(CORES) + 1), 2).warnings
    assert any(f"on NUMA node {CORES.index(min(CORES))}" in warning for warning in warnings), warnings
    assert not ext.Engine(2, 2).warnings
    return warnings[0]


def every_worker_is_bound_to_a_core_of_its_pools_node() -> str:
    engine = ext.Engine(sum(CORES) - 1, 2)
    cores = [set(node["cores"]) for node in ext.topology()["numa_nodes"]]
    pools = [pool for pool, threads in enumerate(engine.threads_per_subpool) for _ in range(threads)]
    seen = {}
    for status in Path("/proc/self/task").glob("*/status"):
        text = status.read_text()
        if found := re.match(r"Name:\tkt-worker-(\d+)", text):
            allowed = re.search(r"Cpus_allowed_list:\t(.*)", text)[1]
            seen[int(found[1])] = {int(cpu) for cpu in allowed.split(",")}
    assert sorted(seen) == list(range(1, engine.threads)), seen
    for worker, allowed in seen.items():
        assert allowed <= cores[engine.numa_nodes[pools[worker]]] and len(allowed) == 1, (worker, allowed)
    return f"workers {seen}"


def every_panel_is_on_the_node_of_its_pool() -> str:
    """By numa_maps, and page by page by move_pages."""
    seen = []
    for format in FORMATS:
        for threads, pools, nodes, expected in ENGINES:
            engine = ext.Engine(threads, pools, numa_nodes=nodes)
            assert engine.numa_nodes == (expected or [0, 1]), engine.numa_nodes
            layer = None
            gc.collect()
            ext.release_finished()
            before = _pages_by_policy()
            layer = layer_of(engine, random_experts(1, 8, 512, 384, format))
            pages = _pages_by_policy() - before
            assert all(node == policy for policy, node in pages), pages
            shares = dict.fromkeys(engine.numa_nodes, 0)
            for node, of_pool in zip(engine.numa_nodes, engine.threads_per_subpool, strict=True):
                shares[node] += of_pool / threads
            for node, share in shares.items():
                held, expected_bytes = pages[node, node] * PAGE, share * layer.weight_bytes
                # Panels are whole, and the last page of the memory is a huge one.
                mib = f"{held / 2**20:.1f} of {expected_bytes / 2**20:.1f} MiB"
                seen.append(f"{format}, {threads} threads, node {node}: {mib}")
                least, most = 0.9 * expected_bytes, 1.1 * expected_bytes + HUGE_PAGE
                assert least <= held <= most, (seen, pages, before)
    return "; ".join(seen)


def a_layer_gives_the_same_bits_wherever_its_pools_are() -> str:
    for format in FORMATS:
        experts = random_experts(2, 8, 256, 192, format)
        calls = [random_call(tokens, experts, tokens, top_k=3) for tokens in (1, 5, 40)]
        outputs = [
            [run(layer_of(ext.Engine(threads, pools, numa_nodes=nodes), experts), call) for call in calls]
            for threads, pools, nodes, _ in (*ENGINES, (1, 1, [0], None))
        ]
        for others in outputs[1:]:
            assert all(np.array_equal(one, other) for one, other in zip(outputs[0], others, strict=True))
    return f"{len(FORMATS)} formats, {len(ENGINES) + 1} engines"


def _pages_by_policy() -> Counter[tuple[int, int]]:
    """(preferred node of a mapping, node where a page of it is) -> pages."""
    found: Counter[tuple[int, int]] = Counter()
    ends = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = line.split()[0].split("-")
        ends[int(begin, 16)] = int(end, 16)
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        address, policy, *figures = line.split()
        if not (preferred := re.match(r"prefer[^:]*:(\d+)", policy)):
            continue
        begin = int(address, 16)
        nodes = Counter(_nodes_of_pages(begin, ends[begin]))
        told = {int(node): int(count) for node, count in re.findall(r"\bN(\d+)=(\d+)", " ".join(figures))}
        assert told == dict(nodes), (line, nodes)
        for node, count in nodes.items():
            found[int(preferred[1]), node] += count
    return found


def _nodes_of_pages(begin: int, end: int) -> list[int]:
    """Of the pages that are there."""
    count = (end - begin) // PAGE
    addresses = (ctypes.c_void_p * count)(*range(begin, end, PAGE))
    nodes = (ctypes.c_int * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.syscall(_MOVE_PAGES, 0, ctypes.c_ulong(count), addresses, None, nodes, 0)
    assert failed == 0, ctypes.get_errno()
    return [node for node in nodes if node >= 0]


CHECKS = (
    topology_is_the_machines,
    one_thread_too_many_on_the_smaller_node_is_warned_about,
    every_worker_is_bound_to_a_core_of_its_pools_node,
    every_panel_is_on_the_node_of_its_pool,
    a_layer_gives_the_same_bits_wherever_its_pools_are,
)


def main() -> int:
    failures = 0
    for check in CHECKS:
        try:
            print(f"holds  {check.__name__}: {check()}", flush=True)
        except Exception:
            failures += 1
            print(f"FAILS  {check.__name__}\n{traceback.format_exc()}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
