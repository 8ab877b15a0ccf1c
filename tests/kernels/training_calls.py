"""Calls of training, and their gradients in float64 from exactly decoded weights.

    case = training_case(seed, experts, tokens, top_k, rank)       a call, a LoRA, the output's gradient
    found = compute(layer, case)                                    by the kernels: forward, then backward
    expected = reference(experts, case, limit, alpha, biases)       by the definition

Results are dictionaries of arrays: output, hidden [T, H], weights [T, k], the six of the LoRA (LORA) and,
where they are wanted, those of the base matrices (BASE).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from extension import ext
from formats import BF16, F32, decode, encode, to_bf16
from harness import Call, Experts, poisoned, random_call

BASE = ("gate", "up", "down")
LORA = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
SCALE = 0.75


@dataclass
class Case:
    """`lora`: float32 arrays by name, or none; `gradient`: of the output, as the hidden states are stored."""

    call: Call
    lora: dict[str, np.ndarray] | None
    gradient: np.ndarray
    scale: float = SCALE
    experts: int = 0

    @property
    def rank(self) -> int:
        return self.lora["gate_a"].shape[1]

    @property
    def pairs(self) -> int:
        return int((self.call.ids >= 0).sum())

    def with_ids(self, ids: np.ndarray) -> Case:
        return replace(self, call=replace(self.call, ids=np.ascontiguousarray(ids.astype(np.int64))))


def lora_shapes(experts: Experts, rank: int) -> dict[str, tuple[int, int, int]]:
    e, h, i = experts.count, experts.hidden, experts.intermediate
    a, b = {"gate": h, "up": h, "down": i}, {"gate": i, "up": i, "down": h}
    return {
        name: (e, rank, a[name[:-2]]) if name.endswith("_a") else (e, b[name[:-2]], rank) for name in LORA
    }


def training_case(seed: int, experts: Experts, tokens: int, top_k: int, rank: int, dtype: int = BF16) -> Case:
    """Random; rank 0 = no LoRA. What the LoRA adds is about as large as the products it joins."""
    rng = np.random.default_rng(seed)
    call = random_call(seed, experts, tokens, top_k)
    call = call.with_hidden(decode(call.hidden, BF16), dtype)

    def random(shape: tuple[int, ...]) -> np.ndarray:
        size = shape[2] ** -0.5
        return (rng.standard_normal(shape) * size).astype(np.float32)

    lora = {name: random(shape) for name, shape in lora_shapes(experts, rank).items()} if rank else None
    gradient = rng.standard_normal((tokens, experts.hidden), dtype=np.float32)
    return Case(call, lora, encode(decode(to_bf16(gradient), BF16), dtype), experts=experts.count)


def compute(
    layer,
    case: Case,
    intermediate: int,
    saved_dtype: int | None = None,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, np.ndarray]:
    """Forward into poisoned memory, then the gradients in `wanted`, by default all."""
    call, dtype = case.call, case.call.hidden_dtype
    wanted = ("hidden", "weights", *(LORA if case.lora else ())) if wanted is None else wanted
    width = call.hidden.shape[1]
    base = {
        name: np.zeros((case.experts, *sizes), np.float32)
        for name, sizes in zip(BASE, 2 * [(intermediate, width)] + [(width, intermediate)], strict=True)
    }
    saved_dtype = dtype if saved_dtype is None else saved_dtype
    columns = -(-intermediate // 32) * 32
    gate, up = (poisoned((case.pairs, columns), saved_dtype) for _ in range(2))
    projected = poisoned((3, case.pairs, case.rank if case.lora else 0), F32)
    output, hidden = (poisoned(call.hidden.shape, dtype) for _ in range(2))
    weights = np.zeros(call.weights.shape, np.float32)
    gradients = {name: np.zeros_like(tensor) for name, tensor in (case.lora or {}).items()}
    lora = None
    if case.lora:
        lora = ([case.lora[name].ctypes.data for name in LORA], case.rank, case.scale, [])
    shared = {
        "tokens": call.tokens,
        "top_k": call.top_k,
        "dtype": dtype,
        "hidden": call.hidden.ctypes.data,
        "ids": call.ids.ctypes.data,
        "weights": call.weights.ctypes.data,
        "lora": lora,
        "saved": (gate.ctypes.data, up.ctypes.data, saved_dtype, projected.ctypes.data),
    }
    ext.training_forward(layer, output=output.ctypes.data, **shared)
    ext.training_backward(
        layer,
        output_gradient=case.gradient.ctypes.data,
        hidden_gradient=hidden.ctypes.data if "hidden" in wanted else 0,
        weight_gradient=weights.ctypes.data if "weights" in wanted else 0,
        lora_gradients=[gradients[n].ctypes.data for n in LORA] if LORA[0] in wanted else None,
        base_gradients=[base[n].ctypes.data for n in BASE] if BASE[0] in wanted else [],
        **shared,
    )
    found = {"output": output, "hidden": hidden, "weights": weights, **gradients, **base}
    return {
        name: decode(array, dtype) if name in ("output", "hidden") else array
        for name, array in found.items()
        if name in ("output", *wanted)
    }


def reference(
    experts: Experts,
    case: Case,
    limit: float = 0.0,
    alpha: float = 0.0,
    biases: tuple[np.ndarray, ...] | None = None,
) -> dict[str, np.ndarray]:
    call, dtype = case.call, case.call.hidden_dtype
    x, dout = (decode(stored, dtype).astype(np.float64) for stored in (call.hidden, case.gradient))
    found = {
        "output": np.zeros(x.shape),
        "hidden": np.zeros(x.shape),
        "weights": np.zeros(call.weights.shape),
    }
    lora = {name: tensor.astype(np.float64) for name, tensor in (case.lora or {}).items()}
    found |= {name: np.zeros(tensor.shape) for name, tensor in lora.items()}
    found |= {
        name: np.zeros((experts.count, part.rows, part.columns))
        for name, part in zip(BASE, experts.parts, strict=True)
    }
    for e in range(experts.count):
        tokens, places = np.nonzero(call.ids == e)
        if len(tokens) == 0:
            continue
        matrices = [
            _Matrix(
                part.decoded(e),
                *((lora[f"{name}_a"][e], lora[f"{name}_b"][e]) if lora else (None, None)),
                case.scale,
                0.0 if biases is None else biases[which][e].astype(np.float64),
            )
            for which, (name, part) in enumerate(zip(("gate", "up", "down"), experts.parts, strict=True))
        ]
        w = call.weights[tokens, places, None].astype(np.float64)
        rows = _gradients(matrices, x[tokens], w, dout[tokens], limit, alpha)
        for name, value in rows.items():
            if name in ("output", "hidden"):
                np.add.at(found[name], tokens, value)
            elif name == "weights":
                found[name][tokens, places] = value
            elif name in BASE or lora:
                found[name][e] = value
    return found


@dataclass
class _Matrix:
    weight: np.ndarray
    a: np.ndarray | None
    b: np.ndarray | None
    scale: float
    bias: np.ndarray | float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        low = 0 if self.a is None else self.scale * (x @ self.a.T) @ self.b.T
        return x @ self.weight.T + low + self.bias

    def transposed(self, d: np.ndarray) -> np.ndarray:
        return d @ self.weight + (0 if self.a is None else self.scale * (d @ self.b) @ self.a)

    def gradients(self, d: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.a is None:
            return np.zeros(0), np.zeros(0)
        return self.scale * (d @ self.b).T @ x, self.scale * d.T @ (x @ self.a.T)


def _gradients(matrices, x, w, dout, limit: float, alpha: float) -> dict[str, np.ndarray]:
    gate, up, down = matrices
    g, u = gate(x), up(x)
    passes_g, passes_u = np.ones_like(g), np.ones_like(u)
    if limit:
        passes_g, passes_u = (g <= limit) * 1.0, (np.abs(u) <= limit) * 1.0
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    slope, beside = (alpha, u + 1) if alpha else (1.0, u)
    sigmoid = 1 / (1 + np.exp(-slope * g))
    h = g * sigmoid * beside
    y = down(h)
    dh = down.transposed(dout)
    dg = w * dh * beside * sigmoid * (1 + slope * g * (1 - sigmoid)) * passes_g
    du = w * dh * g * sigmoid * passes_u
    found = {"output": w * y, "hidden": gate.transposed(dg) + up.transposed(du), "weights": (y * dout).sum(1)}
    found["gate_a"], found["gate_b"] = gate.gradients(dg, x)
    found["up_a"], found["up_b"] = up.gradients(du, x)
    found["down_a"], found["down_b"] = down.gradients(w * dout, h)
    found |= {"gate": dg.T @ x, "up": du.T @ x, "down": (w * dout).T @ h}
    return found


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float = 0.01) -> None:
    """Relative L2 at most `bound` and, at the usual bound, cosine at least 0.9999, for each result."""
    for name, array in found.items():
        a, b = array.astype(np.float64), expected[name]
        size = np.linalg.norm(b)
        if size == 0:
            assert not a.any(), f"{name} is not zero"
            continue
        error = np.linalg.norm(a - b) / size
        cosine = (a * b).sum() / (np.linalg.norm(a) * size)
        assert error <= bound and (cosine >= 0.9999 or bound > 0.01), (
            f"{name}: {error:.2e}, cosine {cosine:.6f}"
        )
