"""How fast experts are written back for a device (layerwise prefill waits for this): bytes per second.

Each method writes all experts of one layer of shape S (Qwen3-30B-A3B), in turn, into two staging buffers, as
serving does. Columns: GB/s = bytes of the written experts per second; copy = their share of what torch's
copy of the same bytes reaches from as large a memory into the same buffers; read = their share of the
measured read bandwidth. Medians of several rounds; the rounds of both alternate, because a machine's speed
drifts.

    python bench/write_back.py                           # all methods on all cores
    python bench/write_back.py --method FP8 --ranks 2 --threads 1 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.bench.layer import RandomLayer
from kt_kernel.bench.limits import measure_limits
from kt_kernel.bench.shapes import SHAPES

SHAPE = SHAPES["S"]
ROUNDS = 5


def seconds(work: Callable[[int], None]) -> float:
    """One round: `work` for every expert."""
    begin = time.perf_counter()
    for expert in range(SHAPE.experts):
        work(expert)
    return time.perf_counter() - begin


def measure(method: str, ranks: int, threads: int) -> dict:
    layer = RandomLayer(method, SHAPE, threads=threads, max_tokens=1)
    encoding = layer.encoding(ranks)
    size = ranks * encoding.bytes
    staging = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    shards = [[encoding.views(part) for part in buffer.split(encoding.bytes)] for buffer in staging]
    source = torch.zeros(SHAPE.experts, size, dtype=torch.uint8).add_(1)

    def write(expert: int) -> None:
        layer.write_expert(expert, shards[expert % 2])

    def copy(expert: int) -> None:
        staging[expert % 2].copy_(source[expert])

    times = {write: [], copy: []}
    reads = []
    for _ in range(ROUNDS):
        for work, of_work in times.items():
            of_work.append(seconds(work))
        reads.append(measure_limits(layer.cpu_infer)["read"]["per_second"])
    total = SHAPE.experts * size
    speed = {work: total / statistics.median(of_work) for work, of_work in times.items()}
    return {
        "method": method,
        "shape": SHAPE.name,
        "ranks": ranks,
        "threads": threads,
        "megabytes_per_expert": size / 1e6,
        "gigabytes_per_second": speed[write] / 1e9,
        "copy_gigabytes_per_second": speed[copy] / 1e9,
        "share_of_copy": speed[write] / speed[copy],
        "share_of_read": speed[write] / statistics.median(reads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=kt_kernel_ext.METHODS, action="append", help="default: all")
    parser.add_argument("--ranks", type=int, default=1, help="devices that share each expert")
    parser.add_argument("--threads", type=int, default=kt_kernel_ext.topology()["physical_cores"])
    parser.add_argument("--json", action="store_true", help="one JSON line per method instead of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for method in arguments.method or kt_kernel_ext.METHODS:
        row = measure(method, arguments.ranks, arguments.threads)
        if arguments.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{method:>14} {row['megabytes_per_expert']:>6.2f} MB per expert"
                f"  {row['gigabytes_per_second']:>6.2f} GB/s  copy {row['share_of_copy']:>5.0%}"
                f"  read {row['share_of_read']:>5.0%}  on {row['threads']} threads",
                flush=True,
            )


if __name__ == "__main__":
    main()
