"""Runs in an interpreter of its own, with SGLang: loads checkpoints as a server does, twice each, with
quantised layers kept as they are and with all of them decoded, and compares layer by layer.

Arguments: a free port, then NAME=MODEL of each checkpoint. Standard output: one JSON line per checkpoint: its
name, the formats of each kept layer, and the error of the worst one.
"""

import json
import sys

import torch
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

load_plugins()

from sglang.srt import runtime_context  # noqa: E402
from sglang.srt.configs.device_config import DeviceConfig  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed import bootstrap  # noqa: E402
from sglang.srt.layers.linear import LinearBase  # noqa: E402
from sglang.srt.layers.moe.utils import initialize_moe_config  # noqa: E402
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402
from sglang.srt.model_loader import get_model  # noqa: E402

from kt_kernel import operators  # noqa: E402
from kt_kernel.engine import get_engine  # noqa: E402
from kt_kernel.integrations.sglang import kept_layers  # noqa: E402

TOKENS = 5
_EVERY_16_BITS = kept_layers._DTYPES


def load(folder, port):
    """The model, as a server's scheduler loads it."""
    options = ["--model", folder, "--kt-weight-path", folder, "--kt-cpuinfer", "2", "--dtype", "bfloat16"]
    server_args = prepare_server_args([*options, "--kt-threadpool-count", "1", "--device", "cpu"])
    ranks = runtime_context.SpawnRanks(world_rank=0, dp_rank=0, gpu_id=0)
    runtime_context.publish(server_args, role="scheduler", ranks=ranks)
    if not bootstrap._PARALLEL_INITIALISED:
        bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=port)
    initialize_moe_config()
    model_config = ModelConfig.from_server_args(server_args)
    bootstrap.init_layer_runtime(model_config=model_config)
    return get_model(
        model_config=model_config, load_config=LoadConfig(), device_config=DeviceConfig(device="cpu")
    )


def difference(kept, decoded):
    """Of what the two layers make of the same random tokens, relative to the length of a row."""
    rows, columns = kept.weight.shape
    x = torch.randn(TOKENS, columns, dtype=torch.bfloat16)
    expected = x.double() @ decoded.weight[:rows].double().T
    got = torch.ops.sgl_kernel.weight_packed_linear(x, kept.weight, None, True).double()
    return ((got - expected).norm() / expected.norm()).item()


def compare(folder, port):
    with torch.no_grad():
        kept_layers._DTYPES = ()
        decoded = load(folder, port)
        kept_layers._DTYPES = _EVERY_16_BITS
        kept = load(folder, port)
        formats = kept_layers.kept_layers(of_draft_model=False).formats()
        worst, others = 0.0, dict(decoded.named_modules())
        for name, layer in kept.named_modules():
            if name in formats:
                assert layer.use_intel_amx_backend, name
                worst = max(worst, difference(layer, others[name]))
            elif isinstance(layer, (LinearBase, ParallelLMHead)):
                assert torch.equal(layer.weight, others[name].weight), name
        return {name: "+".join(found) for name, found in formats.items()}, worst


def main():
    port, *checkpoints = sys.argv[1:]
    engine = get_engine(2, 1)
    operators.install(engine)
    torch.manual_seed(0)
    for checkpoint in checkpoints:
        name, _, folder = checkpoint.partition("=")
        print(json.dumps([name, *compare(folder, int(port))]), flush=True)


if __name__ == "__main__":
    main()
