"""What every kernel test shares: experts and calls as numpy arrays, a layer made from them, a float64
reference. The formats of weights are in formats.py.

No torch here: the same files run under an emulator of an older CPU (test_old_cpus.py), where torch is slow
and may use instructions the emulator lacks. bf16 travels as uint16 bits.

    experts = random_experts(seed, count, hidden, intermediate, format)   weights of one layer
    call = random_call(seed, experts, tokens, top_k)                      hidden states, ids, routing weights
    layer = build_layer(engine, experts)                                  packed in the extension
    output = run(layer, call)                                             float32 [tokens, hidden]
    assert_close(format, output, reference(experts, call))     NMSE within the promise

Environment: KT_TEST_EXTENSION names a built extension file to test instead of the installed one;
KT_TEST_SWEEP=small keeps to the shapes and token counts that an emulator gets through in seconds,
KT_TEST_SWEEP=capped to fewer formats with int8 activations.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from extension import ext
from formats import (
    BF16,
    CODES,
    F32,
    ONE_PER_METHOD,
    ONE_PER_PATH,
    PATHS,
    PLAIN,
    SMALL_SWEEP,
    Format,
    Matrix,
    decode,
    encode,
    from_bf16,
    random_matrix,
    to_bf16,
)
from gguf_blocks import GGUF_METHOD, GgufFormat

# Promise of every method by its activations: normalised mean squared error of a layer against decoded weights
# and double sums.
NMSE_BOUNDS = {"bf16": 1e-5, "int8": 2e-4}
MANY_TOKENS = 60  # whose average is one

TOKEN_COUNTS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 33, 64, 118, 256, 1024)
# (hidden, intermediate): the sizes of real models, then sizes that fill no panel of 32 and no vector.
SHAPES = (
    *[(hidden, intermediate) for hidden in (64, 192, 576, 768) for intermediate in (64, 192, 576, 768)],
    *[(64, 7168), (7168, 64), (768, 2048), (2048, 768), (2048, 2048), (7168, 2048), (2048, 7168)],
    *[(1, 1), (2, 1), (31, 65), (33, 70), (72, 40), (100, 33), (577, 191), (2050, 97), (95, 7169)],
)
# The same for the other methods: fewer, as the loops around the decoding are those of BF16. 5 tokens of an
# expert are the first that share decoded weights. Sizes are rounded up to what the format allows.
METHOD_TOKEN_COUNTS = (0, 1, 2, 3, 4, 5, 8, 12, 13, 16, 33, 64, 118, 256)
METHOD_SHAPES = (
    *[(64, 64), (192, 576), (2048, 768), (64, 4096)],
    *[(1, 1), (31, 65), (33, 70), (100, 33), (129, 127), (300, 130), (577, 191), (95, 1409)],
)
# And for formats that differ from one of these in the scales alone.
SCALE_SHAPES = ((72, 300), (640, 160))
# With int8 activations: the loops are the same again, the kernels' ways of few and many tokens are not.
INT8_SHAPES = ((192, 576), (33, 70), (300, 130), (95, 1409))
INT8_TOKEN_COUNTS = (1, 3, 5, 12, 33, 118)
if SMALL_SWEEP:
    TOKEN_COUNTS = (0, 1, 2, 3, 7, 16, 33)
    SHAPES = ((64, 64), (192, 576), (768, 64), (1, 1), (33, 70), (72, 40), (100, 33))
    METHOD_TOKEN_COUNTS = (1, 2, 5, 33)
    METHOD_SHAPES, SCALE_SHAPES = ((64, 64), (33, 70), (300, 130)), ((72, 300),)
    INT8_SHAPES, INT8_TOKEN_COUNTS = ((33, 70), (300, 130)), (1, 5, 18)


def shapes(format: Format) -> tuple[tuple[int, int], ...]:
    if format == PLAIN:
        return SHAPES
    if format in ONE_PER_METHOD:
        # The codes and kernels of these are those of RAWINT4.
        return METHOD_SHAPES[1::2] if format.method in ("GPTQ_INT4", "AMXINT4") else METHOD_SHAPES
    return INT8_SHAPES if format in ONE_PER_PATH else SCALE_SHAPES


def every_format_and_shape(formats: tuple[Format, ...] = PATHS) -> list:
    """Parameters (format, hidden, intermediate)."""
    seen = {
        (format, format.fit(hidden), format.fit(intermediate)): None
        for format in formats
        for hidden, intermediate in shapes(format)
    }
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}x{case[2]}") for case in seen]


def token_counts(format: Format) -> tuple[int, ...]:
    if format.activations == "int8":
        return INT8_TOKEN_COUNTS
    return TOKEN_COUNTS if format == PLAIN else METHOD_TOKEN_COUNTS


# ---- experts and calls --------------------------------------------------------------------------


@dataclass
class Experts:
    """One layer: gate and up of [intermediate, hidden], down of [hidden, intermediate], for every expert."""

    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def format(self) -> Format:
        return self.gate.format

    @property
    def count(self) -> int:
        return len(self.gate.weight)

    @property
    def hidden(self) -> int:
        return self.gate.columns

    @property
    def intermediate(self) -> int:
        return self.gate.rows

    @property
    def parts(self) -> tuple[Matrix, Matrix, Matrix]:
        return self.gate, self.up, self.down


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


def random_experts(seed: int, count: int, hidden: int, intermediate: int, format: Format = PLAIN) -> Experts:
    """Sizes that the format cannot have as a number of columns are rounded up."""
    rng = np.random.default_rng(seed)
    hidden, intermediate = format.fit(hidden), format.fit(intermediate)

    def matrix(rows: int, columns: int):
        if isinstance(format, GgufFormat):
            return format.random_matrix(rng, count, rows, columns)
        return random_matrix(rng, format, count, rows, columns)

    return Experts(matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate))


def bf16_experts(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Experts:
    """Experts from bf16 bits [E, rows, columns]."""
    return Experts(*(PLAIN.matrix(bits) for bits in (gate, up, down)))


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


def chosen_kernels() -> dict[str, dict[str, str]]:
    """method -> kind of activations -> the kernels that this process multiplies them with.

    A method of several formats has them under their names: "LLAMAFILE Q4_K".
    """
    chosen: dict[str, dict[str, str]] = {}
    for row in ext.dispatch_table():
        if row["state"] != "unavailable":
            several = row["method"] == GGUF_METHOD
            name = f"{row['method']} {row['format']}" if several else row["method"]
            chosen.setdefault(name, {}).setdefault(row["activations"], row["kernel"])
    return chosen


def keeps_swiglu_in_fp32(format: Format) -> bool:
    """Kernels that multiply pairs of bf16 (AVX512-BF16, AMX) round the SwiGLU outputs to bf16."""
    return chosen_kernels()[format.method][format.activations].endswith((".avx2", ".avx512"))


def make_layer(engine, experts: Experts, **changes):
    """A layer with the sizes of `experts`, not yet loaded."""
    arguments = {
        "method": experts.format.method,
        "activations": experts.format.activations,
        "num_experts": experts.count,
        "top_k": min(2, experts.count),
        "hidden": experts.hidden,
        "intermediate": experts.intermediate,
        "max_tokens": 1024,
    }
    return ext.MoeLayer(engine, **{**arguments, **changes})


def load_pointers(layer, experts: Experts, gate: list, up: list, down: list) -> None:
    """load_experts of pointers, with the group size and scale dtype of `experts`, or its types of blocks."""
    names = [part.format.type for part in experts.parts] if isinstance(experts.format, GgufFormat) else []
    layer.load_experts(
        gate,
        up,
        down,
        formats=names,
        group_size=experts.format.group,
        scale_dtype=experts.format.scale_dtype,
    )


def load(layer, experts: Experts) -> None:
    load_pointers(layer, experts, *(part.pointers() for part in experts.parts))


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
        if limit > 0:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        if alpha > 0:
            return gate / (1 + np.exp(-alpha * gate)) * (up + 1)
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
        gate, up, down = (part.decoded(expert) for part in experts.parts)
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


def assert_close(format: Format, output: np.ndarray, expected: np.ndarray, dtype: int = F32) -> None:
    """Within the promise for these activations. For int8 numbers it is one for an average, which few
    tokens may miss: 2.6e-4 with int8 activations, 1.2e-5 with int8 codes and bf16 activations.
    """
    error, bound = nmse(decode(output, dtype), expected), NMSE_BOUNDS[format.activations]
    if len(output) < MANY_TOKENS and "int8" in (format.activations, CODES[format.method]):
        bound *= 2
    assert error <= bound, f"NMSE {error:.2e} is above {bound:.0e}"


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
