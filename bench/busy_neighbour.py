"""What other busy processes leave of a layer's speed.

Calls follow each other without a pause while 0, 1, ... other processes compute for ever, on whatever core the
scheduler gives them. A machine that shares its cores fairly among the threads that want one would leave
cores / (cores + neighbours) of the quiet speed. The three states alternate, because a machine's speed drifts.

    python bench/busy_neighbour.py                       # RAWINT4, shape S, one token, one and two neighbours
    python bench/busy_neighbour.py --method BF16 --tokens 64 --neighbours 3 --rounds 10
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kt_kernel import kt_kernel_ext
from kt_kernel.bench.layer import RandomLayer
from kt_kernel.bench.shapes import SHAPES, random_call

_SETTLE_SECONDS = 0.1
_CALLS = 48  # different ones, taken in turn


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen]]:
    """Processes that compute for ever, stopped until `running` lets some of them go on."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def running(processes: list[subprocess.Popen]) -> Iterator[None]:
    """They run meanwhile."""
    for process in processes:
        process.send_signal(signal.SIGCONT)
    time.sleep(_SETTLE_SECONDS)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGSTOP)


def calls_per_second(layer: RandomLayer, calls: list, seconds: float) -> float:
    """Over all calls, not their median: what a neighbour costs falls on few of them."""
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        layer.run(calls[done % len(calls)])
        done += 1
    return done / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=kt_kernel_ext.METHODS, default="RAWINT4")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="S")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--threads", type=int, default=kt_kernel_ext.topology()["physical_cores"])
    parser.add_argument("--neighbours", type=int, default=2, help="the most at the same time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each state in each round")
    arguments = parser.parse_args()

    shape = SHAPES[arguments.shape]
    layer = RandomLayer(arguments.method, shape, threads=arguments.threads, max_tokens=arguments.tokens)
    calls = [random_call(shape, arguments.tokens, seed) for seed in range(_CALLS)]
    speeds: list[list[float]] = [[] for _ in range(arguments.neighbours + 1)]
    with busy_processes(arguments.neighbours) as processes:
        for _ in range(arguments.rounds):
            for count, speed in enumerate(speeds):
                with running(processes[:count]):
                    speed.append(calls_per_second(layer, calls, arguments.seconds))
    cores = len(os.sched_getaffinity(0))
    quiet = statistics.median(speeds[0])
    print(
        f"{arguments.method}, shape {arguments.shape}, {arguments.tokens} tokens, "
        f"{arguments.threads} threads on {cores} cores"
    )
    for count, speed in enumerate(speeds):
        fair = min(1.0, cores / (cores + count))
        rates = " ".join(f"{each / quiet:.2f}" for each in speed)
        print(
            f"{count} neighbours: {1e3 / statistics.median(speed):7.3f} ms a call, "
            f"{statistics.median(speed) / quiet:5.1%} of quiet (fair share {fair:.0%}; rounds {rates})",
            flush=True,
        )


if __name__ == "__main__":
    main()
