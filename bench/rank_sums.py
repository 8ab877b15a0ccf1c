"""What a layer's sum over ranks costs on this machine: gloo between processes, as in a server on a CPU.

    .venv/bin/python bench/rank_sums.py --ranks 2 --hidden 7168

Prints microseconds of one sum of a token's hidden state, in bfloat16, the least and the middle of many.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import timedelta

import torch
from torch import distributed, multiprocessing

_WARM_UP, _SUMS = 50, 1000


def _rank(rank: int, ranks: int, hidden: int, tokens: int, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    state = torch.zeros(tokens, hidden, dtype=torch.bfloat16)
    seconds = []
    for _ in range(_WARM_UP + _SUMS):
        begin = time.perf_counter()
        distributed.all_reduce(state)
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        measured = sorted(seconds[_WARM_UP:])
        print(
            f"{ranks} ranks, {tokens} x {hidden}: least {measured[0] * 1e6:.0f} us, "
            f"middle {statistics.median(measured) * 1e6:.0f} us"
        )
    distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--tokens", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(
            _rank, (options.ranks, options.hidden, options.tokens, f"{folder}/store"), options.ranks
        )


if __name__ == "__main__":
    main()
