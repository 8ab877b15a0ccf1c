"""Estimated speed of layerwise prefill, from figures of the bus and the device; measures nothing.

Without options: MiniMax-M2.1 in FP8 behind PCIe 5.
"""

from __future__ import annotations

import argparse

from kt_kernel.hybrid.prefill_plan import (
    GIB,
    PrefillMachine,
    PrefillMemory,
    PrefillModel,
    choose_chunk,
    speed_table,
)

# 62 layers x 256 experts x 14.16 MB: 225 GB a pass.
MINIMAX_M2 = PrefillModel(
    layers=62,
    moe_layers=62,
    experts=256,
    top_k=8,
    hidden=3072,
    intermediate=1536,
    heads=48,
    head_dim=128,
    expert_bytes=14.16e6,
    slot_bytes=14.16e6,
    kv_bytes=62 * 2 * 8 * 128 * 2,
    other_bytes=5.3e9,
)
PROMPTS = (2048, 8192, 32768)
CHUNKS = (2048, 4096, 8192, 16384, 32768)
STOCK_CHUNK = 4096  # SGLang's below 60 GB of device memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bus", type=float, default=50.0, help="GB/s to the device (default: 50)")
    parser.add_argument(
        "--tflops", type=float, default=175.0, help="TFLOP/s that the device's kernels reach (default: 175)"
    )
    parser.add_argument("--memory", type=float, default=32.0, help="GiB of the device (default: 32)")
    arguments = parser.parse_args()
    machine = PrefillMachine(bus=arguments.bus * 1e9, flops=arguments.tflops * 1e12)
    print(f"MiniMax-M2.1, FP8; {machine}")
    print(speed_table(MINIMAX_M2, machine, PROMPTS, CHUNKS))
    memory = PrefillMemory(arguments.memory * GIB, slots=2 * MINIMAX_M2.experts * MINIMAX_M2.slot_bytes)
    choice = choose_chunk(
        MINIMAX_M2, machine, memory, threshold=STOCK_CHUNK, stock=STOCK_CHUNK, context=196608
    )
    print(
        f"{arguments.memory:.0f} GiB: chunks of {choice.chunk}, {choice.tokens_per_second:.0f} tokens/s for "
        f"{choice.prompt} tokens; {choice.stock:.0f} with chunks of {STOCK_CHUNK}"
    )


if __name__ == "__main__":
    main()
