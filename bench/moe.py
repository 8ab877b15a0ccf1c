"""Speed of one MoE layer as a share of this machine's own limits, beside plain torch in the same run.

Every call uses other tokens and other experts; the weights of a layer are larger than the caches, so they
come from memory. Ours and torch alternate, and the median of each is printed, so that a machine whose speed
drifts changes both. Columns: read = bytes of the distinct experts used per second / measured read bandwidth;
peak = arithmetic per second / measured bf16 peak; roof = the time that the slower of the two limits alone
would take / time.

    python bench/moe.py                          # shapes S and L on all cores
    python bench/moe.py --shape S --tokens 1,16 --threads 1 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import limits as machine_limits
import torch
from torch_experts import torch_experts
from workload import SHAPES, Call, Experts, Shape, random_call, random_experts

from kt_kernel import KTMoEWrapper, __cpu_variant__, kt_kernel_ext

BYTES_PER_WEIGHT = {"BF16": 2.0}
DEFAULT_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024"


def build_layer(method: str, shape: Shape, experts: Experts, threads: int, max_tokens: int) -> KTMoEWrapper:
    layer = KTMoEWrapper(
        layer_idx=0,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_gpu_experts=0,
        cpuinfer_threads=threads,
        threadpool_count=1,
        weight_path="",
        chunked_prefill_size=max_tokens,
        method=method,
    )
    layer.load_weights_from_tensors(experts.gate, experts.up, experts.down, torch.arange(shape.experts))
    return layer


# torch's OpenMP threads spin for about a millisecond after their work and would share our cores meanwhile.
SETTLE_SECONDS = 0.01


def seconds(function: Callable[[], object]) -> float:
    time.sleep(SETTLE_SECONDS)
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def repeats_for(shape: Shape, tokens: int) -> int:
    """About a second of work per row, at least 5 calls."""
    return max(5, min(60, int(1e12 / (shape.flops(tokens) + 2e9))))


def measure_row(
    method: str, shape: Shape, layer: KTMoEWrapper, experts: Experts, tokens: int, limits: dict
) -> dict:
    calls = [random_call(shape, tokens, seed) for seed in range(repeats_for(shape, tokens))]
    run: dict[str, Callable[[Call], object]] = {
        "ours": lambda c: layer.forward(c.hidden, c.ids, c.weights),
        "torch": lambda c: torch_experts(experts, c),
    }
    times: dict[str, list[float]] = {name: [] for name in run}
    for call in calls:
        for name, function in run.items():
            times[name].append(seconds(lambda f=function, c=call: f(c)))
    ours = statistics.median(times["ours"])
    expert_bytes = shape.expert_elements * BYTES_PER_WEIGHT[method]
    bytes_used = statistics.mean(c.distinct_experts for c in calls) * expert_bytes
    read_seconds = bytes_used / limits["read"]["per_second"]
    compute_seconds = shape.flops(tokens) / limits["bf16_dot"]["per_second"]
    return {
        "method": method,
        "shape": shape.name,
        "tokens": tokens,
        "ms": ours * 1e3,
        "gigabytes_per_second": bytes_used / ours / 1e9,
        "share_of_read": read_seconds / ours,
        "share_of_peak": compute_seconds / ours,
        "share_of_roof": max(read_seconds, compute_seconds) / ours,
        "torch_ms": statistics.median(times["torch"]) * 1e3,
    }


def table_line(row: dict) -> str:
    return (
        f"{row['method']:>6} {row['shape']} {row['tokens']:>5} tokens {row['ms']:>9.2f} ms"
        f"  read {row['share_of_read']:>4.0%}  peak {row['share_of_peak']:>4.0%}"
        f"  roof {row['share_of_roof']:>4.0%}"
        f"  torch {row['torch_ms']:>9.2f} ms = {row['torch_ms'] / row['ms']:.2f}x"
    )


def main() -> None:
    cores = kt_kernel_ext.topology()["physical_cores"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=sorted(BYTES_PER_WEIGHT), default="BF16")
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help="default: all")
    parser.add_argument("--tokens", default=DEFAULT_TOKENS)
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = [int(t) for t in arguments.tokens.split(",")]

    for name in arguments.shape or sorted(SHAPES, reverse=True):
        shape = SHAPES[name]
        limits = machine_limits.measure(arguments.threads)  # anew per shape: the machine's speed drifts
        if not arguments.json:
            print(
                f"variant {__cpu_variant__}; {machine_limits.describe(arguments.threads, limits)}", flush=True
            )
        experts = random_experts(shape)
        layer = build_layer(arguments.method, shape, experts, arguments.threads, max(tokens))
        for count in tokens:
            row = measure_row(arguments.method, shape, layer, experts, count, limits)
            machine = {"variant": __cpu_variant__, "threads": arguments.threads, "limits": limits}
            print(json.dumps({**row, **machine}) if arguments.json else table_line(row), flush=True)


if __name__ == "__main__":
    main()
