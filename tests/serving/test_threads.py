"""How many threads compute: all three ways to start agree, and respect a control group's quota."""

from __future__ import annotations

import pytest

from kt_kernel import kt_kernel_ext
from kt_kernel.cli.machine import this_machine
from kt_kernel.hybrid.layout import ExpertLayout
from kt_kernel.integrations.sglang.flags import KTFlags
from kt_kernel.integrations.sglang.settings import make_settings
from kt_kernel.integrations.transformers import ExpertOptions

LAYOUT = ExpertLayout(num_layers=1, num_experts=8, moe_layers=(0,))


def machine(cores: int, quota: float | None, nodes: dict[int, int]) -> dict:
    """What the extension says of a machine; `nodes`: the cores of each node."""
    return {
        "physical_cores": cores,
        "cpu_quota": quota,
        "numa_nodes": [{"node": node, "cores": list(range(count))} for node, count in nodes.items()],
    }


@pytest.mark.parametrize(
    ("topology", "threads", "nodes"),
    [
        (machine(64, None, {0: 32, 1: 32}), 64, (0, 1)),
        (machine(64, 8.0, {0: 32, 1: 32}), 8, (0, 1)),
        (machine(64, 0.5, {0: 64}), 1, (0,)),
        # two pools need two threads, whatever the quota
        (machine(64, 1.0, {0: 32, 1: 32}), 2, (0, 1)),
        # a node without cores for us, and a quota above the cores
        (machine(4, 100.0, {0: 0, 3: 4}), 4, (3,)),
    ],
)
def test_a_quota_limits_the_threads_of_every_way_to_start(monkeypatch, topology, threads, nodes):
    monkeypatch.setattr(kt_kernel_ext, "topology", lambda: topology)
    settings = make_settings(KTFlags(weight_path="w"), LAYOUT, max_tokens=64)
    assert (settings.threads, settings.pools, settings.numa_nodes) == (threads, len(nodes), nodes)
    engine = ExpertOptions(weight_path="w").engine()
    assert (engine["cpuinfer_threads"], tuple(engine["numa_nodes"])) == (threads, nodes)
    command_line = this_machine()
    assert (command_line.threads, tuple(command_line.numa_nodes)) == (threads, nodes)


def test_what_is_asked_for_is_not_limited(monkeypatch):
    monkeypatch.setattr(kt_kernel_ext, "topology", lambda: machine(64, 2.0, {0: 32, 1: 32}))
    flags = KTFlags(weight_path="w", cpuinfer=16, threadpool_count=4)
    settings = make_settings(flags, LAYOUT, max_tokens=64)
    assert (settings.threads, settings.pools, settings.numa_nodes) == (16, 4, None)
