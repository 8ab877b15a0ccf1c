"""Layers whose results are whole numbers, so that every kernel must give exactly the right answer.

    x     0 or 1
    gate  a few 64s and 128s per row, else 0    g = 64 n, 0 <= n <= 3
    up    -1, 0 or 1, sparse                    |u| <= 85
    h     silu(g) u = 64 n u
    down  -1/64, 0 or 1/64                      y = sum of +- n u
    weights of the experts: 1, -1, 2, 0.5       output = a multiple of 1/2

Why this is exact in any order of summation: silu(0) = 0; for g >= 64 the quotient g / (1 + exp(-g)) is g, in
fp32 and in double (exp(-64) = 1.6e-28); h has at most 8 significant bits (n u <= 255), so it survives
rounding to bf16; and all partial sums are small multiples of one power of two, far below 2^24 of them.
"""

from __future__ import annotations

import numpy as np
from harness import Call, Experts, mixed_ids, to_bf16

ROUTING_WEIGHTS = np.array([1, -1, 2, 0.5], np.float32)
MAX_UP = 85  # n u <= 255
_UP_ENTRIES = 250  # non-zeros of an up row, at most: |u| is then about sqrt(125), MAX_UP lies 7 sigma out


def _signs(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    """int8: -1 or 1 with probability density/2 each, else 0."""
    draws = rng.integers(0, 256, shape, dtype=np.uint8)
    half = max(1, round(density * 128))
    return (draws < half).astype(np.int8) - (draws >= 256 - half).astype(np.int8)


def _bits_of_signs(signs: np.ndarray, magnitude: float) -> np.ndarray:
    table = to_bf16(np.array([0, magnitude, -magnitude], np.float32))  # indexed by 0, 1, -1
    return table[signs]


def integer_experts(seed: int, count: int, hidden: int, intermediate: int) -> Experts:
    rng = np.random.default_rng(seed)
    gate = np.zeros((count, intermediate, hidden), np.uint16)
    expert, row = np.ogrid[:count, :intermediate]
    for value in (64.0, 128.0):
        gate[expert, row, rng.integers(0, hidden, (count, intermediate))] = to_bf16(np.float32(value))
    up = _bits_of_signs(_signs(rng, (count, intermediate, hidden), min(1.0, _UP_ENTRIES / hidden)), 1)
    down = _bits_of_signs(_signs(rng, (count, hidden, intermediate), min(1.0, 500 / intermediate)), 1 / 64)
    return Experts(gate, up, down)


def integer_call(seed: int, experts: Experts, tokens: int, top_k: int) -> Call:
    rng = np.random.default_rng(seed)
    return Call(
        to_bf16(rng.integers(0, 2, (tokens, experts.hidden)).astype(np.float32)),
        mixed_ids(rng, tokens, top_k, experts.count),
        rng.choice(ROUTING_WEIGHTS, (tokens, top_k)),
    )
