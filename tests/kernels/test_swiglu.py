"""Risk: an activation that is off for some gates (far from zero, near the clamp), or an ignored variant.

The layer is built so that its output is the activation itself: hidden states are unit vectors, token t picks
column t of gate and up, and down is the identity: one call evaluates 256 x 256 = every bf16 number as a gate.
"""

from __future__ import annotations

import numpy as np
import pytest
from formats import ONE_PER_METHOD, PATHS, PLAIN, Format, from_bf16, to_bf16
from harness import (
    NMSE_BOUNDS,
    Call,
    activation,
    bf16_experts,
    build_layer,
    ext,
    keeps_swiglu_in_fp32,
    nmse,
    random_call,
    random_experts,
    reference,
    run,
)

ENGINE = ext.Engine(2)
N = 256
# Allowed relative errors. fp32: a few ulp, and the rounding of alpha * gate (6e-8 of an exponent up to 87).
# Kernels that round SwiGLU outputs to bf16: half an ulp of that. Below 1e-30 being vanishingly small is all
# that counts.
FP32_ERROR, BF16_ERROR, ABSOLUTE = 8e-6, 2.0**-8, 1e-30


def allowed_error() -> float:
    return FP32_ERROR if keeps_swiglu_in_fp32(PLAIN) else FP32_ERROR + BF16_ERROR


def every_bf16() -> np.ndarray:
    """[256, 256] bits of all bf16 numbers up to 1e38 (so that nothing overflows), the others as zeros."""
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).reshape(N, N)
    return np.where(np.abs(from_bf16(bits)) <= 1e38, bits, 0).astype(np.uint16)


def activations(gate_bits: np.ndarray, up_bits: np.ndarray, **variant: float) -> np.ndarray:
    """act(gate, up) of two [256, 256] bf16 matrices, element by element, through a layer."""
    identity = to_bf16(np.eye(N, dtype=np.float32))
    experts = bf16_experts(gate_bits[None], up_bits[None], identity[None])
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


def far_bound(format: Format, limit: float) -> float:
    """Of gates and ups of about 30. Int8 puts them off by 0.1, which is much of what a limit leaves (5.2e-3
    seen)."""
    return 6e-3 if format.activations == "int8" and limit > 0 else NMSE_BOUNDS[format.activations]


def formats_and_variants() -> list:
    """Parameters (format, limit, alpha): two variants for each format, in turn."""
    places = range(2 * len(PATHS))
    return [
        pytest.param(PATHS[i // 2], *VARIANTS[i % 6], id=f"{PATHS[i // 2]}-{VARIANTS[i % 6]}") for i in places
    ]


@pytest.mark.parametrize(("format", "limit", "alpha"), formats_and_variants())
def test_every_method_obeys_limit_and_alpha(format, limit, alpha):
    """Gates and ups of about +-30, so that no variant gives the result of another."""
    experts = random_experts(2, 4, 64, 96, format)
    call = random_call(2, experts, 40, top_k=2)
    call = call.with_hidden(30 * from_bf16(call.hidden))
    expected = reference(experts, call, limit, float(np.float32(alpha)))
    bound = far_bound(format, limit)
    if (limit, alpha) != (0, 0):
        assert nmse(reference(experts, call), expected) > 3 * bound
    output = run(build_layer(ENGINE, experts, swiglu_limit=limit, swiglu_alpha=alpha), call)
    assert nmse(output, expected) <= bound


@pytest.mark.parametrize(("limit", "alpha"), [(10.0, 0.0), (7.0, 1.702)])
@pytest.mark.parametrize("part", ["gate", "up"])
@pytest.mark.parametrize("format", [f for f in ONE_PER_METHOD if f.codes == "e4m3"] + [PLAIN], ids=str)
def test_clamping_does_not_hide_nan(format, part, limit, alpha):
    experts = random_experts(1, 2, 64, 64, format)
    call = random_call(1, experts, 20, top_k=2)
    getattr(experts, part).weight[1, 7, 3] = 0x7FC0 if format == PLAIN else 0xFF
    output = run(build_layer(ENGINE, experts, swiglu_limit=limit, swiglu_alpha=alpha), call)
    chosen = (call.ids == 1).any(axis=1)
    assert np.isnan(output[chosen]).all()
    assert np.isfinite(output[~chosen]).all()
