"""Risk: an activation that is off for some gates (far from zero, near the clamp), or an ignored variant.

The layer is built so that its output is the activation itself: hidden states are unit vectors, token t picks
column t of gate and up, and down is the identity: one call evaluates 256 x 256 = every bf16 number as a gate.
"""

from __future__ import annotations

import numpy as np
import pytest
from harness import (
    Call,
    Experts,
    activation,
    build_layer,
    ext,
    from_bf16,
    random_call,
    random_experts,
    run,
    to_bf16,
)

ENGINE = ext.Engine(2)
N = 256
# Allowed relative errors. fp32: a few ulp, and the rounding of alpha * gate (6e-8 of an exponent up to 87).
# Kernels that round SwiGLU outputs to bf16: half an ulp of that. Below 1e-30 being vanishingly small is all
# that counts.
FP32_ERROR, BF16_ERROR, ABSOLUTE = 8e-6, 2.0**-8, 1e-30
KEEP_FP32 = ("bf16.avx2", "bf16.avx512")


def allowed_error() -> float:
    chosen = next(row["kernel"] for row in ext.dispatch_table() if row["state"] == "chosen")
    return FP32_ERROR if chosen in KEEP_FP32 else FP32_ERROR + BF16_ERROR


def every_bf16() -> np.ndarray:
    """[256, 256] bits of all bf16 numbers up to 1e38 (so that nothing overflows), the others as zeros."""
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).reshape(N, N)
    return np.where(np.abs(from_bf16(bits)) <= 1e38, bits, 0).astype(np.uint16)


def activations(gate_bits: np.ndarray, up_bits: np.ndarray, **variant: float) -> np.ndarray:
    """act(gate, up) of two [256, 256] bf16 matrices, element by element, through a layer."""
    identity = to_bf16(np.eye(N, dtype=np.float32))
    experts = Experts(gate_bits[None], up_bits[None], identity[None])
    call = Call(identity, np.zeros((N, 1), np.int64), np.ones((N, 1), np.float32))
    layer = build_layer(ENGINE, experts, top_k=1, **variant)
    return run(layer, call).T  # [token = column, row] -> [row, column]


def assert_follows_formula(gate_bits: np.ndarray, up_bits: np.ndarray, limit: float, alpha: float) -> None:
    gate, up = from_bf16(gate_bits).astype(np.float64), from_bf16(up_bits).astype(np.float64)
    expected = activation(gate, up, limit, float(np.float32(alpha)))
    output = activations(gate_bits, up_bits, swiglu_limit=limit, swiglu_alpha=alpha)
    excess = np.abs(output - expected) / (allowed_error() * np.abs(expected) + ABSOLUTE)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    if not excess[worst] <= 1:  # also when it is NaN
        pytest.fail(
            f"{np.sum(~(excess <= 1))} of {excess.size} are wrong; worst at gate {gate[worst]:g} and "
            f"up {up[worst]:g}: {output[worst]:g} instead of {expected[worst]:g}"
        )


VARIANTS = [(0.0, 0.0), (10.0, 0.0), (7.0, 1.702), (0.0, 1.702), (0.5, 0.0), (3.0, 0.25)]


@pytest.mark.parametrize(("limit", "alpha"), VARIANTS)
def test_every_bf16_gate_with_an_up_of_one(limit, alpha):
    assert_follows_formula(every_bf16(), to_bf16(np.ones((N, N), np.float32)), limit, alpha)


@pytest.mark.parametrize(("limit", "alpha"), VARIANTS)
def test_ordinary_gates_and_ups_on_both_sides_of_the_limit(limit, alpha):
    rng = np.random.default_rng(1)
    gate, up = (to_bf16(rng.uniform(-20, 20, (N, N)).astype(np.float32)) for _ in range(2))
    assert_follows_formula(gate, up, limit, alpha)


@pytest.mark.parametrize(("limit", "alpha"), [(10.0, 0.0), (7.0, 1.702)])
@pytest.mark.parametrize("part", ["gate", "up"])
def test_clamping_does_not_hide_nan(part, limit, alpha):
    experts = random_experts(1, 2, 64, 64)
    call = random_call(1, experts, 20, top_k=2)
    getattr(experts, part)[1, 7, 3] = to_bf16(np.float32(np.nan))
    output = run(build_layer(ENGINE, experts, swiglu_limit=limit, swiglu_alpha=alpha), call)
    chosen = (call.ids == 1).any(axis=1)
    assert np.isnan(output[chosen]).all()
    assert np.isfinite(output[~chosen]).all()
