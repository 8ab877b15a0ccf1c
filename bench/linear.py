"""Microseconds of a call of one linear layer that is kept in its format, and its share of the read bandwidth.

Shapes are Qwen3-30B-A3B's: qkv, the attention's output, and a head of a fifth of its rows. Calls go through
so many layers that weights come from memory; figures are medians, the bandwidth is measured between them.

    python bench/linear.py --type Q4_K --type Q8_0 --tokens 1,4,8
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from kt_kernel import kt_kernel_ext, operators
from kt_kernel.bench.limits import measure_limits
from kt_kernel.bench.random_blocks import BENCHED, TYPES, random_matrix
from kt_kernel.engine import get_engine
from kt_kernel.gguf.experts import METHOD

SHAPES = {"qkv": (5120, 2048), "output": (2048, 4096), "head": (30400, 2048)}
_BYTES_OF_ALL = 128 << 20  # many times any last-level cache of the machines this is run on
_ROUNDS = 3


def layers_of(
    ggml_type: str, rows: int, columns: int, engine: kt_kernel_ext.Engine
) -> list[kt_kernel_ext.Linear]:
    blocks = random_matrix(ggml_type, rows, columns, torch.Generator().manual_seed(1))
    part = (METHOD, ggml_type, rows, blocks.data_ptr(), 0, 1.0, 0, 0)
    count = max(2, _BYTES_OF_ALL // blocks.numel())
    return [kt_kernel_ext.Linear(engine, k=columns, parts=[part]) for _ in range(count)]


def seconds_of_calls(layers: list[kt_kernel_ext.Linear], x: torch.Tensor) -> list[float]:
    seconds = []
    for layer in layers:
        begin = time.perf_counter()
        torch.ops.kt_kernel.linear(layer.handle, x, None)
        seconds.append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--type", action="append", choices=BENCHED, metavar="TYPE", help="default: Q4_K and Q8_0"
    )
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: all")
    parser.add_argument("--tokens", default="1,4,8")
    parser.add_argument("--threads", type=int, default=0, help="default: one for each core")
    options = parser.parse_args()
    engine = get_engine(options.threads or torch.get_num_threads())
    operators.install(engine)
    for ggml_type in options.type or ["Q4_K", "Q8_0"]:
        for shape in options.shape or SHAPES:
            rows, columns = SHAPES[shape]
            layers = layers_of(ggml_type, rows, columns, engine)
            bytes_ = rows * columns // TYPES[ggml_type]["columns"] * TYPES[ggml_type]["bytes"]
            for tokens in map(int, options.tokens.split(",")):
                x = torch.randn(tokens, columns).bfloat16()
                seconds, read = [], []
                for _ in range(_ROUNDS):
                    read.append(measure_limits(engine)["read"]["per_second"])
                    seconds += seconds_of_calls(layers, x)
                call, limit = statistics.median(seconds), statistics.median(read)
                print(
                    f"{ggml_type:6} {shape:6} [{rows}, {columns}] {tokens:3} tokens {call * 1e6:8.0f} us "
                    f"{bytes_ / call / 1e9:6.1f} GB/s {bytes_ / call / limit:5.0%} of read "
                    f"({limit / 1e9:.1f} GB/s)"
                )


if __name__ == "__main__":
    main()
