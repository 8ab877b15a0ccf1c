"""Memory of loading: the weights as large as in the file, and at most one more layer on the way there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from format_support import GPTQ_CONFIG, METHODS, random_bits, save

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 4, 8, 2048, 1024

# A layer's memory is rounded up to huge pages: nothing for real layers, a few percent of these.
ROUNDING_BYTES = LAYERS * (2 << 20)

# Runs alone, so that nothing else allocates. RLIMIT_DATA bounds all anonymous memory, resident or not, so a
# load that needs more at any moment fails.
_LOADER = """
import json, resource, sys
import torch
from kt_kernel import KTMoEWrapper

path, layers, one_layer, rounding = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

def layer(**changes):
    arguments = dict(
        layer_idx=0, num_experts=8, num_experts_per_tok=2, hidden_size=2048, moe_intermediate_size=1024,
        cpuinfer_threads=2, threadpool_count=1, weight_path=path, chunked_prefill_size=16, method="AUTO",
    )
    return KTMoEWrapper(**{**arguments, **changes})

def loaded(layer_idx):
    wrapper = layer(layer_idx=layer_idx)
    wrapper.load_weights()
    return wrapper

# Threads, modules and the reader exist before the count begins.
first = layer(num_experts=2, hidden_size=64, moe_intermediate_size=64)
first.load_weights_from_tensors(*(torch.zeros(2, 64, 64, dtype=torch.bfloat16) for _ in range(3)))
before = status("RssAnon")
limit = status("VmData") + int(1.03 * layers * one_layer) + one_layer + rounding
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
wrappers = [loaded(layer_idx) for layer_idx in range(layers)]
print(json.dumps({"method": wrappers[0].method, "anonymous": status("RssAnon") - before}))
"""


def _write_checkpoint(directory: Path, method: str) -> int:
    """Returns the bytes of one layer."""
    tensors = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for name, n, k in (
                ("gate_proj", INTERMEDIATE, HIDDEN),
                ("up_proj", INTERMEDIATE, HIDDEN),
                ("down_proj", HIDDEN, INTERMEDIATE),
            ):
                for suffix, tensor in random_bits(method, n, k, group_size=128).items():
                    tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}.{suffix}"] = tensor
    config = {"quantization_config": {**GPTQ_CONFIG, "group_size": 128}} if method == "GPTQ_INT4" else None
    save(directory, method, tensors, config)
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) // LAYERS


@pytest.mark.parametrize("method", METHODS)
def test_memory_after_and_during_loading(tmp_path, method):
    torch.manual_seed(0)
    one_layer = _write_checkpoint(tmp_path / "model", method)
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, tmp_path / "model", str(LAYERS), str(one_layer), str(ROUNDING_BYTES)],
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, f"more than the weights and one layer was needed: {done.stderr}"
    result = json.loads(done.stdout)
    assert result["method"] == method
    assert result["anonymous"] <= 1.03 * LAYERS * one_layer + ROUNDING_BYTES, (
        f"{result['anonymous'] / (LAYERS * one_layer):.3f} bytes per byte of the file"
    )
