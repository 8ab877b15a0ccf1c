"""What servers were measured to reach of a machine's limits: the figures behind expected tokens/s.

Each row says where it was measured. Shares are of whole models where such were measured (doc/operators.md,
doc/run.md), else of one layer's experts (doc/measurements.md) less what whole models lose on the way.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """`read`: of the read bandwidth, one token; `multiply`: of the bf16 peak, prompts of 1000 tokens."""

    read: float
    multiply: float


# Whole models on two cores of an AMD Zen 4, 2026-11-30 (doc/operators.md), kernels alone: the time outside
# them is STEP_SECONDS and LAYER_SECONDS below. 4-bit codes multiply int8, hence as much of the bf16 peak.
_WIDE = {
    "BF16": Shares(0.75, 0.65),
    "FP8": Shares(0.75, 0.60),
    "FP8_PERCHANNEL": Shares(0.75, 0.60),
    "MXFP8": Shares(0.70, 0.55),
    "RAWINT4": Shares(0.65, 0.70),
    "GPTQ_INT4": Shares(0.65, 0.70),
    "MXFP4": Shares(0.65, 0.70),
    "NVFP4": Shares(0.62, 0.65),
    "AMXINT4": Shares(0.65, 0.75),
    "AMXINT8": Shares(0.70, 0.75),
    "MOE_INT4": Shares(0.65, 0.75),
    "MOE_INT8": Shares(0.70, 0.75),
    "LLAMAFILE": Shares(0.62, 0.70),
}
# AVX2 decodes codes with more instructions: doc/measurements.md, the columns of AVX2 kernels.
_NARROW = {
    **dict.fromkeys(_WIDE, Shares(0.55, 0.60)),
    "BF16": Shares(0.75, 0.55),
    "FP8": Shares(0.50, 0.60),
    "FP8_PERCHANNEL": Shares(0.50, 0.60),
    "MXFP8": Shares(0.50, 0.60),
}
# The tile unit's peak is out of reach of one layer's loops: doc/measurements.md, Granite Rapids.
_TILES_MULTIPLY = 0.20

# Of float32 matrices, as of bf16 ones: the demo's step took 16.3 ms in float32, 12.5 in bf16, and 3.8 ms for
# 110 MB more is 0.75 of 38 GB/s (quiet Zen 4, 2026-11-30). Torch, with our operators off: 55 ms.
FLOAT32_READ = 0.75

STEP_SECONDS = 1.3e-3
"""Of a decode step outside the operators: 1.1 to 1.2 ms between two steps, 0.12 for loading the batch (Zen 4,
2026-11-30, without SGLang's overlap schedule, which a server on a CPU has off: cpu_defaults.py).
"""
LAYER_SECONDS = 60e-6
"""Of a layer's small operators and barriers on a CPU (doc/operators.md: attention, norms, router)."""

SUM_SECONDS = 0.2e-3
"""Of a sum of one token's hidden state over two ranks, by gloo through loopback: the least of 1000 on a busy
machine, for 7168 and 2048 numbers alike; the middle was 0.4 (bench/rank_sums.py, two cores of a Zen 4,
2026-11-30).
"""

# Beside a GPU. None of these has been measured by us: the machines that we have hold none.
GPU_READ = 0.70
GPU_MULTIPLY = 0.50
GPU_LAYER_SECONDS = 60e-6
"""Kernels of a layer in a graph, and one exchange with the CPU of 20 to 40 us (doc/hybrid.md)."""


def shares_of(method: str, variant: str) -> Shares:
    """Of a method's experts, or of a dense layer in the format of that method, with these kernels."""
    table = _NARROW if variant.startswith("avx2") or variant == "avx_vnni" else _WIDE
    found = table.get(method, table["BF16"])
    return Shares(found.read, _TILES_MULTIPLY) if variant == "amx" else found
