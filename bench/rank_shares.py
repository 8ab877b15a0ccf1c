"""Decoding on two ranks of one machine: each with half of every expert and half of the cores, against rank 0
with all of both, in turn.

    .venv/bin/python bench/rank_shares.py --method RAWINT4 --shape S

A round is a layer's experts for one token and the sum over the ranks (gloo), as in a server without a GPU;
what stands around the experts is the same either way. Prints the middle and the least of rank 0's times, and
the middle of their ratios. Other programs slow two bound ranks down more than one whose threads take each
other's work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from datetime import timedelta

import torch
from torch import distributed, multiprocessing

from kt_kernel.bench.layer import RandomLayer
from kt_kernel.bench.shapes import SHAPES
from kt_kernel.cpu_share import CpuShare
from kt_kernel.integrations.sglang.rank_cores import bind

_RANKS, _ROUNDS, _IN_A_ROW = 2, 40, 20


def _call(shape, turn: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(turn))[: shape.top_k]
    hidden = torch.ones(1, shape.hidden, dtype=torch.bfloat16)
    return hidden, ids[None].contiguous(), torch.ones(1, shape.top_k)


def _seconds(layer: RandomLayer | None, shape, turn: int) -> float:
    """Of a call and its sum, the middle of some in a row."""
    seconds = []
    for call in range(_IN_A_ROW):
        begin = time.perf_counter()
        output = torch.zeros(1, shape.hidden, dtype=torch.bfloat16)
        if layer is not None:
            output = layer.forward(*_call(shape, turn * _IN_A_ROW + call))
        distributed.all_reduce(output)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _rank(rank: int, method: str, name: str, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=_RANKS, timeout=timedelta(minutes=5)
    )
    shape, cores = SHAPES[name], sorted(os.sched_getaffinity(0))
    whole = RandomLayer(method, shape, threads=len(cores), max_tokens=1) if rank == 0 else None
    half, part = shape.intermediate // _RANKS, len(cores) // _RANKS
    share = CpuShare(rank * half, (rank + 1) * half, shape.intermediate)
    mine = cores[rank * part : (rank + 1) * part]
    bind(mine)
    shared = RandomLayer(method, shape, threads=part, max_tokens=1, share=share)
    measured: dict[str, list[float]] = {"first": [], "auto": []}
    for turn in range(_ROUNDS):
        for how, layer, cpus in (("first", whole, cores if rank == 0 else mine), ("auto", shared, mine)):
            os.sched_setaffinity(0, cpus)
            distributed.barrier()
            measured[how].append(_seconds(layer, shape, turn))
    if rank == 0:
        first, auto = (statistics.median(measured[how]) for how in ("first", "auto"))
        ratio = statistics.median(b / a for a, b in zip(measured["auto"], measured["first"], strict=True))
        print(
            f"{method} {name}: rank 0 alone {first * 1e3:.2f} ms, least {min(measured['first']) * 1e3:.2f}; "
            f"both {auto * 1e3:.2f} ms, least {min(measured['auto']) * 1e3:.2f}; both are {ratio:.2f} times "
            f"as fast (middle of {_ROUNDS} pairs)"
        )
    distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", default="RAWINT4")
    parser.add_argument("--shape", default="S", choices=SHAPES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (options.method, options.shape, f"{folder}/store"), _RANKS)


if __name__ == "__main__":
    main()
