"""How many threads compute: all three ways to start agree, and respect a control group's quota."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kt_kernel import kt_kernel_ext
from kt_kernel.cli.machine import this_machine
from kt_kernel.errors import ConfigurationError
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


def serving(**asked: object) -> ExpertOptions:
    return make_settings(KTFlags(weight_path="w", **asked), LAYOUT, max_tokens=64).options


def transformers(**asked: object) -> ExpertOptions:
    return ExpertOptions(weight_path="w", **asked).with_threads()


INTEGRATIONS = pytest.mark.parametrize("start", [serving, transformers])


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
    for options in (serving(), transformers()):
        assert (options.cpuinfer, options.threadpool_count, options.numa_nodes) == (
            threads,
            len(nodes),
            nodes,
        )
    command_line = this_machine()
    assert (command_line.threads, tuple(command_line.numa_nodes)) == (threads, nodes)


@INTEGRATIONS
@pytest.mark.parametrize(
    ("asked", "planned"),
    [
        ({"cpuinfer": 16, "threadpool_count": 4}, (16, 4, None)),
        ({"cpuinfer": 16}, (16, 2, (0, 1))),
        ({"threadpool_count": 3}, (3, 3, None)),  # the quota is 2
        ({"numa_nodes": (1,)}, (2, 1, (1,))),
        ({"numa_nodes": (1, 1, 0)}, (3, 3, (1, 1, 0))),
    ],
)
def test_what_is_asked_for_is_not_limited_and_fills_the_rest(monkeypatch, start, asked, planned):
    monkeypatch.setattr(kt_kernel_ext, "topology", lambda: machine(64, 2.0, {0: 32, 1: 32}))
    options = start(**asked)
    assert (options.cpuinfer, options.threadpool_count, options.numa_nodes) == planned


@INTEGRATIONS
@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"cpuinfer": 0}, "cpuinfer is 0, expected at least 1"),
        ({"threadpool_count": 0}, "threadpool.count is 0, expected at least 1"),
        ({"numa_nodes": ()}, "numa.nodes names no node"),
        ({"numa_nodes": (0, 2)}, r"numa.nodes names node 2, but this process may use the nodes \[0, 1\]"),
        ({"numa_nodes": (0, 1), "threadpool_count": 1}, r"numa.nodes names 2 nodes \(0 1\), but"),
        ({"cpuinfer": 2, "threadpool_count": 3}, "threadpool.count is 3, more than the 2 threads of"),
        # found only once the machine's nodes are known
        (
            {"cpuinfer": 1},
            "2 thread pools need as many threads, but there are 1; set .*threadpool.count lower",
        ),
    ],
)
def test_threads_that_cannot_be_had_are_one_sentence_in_the_users_words(monkeypatch, start, asked, sentence):
    monkeypatch.setattr(kt_kernel_ext, "topology", lambda: machine(64, None, {0: 32, 1: 32}))
    prefix = "--kt-" if start is serving else ""
    with pytest.raises(ConfigurationError, match=sentence) as raised:
        start(**asked)
    assert "\n" not in str(raised.value)
    named = str(raised.value).replace("-", "_")
    assert (prefix.replace("-", "_") + next(iter(asked))) in named or "thread pools need" in named


@INTEGRATIONS
def test_a_ratio_wins_over_a_number_and_a_warning_says_so(monkeypatch, start: Callable, caplog):
    monkeypatch.setattr(kt_kernel_ext, "topology", lambda: machine(2, None, {0: 2}))
    options = start(num_gpu_experts=5, gpu_experts_ratio=0.25)
    options.log_placement()
    assert options.device_experts(LAYOUT) == 2
    assert "overrides" in caplog.records[-1].getMessage()
