"""Drawing the next token: our operator and SGLang's torch code, in turn, ms a call.

Logits are normal numbers; the larger their deviation, the fewer tokens share the probability. A trained
model's are peaked, those of random weights are not.

    python bench/sampling.py --tokens 151936 --rows 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sglang.srt.layers import sampler

from kt_kernel import operators
from kt_kernel.engine import get_engine

ALL = 1 << 30
FILTERS = {"top-p 0.95": (ALL, 0.95), "top-k 20": (20, 0.95), "none": (ALL, 1.0)}
DEVIATIONS = (0.5, 1.7, 5.0)


def of_sglang(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    rows = len(logits)
    shares = torch.softmax(logits.div(torch.ones(rows, 1)), dim=-1)
    if (top_k, top_p) == FILTERS["none"]:
        return sampler.sampling_from_probs_torch(shares)
    filters = (torch.full((rows,), top_k), torch.full((rows,), top_p), torch.zeros(rows))
    return sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        *(shares, *filters, False, None, torch.zeros(rows)), max_top_k=top_k
    )


def of_ours(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    rows = len(logits)
    return torch.ops.kt_kernel.sample(
        *(logits, torch.ones(rows, 1), torch.full((rows,), top_k, dtype=torch.int32)),
        *(torch.full((rows,), top_p), torch.zeros(rows), torch.rand(rows, dtype=torch.float64)),
    )


def milliseconds(function: Callable, *arguments: object) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=151936)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    operators.install(get_engine(options.threads))
    torch.manual_seed(0)
    print(f"{'deviation':>9}  {'filter':10} {'ours':>8} {'SGLang':>8}")
    for deviation in DEVIATIONS:
        logits = torch.randn(options.rows, options.tokens) * deviation
        for name, filters in FILTERS.items():
            times = [
                (milliseconds(of_ours, logits, *filters), milliseconds(of_sglang, logits, *filters))
                for _ in range(options.rounds)
            ]
            ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{deviation:9.1f}  {name:10} {ours:8.2f} {theirs:8.2f}", flush=True)


if __name__ == "__main__":
    main()
