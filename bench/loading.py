"""How fast a layer is loaded from a checkpoint whose pages are in memory: file bytes per second.

Each method loads one layer of shape S (Qwen3-30B-A3B) of random bits from a file written just before. The
best of a few loads counts: the first also waits for the system to write the file out.

    python bench/loading.py                            # all methods on all cores
    python bench/loading.py --method FP8 --threads 1 --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from kt_kernel import KTMoEWrapper, kt_kernel_ext
from kt_kernel.bench.shapes import SHAPES, Shape
from kt_kernel.checkpoint.safetensors_file import TORCH_DTYPES
from kt_kernel.formats.record import Storage
from kt_kernel.formats.records import RECORDS

SHAPE = SHAPES["S"]
REPEATS = 4
GROUP_SIZE = 128
_METHODS = [name for name in kt_kernel_ext.METHODS if RECORDS[name].storage]  # of safetensors
_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "sym": True, "desc_act": False}


def write_checkpoint(directory: Path, method: str, shape: Shape) -> int:
    """A checkpoint with one layer of random bits; returns its bytes."""
    storage = RECORDS[method].storage[0]
    tensors = {}
    for expert in range(shape.experts):
        for name, n, k in (
            ("gate_proj", shape.intermediate, shape.hidden),
            ("up_proj", shape.intermediate, shape.hidden),
            ("down_proj", shape.hidden, shape.intermediate),
        ):
            for suffix, tensor in _random_matrix(storage, n, k).items():
                tensors[f"model.layers.0.mlp.experts.{expert}.{name}.{suffix}"] = tensor
    save_file(tensors, directory / "model.safetensors")
    config = {"quantization_config": _CONFIG} if method == "GPTQ_INT4" else {}
    (directory / "config.json").write_text(json.dumps(config))
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _random_matrix(row: Storage, n: int, k: int) -> dict[str, torch.Tensor]:
    (dtype, shape), *_ = row.weight_shapes.items()
    parts = {row.weight: _random(dtype, shape(n, k, GROUP_SIZE)[0])}
    if row.scales:
        parts[row.scales[0]] = _random(row.scale_dtypes[0], row.scale_shape(n, k, GROUP_SIZE)[0])
    if row.global_scale is not None:
        parts[row.global_scale.suffix] = torch.ones(())
    return parts


def _random(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    # Bytes below 127: none of them is a NaN, as a code or as a scale.
    raw = torch.randint(0, 127, (*shape[:-1], shape[-1] * TORCH_DTYPES[dtype].itemsize), dtype=torch.uint8)
    return raw.view(TORCH_DTYPES[dtype])


def measure(method: str, shape: Shape, threads: int, directory: Path) -> dict:
    """Seconds of the fastest of a few loads, and the file's bytes per second."""
    size = write_checkpoint(directory, method, shape)
    times = []
    for _ in range(REPEATS):
        layer = KTMoEWrapper(
            layer_idx=0,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.intermediate,
            cpuinfer_threads=threads,
            threadpool_count=1,
            weight_path=directory,
            chunked_prefill_size=16,
            method=method,
        )
        begin = time.perf_counter()
        layer.load_weights()
        times.append(time.perf_counter() - begin)
        del layer
    return {
        "method": method,
        "shape": shape.name,
        "threads": threads,
        "gigabytes": size / 1e9,
        "seconds": min(times),
        "gigabytes_per_second": size / min(times) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=_METHODS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=kt_kernel_ext.topology()["physical_cores"])
    parser.add_argument("--directory", help="where the files go meanwhile (default: the system's)")
    parser.add_argument("--json", action="store_true", help="one JSON line per method instead of the table")
    arguments = parser.parse_args()
    for method in arguments.method or _METHODS:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            row = measure(method, SHAPE, arguments.threads, Path(directory))
        if arguments.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{row['method']:>14} {row['gigabytes']:>5.2f} GB in {row['seconds']:>6.3f} s"
                f"  {row['gigabytes_per_second']:>5.2f} GB/s on {row['threads']} threads",
                flush=True,
            )


if __name__ == "__main__":
    main()
