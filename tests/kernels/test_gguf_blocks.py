"""Risk: a number of a GGUF block is multiplied as another by the kernels that multiply blocks as they are, or
memory beside a mapped matrix is read.

Every ggml type, with activations in fp32, against what the gguf package reads in the same blocks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
from extension import ext
from formats import F32, SMALL_SWEEP, to_bf16
from guarded_memory import GuardedArray
from harness import (
    NMSE_BOUNDS,
    Call,
    Experts,
    arguments,
    nmse,
    poisoned,
    random_call,
    reference,
    run,
    same_bits,
)
from isolation import isolated
from test_gguf_types import HALVES, TYPES, by_gguf, put_halves

ENGINE = ext.Engine(2)
NAMES = tuple(TYPES)
PLAIN = ("F32", "F16", "BF16")
# Each way to be read: 16 and 32 columns to a scale, with and without lows, blocks of 1, 32, 64 and 256.
SAMPLE = ("Q5_1", "NVFP4", "Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ1_M", "TQ1_0", "F16")
MIXED = [("IQ2_XXS", "IQ3_S", "Q6_K"), ("Q4_K", "Q4_K", "F16"), ("NVFP4", "MXFP4", "IQ1_S")]
# Sums are in fp32, and so are the outputs of SwiGLU: far below what is promised.
NMSE_BOUND = 1e-11


@dataclass
class Blocks:
    """One projection of all experts: weight uint8 [experts, rows, bytes of a row]."""

    name: str
    columns: int
    weight: np.ndarray

    @property
    def rows(self) -> int:
        return self.weight.shape[1]

    def numbers(self, expert: int) -> np.ndarray:
        """float32 [rows, columns], by the gguf package."""
        return by_gguf(self.name, self.weight[expert]).reshape(self.rows, self.columns)

    def decoded(self, expert: int) -> np.ndarray:
        return self.numbers(expert).astype(np.float64)

    def pointers(self) -> list[tuple[int, int, float]]:
        return [(weight.ctypes.data, 0, 1.0) for weight in self.weight]


def fit(name: str, size: int) -> int:
    """`size` rounded up to whole blocks."""
    columns = TYPES[name]["columns"]
    return -(-size // columns) * columns


def plain_bytes(name: str, values: np.ndarray) -> np.ndarray:
    stored = {"F32": values, "F16": values.astype(np.float16), "BF16": to_bf16(values)}[name]
    return np.ascontiguousarray(stored).view(np.uint8)


def random_blocks(name: str, rng: np.random.Generator, experts: int, rows: int, columns: int) -> Blocks:
    """Random codes under random scales of either sign; numbers of about the variance 1 / columns."""
    if name in PLAIN:
        values = rng.standard_normal((experts, rows, columns), np.float32) / np.float32(np.sqrt(columns))
        return Blocks(name, columns, plain_bytes(name, values))
    type_ = TYPES[name]
    count = experts * rows * columns // type_["columns"]
    blocks = rng.integers(0, 256, (count, type_["bytes"]), np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(119, 124, count)
    elif name == "NVFP4":
        blocks[:, :4] = rng.integers(0x08, 0x20, (count, 4))
    else:
        put_halves(name, blocks, np.ones(count, np.float16).view("<u2"))
        size = 1 / (by_gguf(name, blocks[:64]).std() * np.sqrt(columns))
        scales = size * np.exp2(rng.uniform(-1, 1, count)) * rng.choice([-1, 1], count)
        put_halves(name, blocks, scales.astype(np.float16).view("<u2"))
    return Blocks(name, columns, blocks.reshape(experts, rows, -1))


def random_experts(seed: int, count: int, hidden: int, intermediate: int, names: tuple[str, ...]) -> Experts:
    rng = np.random.default_rng(seed)
    gate, up, down = names
    return Experts(
        random_blocks(gate, rng, count, intermediate, hidden),
        random_blocks(up, rng, count, intermediate, hidden),
        random_blocks(down, rng, count, hidden, intermediate),
    )


def make_layer(engine, experts: Experts, **changes):
    sizes = {"num_experts": experts.count, "hidden": experts.hidden, "intermediate": experts.intermediate}
    defaults = {"method": "LLAMAFILE", "activations": "bf16", "top_k": 2, "max_tokens": 1024}
    return ext.MoeLayer(engine, **{**defaults, **sizes, **changes})


def build_layer(engine, experts: Experts, **changes):
    layer = make_layer(engine, experts, **changes)
    pointers = (part.pointers() for part in experts.parts)
    layer.load_experts(*pointers, formats=[part.name for part in experts.parts])
    return layer


def borrow(layer, experts: Experts) -> None:
    pointers = (part.pointers() for part in experts.parts)
    layer.borrow_experts(*pointers, formats=[part.name for part in experts.parts])


def sizes(name: str) -> tuple[int, int]:
    """(hidden, intermediate) that fill neither panels nor, where the type allows it, 256 columns."""
    return {1: (300, 77), 32: (352, 160), 64: (320, 192), 256: (512, 768)}[TYPES[name]["columns"]]


def test_multiplied_as_blocks():
    layer = build_layer(ENGINE, random_experts(1, 2, 256, 256, ("IQ2_XXS",) * 3))
    assert layer.kernels["experts"].startswith("blocks.")


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_multiplied_exactly(name):
    """Token t has h = 64 in place t and nothing else, so its output is 64 times column t of down."""
    size = fit(name, 160)
    matrix = random_blocks(name, np.random.default_rng(2), 1, size, size)
    identity = np.eye(size, dtype=np.float32)[None]
    gate, up = (Blocks("F32", size, plain_bytes("F32", scale * identity)) for scale in (64, 1))
    layer = build_layer(ENGINE, Experts(gate, up, matrix), top_k=1)
    call = Call(to_bf16(identity[0]), np.zeros((size, 1), np.int64), np.ones((size, 1), np.float32))
    together = run(layer, call)
    wrong = np.argwhere(matrix.numbers(0) != together.T / 64)
    assert len(wrong) == 0, f"{len(wrong)} numbers are wrong, the first at [row, column] = {wrong[0]}"
    for t in range(0, size, 29):
        assert same_bits(run(layer, call.rows([t])), together[[t]]), f"token {t} alone"


@pytest.mark.parametrize("name", NAMES)
def test_error_against_double_sums(name):
    experts = random_experts(3, 3, *sizes(name), (name,) * 3)
    call = random_call(3, experts, 90, top_k=2)
    expected = reference(experts, call)
    layer = build_layer(ENGINE, experts)
    # BF16 has panels, whose kernels may round SwiGLU's outputs to bf16.
    bound = NMSE_BOUND if layer.kernels["experts"].startswith("blocks.") else NMSE_BOUNDS["bf16"]
    for tokens in (1, 3, 12, 90):
        error = nmse(run(layer, call.rows(slice(tokens))), expected[:tokens])
        assert error <= bound, f"{tokens} tokens: NMSE {error:.2e}"


@pytest.mark.parametrize("names", MIXED, ids="-".join)
def test_each_matrix_may_have_its_own_type(names):
    experts = random_experts(4, 4, 512, 256, names)
    call = random_call(4, experts, 70, top_k=2)
    assert nmse(run(build_layer(ENGINE, experts), call), reference(experts, call)) <= NMSE_BOUND


@pytest.mark.parametrize("name", SAMPLE)
def test_a_token_has_the_same_bits_whatever_its_neighbours_and_threads(name):
    """Three experts for 300 tokens: K is cut into several calls."""
    hidden, tokens = (512, 40) if SMALL_SWEEP else (2304, 300)
    experts = random_experts(5, 3, hidden, fit(name, 96), (name,) * 3)
    call = random_call(5, experts, tokens, top_k=2)
    together = run(build_layer(ENGINE, experts), call)
    other = build_layer(ext.Engine(3, 2), experts)
    assert same_bits(run(other, call), together)
    for first, count in ((0, 1), (7, 2), (11, 4), (17, 13)):
        rows = [*range(first, first + count)]
        assert same_bits(run(other, call.rows(rows)), together[rows]), f"tokens {rows}"


def digest(name: str) -> str:
    experts = random_experts(6, 3, *sizes(name), (name,) * 3)
    layer = build_layer(ENGINE, experts)
    call = random_call(6, experts, 40, top_k=2)
    done = hashlib.sha256()
    for tokens in (1, 2, 40):
        done.update(run(layer, call.rows(slice(tokens))).tobytes())
    return f"{name} {done.hexdigest()}"


def print_digests() -> None:
    print("\n".join(map(digest, SAMPLE)))


def test_avx2_gives_the_same_bits():
    found = isolated("test_gguf_blocks", "print_digests", KT_KERNEL_CPU_VARIANT="avx2")
    assert found.splitlines()[-len(SAMPLE) :] == [digest(name) for name in SAMPLE]


# ---- blocks where they lie ----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", SAMPLE)
def test_borrowed_blocks_give_the_same_bits_and_nothing_beside_them_is_read(name, side):
    """Matrices that begin or end at a page without access, at the odd addresses of a file."""
    size = fit(name, 96)
    experts = random_experts(7, 2, size, size, (name,) * 3)
    call = random_call(7, experts, 30, top_k=2)
    packed = build_layer(ENGINE, experts)
    assert packed.weight_bytes == sum(part.weight.nbytes for part in experts.parts)
    guards = [[GuardedArray(weight, side) for weight in part.weight] for part in experts.parts]
    pointers = [[(guard.array.ctypes.data, 0, 1.0) for guard in part] for part in guards]
    layer = make_layer(ext.Engine(2, 2), experts)
    layer.borrow_experts(*pointers, formats=[name] * 3)
    for tokens in (1, 2, 30):
        rows = call.rows(slice(tokens))
        assert same_bits(run(layer, rows), run(packed, rows))
    del layer
    for part in guards:
        for guard in part:
            guard.close()


def test_rows_that_fill_no_panel_are_not_borrowed():
    experts = random_experts(8, 2, 64, 80, ("F16",) * 3)
    with pytest.raises(ValueError, match="gate of format F16 and 80 rows cannot be used where it lies"):
        borrow(make_layer(ENGINE, experts), experts)


# ---- the slow twin, writing back, numbers that are not finite --------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_reads_every_number_as_the_gguf_package_does(name):
    size = fit(name, 96)
    experts = random_experts(9, 2, size, size, (name,) * 3)
    call = random_call(9, experts, 2, top_k=2)
    output = poisoned(call.hidden.shape, F32)
    build_layer(ext.Engine(2, 2), experts, swiglu_limit=1.0).forward_reference(*arguments(call, output, F32))
    assert nmse(output, reference(experts, call, limit=1.0)) < 1e-13


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_written_back_is_every_number_rounded_once_to_bf16(name, ranks):
    """Half of down's columns may end within a block."""
    hidden, intermediate = fit(name, 70), fit(name, 96)
    experts = random_experts(10, 3, hidden, intermediate, (name,) * 3)
    layer = build_layer(ENGINE, experts)
    share = intermediate // ranks
    w13 = [np.zeros((2 * share, hidden), np.uint16) for _ in range(ranks)]
    w2 = [np.zeros((hidden, share), np.uint16) for _ in range(ranks)]
    w13_at, w2_at = ([array.ctypes.data for array in arrays] for arrays in (w13, w2))
    layer.write_expert(1, ranks, w13_at, [0] * ranks, w2_at, [0] * ranks)
    gate, up, down = (to_bf16(part.numbers(1)) for part in experts.parts)
    for rank in range(ranks):
        rows = slice(rank * share, (rank + 1) * share)
        assert same_bits(w13[rank], np.concatenate([gate[rows], up[rows]]))
        assert same_bits(w2[rank], np.ascontiguousarray(down[:, rows]))


