"""Packages of CUDA that tests use on a machine without a GPU: where ./install.sh test has put them.

tests/cuda-packages.lock lists them and says what each is for. Nothing finds them by itself; a test that needs
triton starts a process of its own:

    subprocess.run([sys.executable, "-c", ...], env=environment_with_triton(TRITON_INTERPRET="1"))
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".venv" / "kt-cuda"


def cuda_package(name: str) -> Path:
    """The folder of a package of tests/cuda-packages.lock: triton, cudart12 or cudart13."""
    folder = FOLDER / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no {folder}, where a package of tests/cuda-packages.lock goes: run ./install.sh test"
        )
    return folder


def environment_with_triton(**variables: str) -> dict[str, str]:
    """Of a process: this one's and `variables`; triton is found there, and SGLang gets no stand-in for it."""
    folders = [str(cuda_package("triton"))]
    if outside := os.environ.get("PYTHONPATH"):
        folders.append(outside)
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders), "KT_SGLANG_CPU_SHIMS": "0"} | variables
