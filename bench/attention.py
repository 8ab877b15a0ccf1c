"""Speed of attention over a paged cache, as shares of this machine's own limits.

Each line is one call of the operator for one layer. Columns: GB/s of keys and values read once, and their
share of the measured read bandwidth; GFLOP/s of visible (query, key) pairs, and their share of the fp32 FMA
peak. The limits are measured before and after each line, because a machine's speed drifts. Decoding goes
round several caches, which together are larger than the processor's; prefill computes from its caches.

    python bench/attention.py
    KT_KERNEL_CPU_VARIANT=avx2 python bench/attention.py --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch

from kt_kernel import __cpu_variant__, kt_kernel_ext, operators
from kt_kernel.bench.limits import median_limits

CACHE_BYTES = 256 << 20  # of all caches of a line together, at least
READ_BYTES = 2**29


@dataclass
class Shape:
    """Sequences of `lengths` positions, the last `new` of which are computed; `value_dim` 512 is MLA's."""

    name: str
    lengths: list[int]
    new: int
    heads: int
    kv_heads: int
    dim: int = 128
    value_dim: int = 128

    def pairs(self) -> int:
        return sum((length - self.new) * self.new + self.new * (self.new + 1) // 2 for length in self.lengths)

    def flop(self) -> int:
        return 2 * self.pairs() * self.heads * (self.dim + self.value_dim)

    def read_bytes(self) -> int:
        compressed = self.dim == 576
        return 2 * sum(self.lengths) * self.kv_heads * (self.dim + (0 if compressed else self.value_dim))


SHAPES = [
    Shape("decode, 1 x 1k, 8 heads a key", [1024], 1, 32, 4),
    Shape("decode, 1 x 32k, 8 heads a key", [32768], 1, 32, 4),
    Shape("decode, 1 x 32k, 4 heads a key", [32768], 1, 32, 8),
    Shape("decode, 1 x 16k, 1 head a key", [16384], 1, 16, 16),
    Shape("decode, 16 x 2k, 8 heads a key", [2048] * 16, 1, 32, 4),
    Shape("decode, 1 x 8k, MLA 16 heads", [8192], 1, 16, 1, 576, 512),
    Shape("prefill, 1024, 8 heads a key", [1024], 1024, 32, 4),
    Shape("prefill, 1024, 1 head a key, 64 wide", [1024], 1024, 16, 16, 64, 64),
    Shape("prefill, 256 after 8k, 8 heads a key", [8448], 256, 32, 4),
    Shape("prefill, 512, MLA 16 heads", [512], 512, 16, 1, 576, 512),
]


class Layers:
    """Calls of one shape, each with the next of several caches."""

    def __init__(self, shape: Shape) -> None:
        total = sum(shape.lengths)
        self.shape = shape
        self.count = max(1, CACHE_BYTES // shape.read_bytes()) if shape.new == 1 else 1
        self.next = 0
        keys = torch.randn(total, shape.kv_heads, shape.dim).bfloat16()
        values = torch.randn(total, shape.kv_heads, shape.value_dim).bfloat16()
        self.keys = [keys.clone() for _ in range(self.count)]
        if shape.dim == 576:
            self.values = [each[..., : shape.value_dim] for each in self.keys]
        else:
            self.values = [values.clone() for _ in range(self.count)]
        sequences = len(shape.lengths)
        self.table = torch.zeros(sequences, max(shape.lengths), dtype=torch.int32)
        for row, slots in zip(self.table, torch.arange(total).split(shape.lengths), strict=True):
            row[: len(slots)] = slots.int()
        self.rows, self.lengths = torch.arange(sequences), torch.tensor(shape.lengths)
        self.new = torch.full((sequences,), shape.new)
        self.starts = self.new.cumsum(0) - self.new
        self.q = torch.randn(sequences * shape.new, shape.heads, shape.dim).bfloat16()
        self.out = torch.empty(sequences * shape.new, shape.heads, shape.value_dim).bfloat16()

    def __call__(self) -> None:
        self.next = (self.next + 1) % self.count
        torch.ops.sgl_kernel.extend_attention_cpu(
            self.q,
            None,
            None,
            self.out,
            self.keys[self.next],
            self.values[self.next],
            k_scale=1.0,
            v_scale=1.0,
            req_to_token=self.table,
            req_pool_indices=self.rows,
            seq_lens=self.lengths,
            extend_seq_lens=self.new,
            extend_start_loc=self.starts,
            max_len_extend=self.shape.new,
            sm_scale=self.shape.dim**-0.5,
            logit_cap=0.0,
            is_cross_attn=False,
            sliding_window_size=0,
            encoder_lens=None,
            sinks=None,
            tree_mask=None,
            is_causal=True,
        )


def seconds_of(call: Layers, budget: float) -> float:
    """Median of a call's wall time."""
    call()
    times, end = [], time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=kt_kernel_ext.topology()["physical_cores"])
    parser.add_argument("--seconds", type=float, default=0.7, help="of each line")
    parser.add_argument("--only", default="", help="part of a line's name")
    arguments = parser.parse_args()
    engine = kt_kernel_ext.Engine(arguments.threads, 1)
    operators.install(engine)
    print(f"{arguments.threads} threads, {__cpu_variant__}; keys and values bf16")
    for shape in SHAPES:
        if arguments.only not in shape.name:
            continue
        call = Layers(shape)
        measured = [kt_kernel_ext.measure_limits(engine, bytes=READ_BYTES, repeats=1)]
        seconds = seconds_of(call, arguments.seconds)
        measured.append(kt_kernel_ext.measure_limits(engine, bytes=READ_BYTES, repeats=1))
        limits = median_limits(measured)
        read, flop = shape.read_bytes() / seconds, shape.flop() / seconds
        print(
            f"{shape.name:38} {1e3 * seconds:9.3f} ms  {read / 1e9:6.1f} GB/s "
            f"{read / limits['read']['per_second']:5.0%} of read  {flop / 1e9:7.1f} GFLOP/s "
            f"{flop / limits['f32_fma']['per_second']:5.0%} of peak",
            flush=True,
        )


if __name__ == "__main__":
    main()