@pytest.mark.parametrize("special", [0x7C00, 0x7E00], ids=["inf", "nan"])
@pytest.mark.parametrize("name", [name for name in SAMPLE if name in HALVES])
def test_a_scale_that_is_not_finite_spoils_its_own_row_alone(name, special):
    experts = random_experts(11, 1, fit(name, 64), fit(name, 96), (name,) * 3)
    call = random_call(11, experts, 20, top_k=1)
    call.ids[:] = 0
    clean = run(build_layer(ENGINE, experts), call)
    row = experts.down.weight[0, 5].reshape(-1, TYPES[name]["bytes"])
    put_halves(name, row[:1], np.array([special], "<u2"))
    spoilt = run(build_layer(ENGINE, experts), call)
    assert not np.isfinite(spoilt[:, 5]).any()
    spoilt[:, 5] = clean[:, 5]
    assert same_bits(spoilt, clean)


def test_impossible_matrices_are_one_sentence():
    experts = random_experts(12, 1, 256, 256, ("Q4_K",) * 3)
    pointers = [part.pointers() for part in experts.parts]
    with pytest.raises(ValueError, match="no weight format 'Q9_K' of method LLAMAFILE; there are Q8_0"):
        make_layer(ENGINE, experts, top_k=1).load_experts(*pointers, formats=["Q4_K", "Q4_K", "Q9_K"])
    with pytest.raises(ValueError, match=r"a matrix \[256, 320\] does not divide into blocks of 256 columns"):
        make_layer(ENGINE, experts, hidden=320, top_k=1).load_experts(*pointers, formats=["IQ1_S"] * 3)
