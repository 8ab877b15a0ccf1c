"""What every kernel test shares: experts and calls as numpy arrays, a layer made from them, a float64
reference.

No torch here: the same files run under an emulator of an older CPU (test_old_cpus.py), where torch is slow
and may use instructions the emulator lacks. bf16 travels as uint16 bits.

    experts = random_experts(seed, count, hidden, intermediate)     weights of one layer
    call = random_call(seed, experts, tokens, top_k)                hidden states, expert ids, routing weights
    layer = build_layer(engine, experts)                            packed in the extension
    output = run(layer, call)                                       float32 [tokens, hidden]
    assert nmse(output, reference(experts, call)) <= NMSE_BOUND

Environment: KT_TEST_EXTENSION names a built extension file to test instead of the installed one;
KT_TEST_SWEEP=small keeps to the shapes and token counts that an emulator gets through in seconds.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

# Promise of the BF16 method: normalised mean squared error against the decoded weights and double sums.
NMSE_BOUND = 1e-5

BF16, F16, F32 = 0, 1, 2  # dtype codes of the extension
STORAGE = {BF16: np.uint16, F16: np.float16, F32: np.float32}

SMALL_SWEEP = os.environ.get("KT_TEST_SWEEP") == "small"

TOKEN_COUNTS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 33, 64, 118, 256, 1024)
# (hidden, intermediate): the sizes of real models, then sizes that fill no panel of 32 and no vector.
SHAPES = (
    *[(hidden, intermediate) for hidden in (64, 192, 576, 768) for intermediate in (64, 192, 576, 768)],
    *[(64, 7168), (7168, 64), (768, 2048), (2048, 768), (2048, 2048), (7168, 2048), (2048, 7168)],
    *[(1, 1), (2, 1), (31, 65), (33, 70), (72, 40), (100, 33), (577, 191), (2050, 97), (95, 7169)],
)
if SMALL_SWEEP:
    TOKEN_COUNTS = (0, 1, 2, 3, 7, 16, 33)
    SHAPES = ((64, 64), (192, 576), (768, 64), (1, 1), (33, 70), (72, 40), (100, 33))


def load_extension():
    path = os.environ.get("KT_TEST_EXTENSION")
    if not path:
        from kt_kernel import kt_kernel_ext

        return kt_kernel_ext
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ext = load_extension()


# ---- bf16 ---------------------------------------------------------------------------------------


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    """float values -> the storage of a dtype code, rounded to nearest even."""
    return to_bf16(values) if dtype == BF16 else values.astype(STORAGE[dtype])


def decode(stored: np.ndarray, dtype: int) -> np.ndarray:
    return from_bf16(stored) if dtype == BF16 else stored.astype(np.float32)


# ---- experts and calls --------------------------------------------------------------------------


@dataclass
class Experts:
    """bf16 bits: gate, up [E, intermediate, hidden], down [E, hidden, intermediate], all C-contiguous."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray

    @property
    def count(self) -> int:
        return self.gate.shape[0]

    @property
    def hidden(self) -> int:
        return self.gate.shape[2]

    @property
    def intermediate(self) -> int:
        return self.gate.shape[1]


@dataclass
class Call:
    """hidden [tokens, hidden] as `hidden_dtype` stores it; ids (int32/int64), float32 weights [tokens, k]."""

    hidden: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    hidden_dtype: int = field(default=BF16)

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    def rows(self, which) -> Call:
        """A copy for some of the tokens (a slice or a list of indices)."""
        copies = (np.array(a[which], order="C") for a in (self.hidden, self.ids, self.weights))
        return Call(*copies, self.hidden_dtype)

    def with_hidden(self, values: np.ndarray, dtype: int = BF16) -> Call:
        return replace(self, hidden=encode(values, dtype), hidden_dtype=dtype)


