"""Risks of the compute threads (csrc/core/thread_pool.h): a job ends before its pieces do, a late worker
computes for a job that is over, one that stands still holds up the others, results depend on who was busy.

The scenes are in thread_pools.cc; scripts/sanitize.sh runs them under sanitizers.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import F32, arguments, build_layer, ext, poisoned, random_call, random_experts
from tools import tool

HERE = Path(__file__).parent
CORE = HERE.parents[1] / "csrc" / "core"
SCENES = ("every_piece_once", "threads_stopped_anywhere", "late_workers", "exceptions", "call_from_a_piece")
SECONDS_WITH_NEIGHBOURS = 2.0


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("thread_pools") / "thread_pools"
    command = [tool("c++", "g++", "clang++"), "-std=c++17", "-O1", "-Wall", "-Wextra", "-pthread"]
    sources = [
        HERE / "thread_pools.cc",
        CORE / "thread_pool.cc",
        CORE / "worker_placement.cc",
        CORE / "fault.cc",
    ]
    subprocess.run([*command, f"-I{CORE.parent}", "-o", program, *sources], check=True)
    return program


@pytest.mark.parametrize("scene", SCENES)
def test_jobs_end_when_their_pieces_do(scene, scenes):
    done = subprocess.run([scenes, scene], capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr


def test_busy_neighbours_do_not_change_a_result():
    experts = random_experts(1, 8, 320, 192)
    layers = [build_layer(engine, experts) for engine in (ext.Engine(2), ext.Engine(3, 2))]
    calls = [random_call(seed, experts, tokens, top_k=4) for seed, tokens in enumerate((1, 3, 40))]

    def outputs() -> list[np.ndarray]:
        results = []
        for layer in layers:
            for call in calls:
                results.append(poisoned(call.hidden.shape, F32))
                layer.forward(*arguments(call, results[-1], F32))
        return results

    quiet = outputs()
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        end = time.monotonic() + SECONDS_WITH_NEIGHBOURS
        while time.monotonic() < end:
            for with_neighbours, alone in zip(outputs(), quiet, strict=True):
                np.testing.assert_array_equal(with_neighbours, alone)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
