"""bench/hybrid_transformers.py runs without a GPU too, and reads traces right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

from overlap import intersection, overlap_of_trace, union  # noqa: E402


def event(category: str, name: str, stream: int, begin: float, duration: float) -> dict:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": duration,
        "args": {"stream": stream},
    }


def test_overlap_counts_copies_and_the_kernels_beside_them():
    copy = "Memcpy HtoD (Pinned -> Device)"
    trace = [
        event("gpu_memcpy", copy, 7, 0, 100),
        event("gpu_memcpy", copy, 7, 100, 100),
        event("kernel", "decode", 7, 200, 50),  # behind its copy: not what the layer computes
        event("kernel", "gemm", 0, 150, 100),
        event("kernel", "softmax", 0, 240, 20),  # runs beside gemm: counted once
        event("gpu_memcpy", "Memcpy DtoD", 0, 0, 1000),
        event("cpu_op", "aten::mm", 0, 0, 1000),
        {"ph": "i", "name": "mark", "ts": 0},
    ]
    measured = overlap_of_trace({"traceEvents": trace})
    assert measured.copying == pytest.approx(200e-6)
    assert measured.computing == pytest.approx(110e-6)
    assert measured.both == pytest.approx(50e-6)
    assert measured.share == pytest.approx(50 / 110)


def test_overlap_of_nothing_is_none():
    assert overlap_of_trace({"traceEvents": []}).share is None


def test_intervals_are_joined_and_cut():
    joined = union([(5, 6), (0, 2), (1, 3)])
    assert joined == [(0, 3), (5, 6)]
    assert intersection(joined, [(2, 5.5)]) == [(2, 3), (5, 5.5)]
    assert intersection(joined, []) == []


def test_program_runs_on_a_cpu_and_its_tokens_agree(tmp_path):
    command = [sys.executable, ROOT / "bench/hybrid_transformers.py", "--device", "cpu", "--small", "--json"]
    command += ["--threads", "2", "--checkpoint", tmp_path / "model"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    assert Counter(row["part"] for row in rows) == {"equality": 3, "graph": 3, "overlap": 1, "curve": 2}
    for row in rows:
        if row["part"] == "equality":
            assert row["agreeing"] >= 0.99 and row["mean_delta_logprob"] <= 0.02, row
            assert row["same_tokens"] == row["tokens"], row
