"""Risk: a code stands at another place, or is another number, once a tile of weights is turned around for the
backward pass of training (csrc/kernels/transpose_codes.h). The loop that says what is right is in the .cc."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tools import tool

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


def test_every_code_is_found_at_its_new_place(tmp_path):
    program = tmp_path / "transposed_codes"
    command = [tool("c++", "g++", "clang++"), "-std=c++17", "-O2", "-mavx2", "-Wall", "-Wextra", f"-I{CSRC}"]
    sources = [HERE / "transposed_codes.cc", CSRC / "kernels" / "avx2" / "transpose_codes.cc"]
    subprocess.run([*command, "-o", program, *sources], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
