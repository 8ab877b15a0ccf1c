"""Risk: converting a model needs memory for more than a layer or two of it."""

from __future__ import annotations

import json
import subprocess
import sys

import checkpoints
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

EXPERTS, HIDDEN, INTERMEDIATE, LAYERS = 16, 1024, 1024, 3

# Peak of the process's resident memory above what it was before, in bytes; the first conversion, of a small
# input, loads what is loaded only once.
_PROGRAM = """
import json, sys
from pathlib import Path
from kt_kernel.convert.job import Conversion, convert
from kt_kernel.convert.targets import target

def status(key):
    return int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0]) * 1024

small, source, output, method = sys.argv[1:]
convert(Conversion(Path(small), Path(output) / "small-output", target(method, 0), 4))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
convert(Conversion(Path(source), Path(output) / "large-output", target(method, 0), 4))
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.parametrize("layout", ["one by one", "packed"])
def test_peak_memory_is_below_two_and_a_half_layers(tmp_path, layout):
    checkpoints.write_checkpoint(tmp_path / "small", checkpoints.stored_bf16)
    source = tmp_path / "in"
    source.mkdir()
    weights = torch.from_numpy(np.random.default_rng(1).normal(0, 1, 3 * INTERMEDIATE * HIDDEN)).bfloat16()
    for layer in range(LAYERS):
        base = f"model.layers.{layer}.mlp.experts"
        gate, up, down = weights.view(3, INTERMEDIATE, HIDDEN)
        if layout == "packed":
            tensors = {
                f"{base}.gate_up_proj": torch.cat((gate, up)).repeat(EXPERTS, 1, 1),
                f"{base}.down_proj": down.repeat(EXPERTS, 1, 1),
            }
        else:
            names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            tensors = {
                f"{base}.{expert}.{name}.weight": matrix.clone()
                for expert in range(EXPERTS)
                for name, matrix in names.items()
            }
        save_file(tensors, source / f"model-{layer}.safetensors")
    layer_bytes = EXPERTS * weights.nbytes
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, tmp_path / "small", source, tmp_path, "int8"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout) / layer_bytes
    print(f"{peak:.2f} layers")
    assert 0 <= peak < 2.5
