"""What is read of the machine must be what this process may use; a stand-in for nvidia-smi names GPUs."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from kt_kernel import kt_kernel_ext, usable_memory
from kt_kernel.machine_limits import MEASUREMENTS, Limits, best_of, keep_limits, known_limits, limits_file
from kt_kernel.planning import this_machine
from kt_kernel.planning.machine_facts import Gpu

KEY = {"cpu": "a CPU", "variant": "avx2", "threads": 4, "nodes": 1}
ANSWER = (
    "0, NVIDIA GeForce RTX 4090, 24564, 24100, 4, 16, 8.9\\n1, NVIDIA H20, 97871, 97000, [N/A], [N/A], 9.0\\n"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With an nvidia-smi that knows two GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '{ANSWER}'\n")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}"}


def test_gpus_are_read_with_what_nvidia_smi_does_not_know_left_open(environment):
    first, second = this_machine.visible_gpus(environment)
    assert first == Gpu(0, "NVIDIA GeForce RTX 4090", 24564 << 20, 24100 << 20, 4, 16, (8, 9))
    assert first.bus_bytes_per_second == pytest.approx(25.2e9, rel=0.01)
    assert (second.pcie_generation, second.pcie_width, second.known) == (None, None, None)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("1", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("0,-1,1", [0]), ("GPU-abc", [0, 1])],
)
def test_cuda_visible_devices_counts(environment, visible, indices):
    found = this_machine.visible_gpus(environment | {"CUDA_VISIBLE_DEVICES": visible})
    assert [gpu.index for gpu in found] == indices


def test_part_of_a_gpus_name_is_no_longer_number():
    names = ["NVIDIA A100-SXM4-80GB", "NVIDIA RTX A1000", "NVIDIA L40S", "NVIDIA GeForce RTX 4070 Ti"]
    known = [Gpu(0, name, 1 << 30, 1 << 30).known is not None for name in names]
    assert known == [True, False, True, True]


def test_failing_nvidia_smi_means_no_gpu(environment, tmp_path):
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert this_machine.visible_gpus(environment) == []


def test_cpu_installation_plans_without_the_gpu(environment, monkeypatch):
    limits = Limits(1e9, 1e9, 1e9)
    monkeypatch.setattr(this_machine, "measure", lambda native, threads: limits)
    facts, _ = this_machine.machine_facts(kt_kernel_ext, environment | {this_machine.CPU_ONLY: "1"})
    assert facts.gpus == ()
    assert len(this_machine.machine_facts(kt_kernel_ext, environment)[0].gpus) == 2
    assert facts.threads <= len(os.sched_getaffinity(0))
    assert 0 < facts.available_bytes <= facts.memory_bytes


def test_control_group_bounds_memory(tmp_path, monkeypatch):
    group = tmp_path / "groups" / "inner"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000000000\n")
    (group / "memory.current").write_text("600000000\n")
    (group / "memory.stat").write_text("anon 1\nactive_file 50000000\ninactive_file 150000000\n")
    (group.parent / "memory.max").write_text("max\n")
    monkeypatch.setattr(usable_memory, "_own_groups", lambda: iter([group, group.parent]))
    total, available = usable_memory.usable_memory()
    assert total == 1_000_000_000
    assert available == 600_000_000  # what files take can be dropped


def test_first_runs_measure_and_the_best_counts(monkeypatch):
    rates = iter([Limits(5e9, 9e9, 1e9), Limits(7e9, 2e9, 3e9), Limits(6e9, 4e9, 2e9)])
    monkeypatch.setattr(this_machine, "measure", lambda native, threads: next(rates))
    for _ in range(MEASUREMENTS + 2):
        facts, measurements = this_machine.machine_facts(kt_kernel_ext, {"PATH": ""})
        this_machine.keep_machine(facts, measurements)
    assert measurements == MEASUREMENTS
    assert facts.limits == Limits(7e9, 9e9, 3e9)


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"limits": {"read": 1}, "measurements": 3})])
def test_damaged_cache_is_measured_again(content):
    keep_limits(KEY, Limits(1e9, 1e9, 1e9), 3)
    limits_file(KEY).write_text(content)
    assert known_limits(KEY) == (None, 0)


def test_limits_of_another_cpu_or_thread_count_do_not_count():
    keep_limits(KEY, Limits(1e9, 1e9, 1e9), 3)
    assert known_limits(KEY)[1] == 3
    assert known_limits(KEY | {"threads": 2}) == (None, 0)
    assert best_of(None, Limits(1, 2, 3)) == Limits(1, 2, 3)


def test_real_measurement_has_all_limits():
    measured = this_machine.measure(kt_kernel_ext, 1)
    assert all(value > 0 for value in dataclasses.asdict(measured).values() if value is not False)
