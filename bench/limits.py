"""What this machine can do at most: on one thread and on all cores."""

from __future__ import annotations

import argparse
import json

from kt_kernel import kt_kernel_ext
from kt_kernel.bench.limits import describe_limits, measure_limits, median_limits

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line per thread count")
    arguments = parser.parse_args()
    cores = kt_kernel_ext.topology()["physical_cores"]
    for threads in sorted({1, cores}):
        engine = kt_kernel_ext.Engine(threads)
        limits = median_limits([measure_limits(engine) for _ in range(ROUNDS)])
        line = {"threads": threads, **limits}
        print(json.dumps(line) if arguments.json else describe_limits(threads, limits), flush=True)


if __name__ == "__main__":
    main()