def _scaled_bits(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random bf16 of variance 1/columns: layers neither grow nor shrink. Truncated, which is quicker."""
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= shape[-1] ** -0.5
    return np.ascontiguousarray(values.view(np.uint16)[..., 1::2])


def random_experts(seed: int, count: int, hidden: int, intermediate: int) -> Experts:
    rng = np.random.default_rng(seed)
    return Experts(
        _scaled_bits(rng, count, intermediate, hidden),
        _scaled_bits(rng, count, intermediate, hidden),
        _scaled_bits(rng, count, hidden, intermediate),
    )


def mixed_ids(rng: np.random.Generator, tokens: int, top_k: int, count: int) -> np.ndarray:
    """Independent draws: an expert may be twice in a token; one in ten is -1; every ninth token is all -1."""
    ids = rng.integers(0, count, (tokens, top_k), dtype=np.int64)
    ids[rng.random((tokens, top_k)) < 0.1] = -1
    ids[8::9] = -1
    return ids


def random_call(seed: int, experts: Experts, tokens: int, top_k: int) -> Call:
    rng = np.random.default_rng(seed)
    return Call(
        to_bf16(rng.standard_normal((tokens, experts.hidden), dtype=np.float32)),
        mixed_ids(rng, tokens, top_k, experts.count),
        rng.random((tokens, top_k), dtype=np.float32),
    )


# ---- the extension ------------------------------------------------------------------------------


def addresses(matrices: np.ndarray) -> list[int]:
    return [matrix.ctypes.data for matrix in matrices]


def make_layer(engine, experts: Experts, **changes):
    """A layer with the sizes of `experts`, not yet loaded."""
    arguments = {
        "method": "BF16",
        "num_experts": experts.count,
        "top_k": min(2, experts.count),
        "hidden": experts.hidden,
        "intermediate": experts.intermediate,
        "max_tokens": 1024,
    }
    return ext.MoeLayer(engine, **{**arguments, **changes})


def load(layer, experts: Experts) -> None:
    layer.load_experts_bf16(addresses(experts.gate), addresses(experts.up), addresses(experts.down))


def build_layer(engine, experts: Experts, **changes):
    layer = make_layer(engine, experts, **changes)
    load(layer, experts)
    return layer


def arguments(call: Call, output: np.ndarray, output_dtype: int, accumulate: int = 0) -> tuple:
    """The positional arguments of forward and submit. The arrays must outlive the call."""
    return (
        call.tokens,
        call.top_k,
        call.hidden.ctypes.data,
        call.hidden_dtype,
        call.ids.ctypes.data,
        {np.dtype(np.int32): 0, np.dtype(np.int64): 1}[call.ids.dtype],
        call.weights.ctypes.data,
        output.ctypes.data,
        output_dtype,
        accumulate,
    )


def poisoned(shape: tuple[int, ...], dtype: int) -> np.ndarray:
    """An output buffer full of NaN: what the kernels leave unwritten is seen."""
    return encode(np.full(shape, np.nan, np.float32), dtype)


def run(layer, call: Call, output_dtype: int = F32) -> np.ndarray:
    """forward() into a poisoned output; returns it as stored (uint16 bits for bf16)."""
    output = poisoned(call.hidden.shape, output_dtype)
    layer.forward(*arguments(call, output, output_dtype))
    return output


# ---- the slow reference -------------------------------------------------------------------------


def activation(gate: np.ndarray, up: np.ndarray, limit: float, alpha: float) -> np.ndarray:
    """SwiGLU and its two variants: clamped (limit > 0) and "swigluoai" (alpha > 0)."""
    with np.errstate(over="ignore"):
        if alpha > 0:
            if limit > 0:
                gate, up = np.clip(gate, -limit, limit), np.clip(up, -limit, limit)
            return gate / (1 + np.exp(-alpha * gate)) * (up + 1)
        if limit > 0:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate / (1 + np.exp(-gate)) * up


def reference(
    experts: Experts, call: Call, limit: float = 0.0, alpha: float = 0.0, on_device: Collection[int] = ()
) -> np.ndarray:
    """The layer in float64 from exactly decoded weights; only the hidden states are rounded, to bf16."""
    hidden = from_bf16(to_bf16(decode(call.hidden, call.hidden_dtype))).astype(np.float64)
    output = np.zeros(hidden.shape)
    for expert in np.unique(call.ids):
        if expert < 0 or expert in on_device:
            continue
        gate, up, down = (
            from_bf16(m[expert]).astype(np.float64) for m in (experts.gate, experts.up, experts.down)
        )
        tokens, places = np.nonzero(call.ids == expert)
        rows = hidden[tokens]
        product = activation(rows @ gate.T, rows @ up.T, limit, alpha) @ down.T
        product *= call.weights[tokens, places, None].astype(np.float64)
        for place in range(call.top_k):  # a token is at most once in a place, so += adds every row
            output[tokens[places == place]] += product[places == place]
    return output


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    """0 when both are all zeros, inf when only the reference is, NaN when the output holds NaN."""
    error = np.square(actual.astype(np.float64) - expected).sum()
    energy = np.square(expected).sum()
    return float(error / energy) if energy else (0.0 if error == 0 else np.inf)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
