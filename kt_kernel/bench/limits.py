"""What this machine can do at most; every other figure is a share of these."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from kt_kernel import kt_kernel_ext

READ_BYTES = 2**29  # many times any last-level cache
_REPEATS = 3

Limits = dict[str, dict]
"""Bytes ("read") and operations per second of each limit: {name: {"how", "per_second"}}.

"bf16_dot" and "f32_fma" are products summed in fp32. "int8_dot" is int8 times codes of 4 bits,
"int8_widened" int8 times codes of 8 bits: the same with VNNI; without it only products of small codes
can be summed in 16 bits.
"""


def measure_limits(engine: kt_kernel_ext.Engine) -> Limits:
    """The best of a few runs on all threads of `engine` at once; takes about half a second."""
    return kt_kernel_ext.measure_limits(engine, bytes=READ_BYTES, repeats=_REPEATS)


def median_limits(measured: Sequence[Limits]) -> Limits:
    """Each limit's median over several measurements."""
    return {
        name: {**limit, "per_second": statistics.median(each[name]["per_second"] for each in measured)}
        for name, limit in measured[0].items()
    }


def describe_limits(threads: int, limits: Limits) -> str:
    """One line for people."""
    parts = [f"{name} {limit['per_second'] / 1e9:.0f} G/s ({limit['how']})" for name, limit in limits.items()]
    return f"limits on {threads} thread(s): " + ", ".join(parts)
