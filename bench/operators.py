"""Microseconds of a call of each operator that works row by row, and of its twin in torch: 1 and 64 tokens.

Shapes are Qwen3-30B-A3B's in bf16. The first line is a call of torch that computes next to nothing: what the
dispatch of torch costs. Figures are medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kt_kernel import operators
from kt_kernel.engine import get_engine
from kt_kernel.operators.registration import TWINS

HIDDEN, Q_HEADS, KV_HEADS, COLUMNS, EXPERTS, CHOSEN, INTERMEDIATE = 2048, 32, 4, 128, 128, 8, 768
EPS = 1e-6


def arguments_of_each(tokens: int) -> dict[str, tuple]:
    def numbers(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes).bfloat16()

    x, weight = numbers(tokens, HIDDEN), numbers(HIDDEN)
    widths = [Q_HEADS * COLUMNS, KV_HEADS * COLUMNS, KV_HEADS * COLUMNS]
    q, k, _ = numbers(tokens, sum(widths)).split(widths, -1)
    head_weight, cache = numbers(COLUMNS), numbers(4096, COLUMNS)
    positions = torch.arange(tokens)
    logits = numbers(tokens, EXPERTS)
    bias = torch.randn(EXPERTS)
    return {
        "sgl_kernel::rmsnorm_cpu": (x, weight, EPS),
        "sgl_kernel::fused_add_rmsnorm_cpu": (x.clone(), numbers(tokens, HIDDEN), weight, EPS),
        "sgl_kernel::layernorm_cpu": (x, weight, None, EPS),
        "sgl_kernel::rotary_embedding_cpu": (positions, q, k, COLUMNS, cache, True),
        "sgl_kernel::fused_qk_norm_cpu": (q, k, head_weight, head_weight, EPS),
        "sgl_kernel::fused_qk_norm_rope_cpu": (
            *(q, k, head_weight, head_weight, EPS),
            *(True, positions, cache, COLUMNS),
        ),
        "sgl_kernel::fused_qk_rmsnorm_cpu": (q, k, numbers(widths[0]), numbers(widths[1]), EPS),
        "sgl_kernel::topk_softmax_cpu": (x, logits, CHOSEN, True),
        "sgl_kernel::topk_sigmoid_cpu": (x, logits, CHOSEN, True, bias),
        "sgl_kernel::grouped_topk_cpu": (x, logits, CHOSEN, True, 8, 4, 0, None, None),
        "sgl_kernel::biased_grouped_topk_cpu": (x, logits, bias, CHOSEN, True, 8, 4, 0, 2.5, None),
        "sgl_kernel::silu_and_mul_cpu": (numbers(tokens, 2 * INTERMEDIATE),),
        "sgl_kernel::gelu_and_mul_cpu": (numbers(tokens, 2 * INTERMEDIATE),),
        "sgl_kernel::gelu_tanh_and_mul_cpu": (numbers(tokens, 2 * INTERMEDIATE),),
        "sgl_kernel::fused_sigmoid_mul_cpu": (x.clone(), numbers(tokens, HIDDEN)),
        "kt_kernel::embedding": (positions, numbers(4096, HIDDEN)),
    }


def settle_allocator() -> None:
    """As in a server, which has loaded weights: once a large block was freed, glibc keeps what is freed later
    instead of giving it back to the kernel and faulting it in again.
    """
    torch.empty(30 << 20, dtype=torch.uint8).zero_()


def microseconds(function: Callable, arguments: tuple, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    return (time.perf_counter() - begin) / calls * 1e6


def median_of(functions: dict[str, Callable], arguments: tuple, rounds: int) -> dict[str, float]:
    figures: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            figures[name].append(microseconds(function, arguments, calls=20))
    return {name: statistics.median(each) for name, each in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settle_allocator()
    engine = get_engine(options.threads)
    operators.install(engine)
    with torch.inference_mode():
        dispatch = median_of({"torch": torch.ops.aten.relu.default}, (torch.ones(1),), options.rounds)[
            "torch"
        ]
        titles = ("1 token", "torch", "ratio", "64 tokens", "torch", "ratio")
        print("{:28} {:>8} {:>8} {:>6}   {:>9} {:>8} {:>6}".format("µs a call", *titles))
        print(f"{'relu of one number (torch)':28} {dispatch:8.1f}")
        of_one, of_many = arguments_of_each(1), arguments_of_each(64)
        for name, arguments in of_one.items():
            namespace, _, short = name.partition("::")
            functions = {
                "ours": getattr(getattr(torch.ops, namespace), short).default,
                "torch": TWINS[name].function,
            }
            one = median_of(functions, arguments, options.rounds)
            many = median_of(functions, of_many[name], options.rounds)
            print(
                f"{short:28} {one['ours']:8.1f} {one['torch']:8.1f} {one['torch'] / one['ours']:6.1f}   "
                f"{many['ours']:9.1f} {many['torch']:8.1f} {many['torch'] / many['ours']:6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
