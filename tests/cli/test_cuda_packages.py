"""The packages of tests/cuda-packages.lock: tests find them without a GPU, and nothing else does."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import cuda_packages
import pytest
from cuda_packages import cuda_package, environment_with_triton


@pytest.mark.parametrize("name", ["triton", "cudart12", "cudart13"])
def test_packages_of_cuda_are_installed(name):
    assert any(cuda_package(name).iterdir())


def test_missing_package_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_packages, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cudart13.*run \./install\.sh test"):
        cuda_package("cudart13")


def test_kernel_of_triton_runs_in_its_interpreter(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        """
import torch, triton
import triton.language as tl

@triton.jit
def twice(values, count: tl.constexpr):
    place = tl.arange(0, count)
    tl.store(values + place, tl.load(values + place) * 2)

values = torch.arange(8)
twice[(1,)](values, 8)
print(values.tolist())
"""
    )
    done = subprocess.run(
        [sys.executable, program],
        env=environment_with_triton(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.stdout.strip() == "[0, 2, 4, 6, 8, 10, 12, 14]", done.stderr


def test_triton_is_out_of_sight_of_the_environment():
    """SGLang's CPU serving is chosen by its absence; a GPU's environment has it of its own."""
    import torch

    if torch.version.cuda is None:
        found = importlib.util.find_spec("triton")
        assert found is None or "kt-cuda" not in str(found.origin)
