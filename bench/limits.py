"""What this machine can do at most; every other figure of bench/ is a share of these."""

from __future__ import annotations

import argparse
import json

from kt_kernel import kt_kernel_ext


def measure(threads: int, gigabytes: float = 1.0, repeats: int = 5) -> dict[str, dict]:
    """{"read": {"how", "per_second"}, "bf16_dot", "int8_dot", "f32_fma"} on `threads` threads at once."""
    engine = kt_kernel_ext.Engine(threads)
    return kt_kernel_ext.measure_limits(engine, bytes=int(gigabytes * 2**30), repeats=repeats)


def describe(threads: int, limits: dict[str, dict]) -> str:
    parts = [f"{name} {limit['per_second'] / 1e9:.0f} G/s ({limit['how']})" for name, limit in limits.items()]
    return f"limits on {threads} thread(s): " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line per thread count")
    arguments = parser.parse_args()
    cores = kt_kernel_ext.topology()["physical_cores"]
    for threads in sorted({1, cores}):
        limits = measure(threads)
        print(json.dumps({"threads": threads, **limits}) if arguments.json else describe(threads, limits))


if __name__ == "__main__":
    main()
