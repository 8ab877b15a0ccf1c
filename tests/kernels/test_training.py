"""Risk: a gradient is wrong.

The training forward and every gradient, against float64 from exactly decoded weights (training_calls.py): all
formats, odd calls and sizes, exact whole numbers, limits of SwiGLU, biases, and the bits for any threads.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from formats import BF16, F16, F32, ONE_PER_METHOD, PLAIN, SMALL_SWEEP, SWEEP, Format, by_int8, to_bf16
from gguf_blocks import PANEL_TYPES, GgufFormat
from harness import Call, bf16_experts, build_layer, ext, random_experts
from test_biases import load_with_biases, random_biases
from training_calls import BASE, LORA, Case, assert_close, compute, lora_shapes, reference, training_case

ENGINE = ext.Engine(2)
RANKS = (1, 3, 8, 64)
SIZES = ((100, 70), (300, 130), (64, 577), (1100, 96))
if SMALL_SWEEP:
    SIZES = SIZES[:1]
# Steps of scales that end within a strip of columns, one scale a row, other stored types.
SCALES = (
    Format("RAWINT4", 48, BF16),
    Format("GPTQ_INT4", 16, BF16),
    Format("AMXINT8", 32),
    Format("RAWINT4"),
)
GGUF = [GgufFormat(type, activations) for type in PANEL_TYPES for activations in ("int8", "bf16")]
# With one scale a row, backward multiplies by int8 activations too.
INTEGERS = by_int8(
    [Format("AMXINT8"), Format("AMXINT4"), Format("RAWINT4", 0, BF16), Format("GPTQ_INT4", 0, F16)]
)


def sampled_formats() -> list:
    """(format, hidden, intermediate, rank): each format once, with sizes and ranks in turn."""
    formats = [*ONE_PER_METHOD, *SCALES, *INTEGERS, *by_int8(ONE_PER_METHOD[4:5]), *GGUF]
    if SWEEP != "all":
        formats = [*ONE_PER_METHOD, *SCALES[:2], *INTEGERS[:2], *GGUF[::5]]
    return [
        pytest.param(format, *SIZES[i % len(SIZES)], RANKS[i // 2 % len(RANKS)], id=f"{format}-{i}")
        for i, format in enumerate(formats)
    ]


def tolerance(format) -> float:
    return 0.02 if format.activations == "int8" else 0.01


@pytest.mark.parametrize("format, hidden, intermediate, rank", sampled_formats())
def test_gradients_of_every_format(format, hidden, intermediate, rank):
    experts = random_experts(1, 3, hidden, intermediate, format)
    case = training_case(2, experts, 40, 2, rank)
    found = compute(build_layer(ENGINE, experts), case, experts.intermediate)
    assert_close(found, reference(experts, case), tolerance(format))


@pytest.mark.parametrize("rank", (0, *RANKS))
@pytest.mark.parametrize("dtype", (BF16, F32))
def test_every_rank_and_dtype(rank, dtype):
    experts = random_experts(3, 4, 65, 33)
    case = training_case(4, experts, 70, 3, rank, dtype)
    assert_close(compute(build_layer(ENGINE, experts), case, 33), reference(experts, case))


@pytest.mark.parametrize("hidden, intermediate", ((100, 70), (64, 577)))
@pytest.mark.parametrize("rank", (0, 3))
def test_gradients_of_base_matrices(hidden, intermediate, rank):
    experts = random_experts(28, 4, hidden, intermediate)
    case = training_case(29, experts, 90, 2, rank)
    case = case.with_ids(np.where(case.call.ids == 1, -1, case.call.ids))  # expert 1 has no tokens
    found = compute(build_layer(ENGINE, experts), case, intermediate, wanted=("hidden", *BASE))
    assert_close(found, reference(experts, case))


def all_to_one(ids):
    return np.where(ids >= 0, 2, ids)


def twice_in_each_row(ids):
    return np.repeat(ids[:, :1], ids.shape[1], axis=1)


def mostly_skipped(ids):
    return np.where(np.arange(ids.size).reshape(ids.shape) % 7 == 3, ids, -1)


@pytest.mark.parametrize("change", (all_to_one, twice_in_each_row, mostly_skipped), ids=lambda f: f.__name__)
def test_odd_routing(change):
    experts = random_experts(5, 6, 100, 70)
    case = training_case(6, experts, 90, 3, 8)
    case = case.with_ids(change(case.call.ids))
    assert_close(compute(build_layer(ENGINE, experts), case, 70), reference(experts, case))


@pytest.mark.parametrize("intermediate", (1, 32, 200))
def test_one_token(intermediate):
    experts = random_experts(7, 3, 40, intermediate)
    case = training_case(8, experts, 1, 3, 3).with_ids(np.array([[2, 0, 1]]))
    found = compute(build_layer(ENGINE, experts), case, intermediate)
    expected = reference(experts, case)
    # The numbers of three sums: what cancels in them leaves the error of bf16.
    small = {name: found.pop(name) for name in ("weights",)}
    assert_close(found, expected)
    bound = 0.02 * np.linalg.norm(case.gradient.astype(np.float64)) * np.linalg.norm(expected["output"])
    assert np.abs(small["weights"] - expected["weights"]).max() <= bound


def test_nothing_to_do():
    experts = random_experts(9, 3, 40, 50)
    layer = build_layer(ENGINE, experts)
    case = training_case(10, experts, 5, 2, 3)
    found = compute(layer, case.with_ids(np.full((5, 2), -1)), 50)
    assert all(not array.any() for array in found.values())
    empty = training_case(10, experts, 0, 2, 3)
    assert compute(layer, empty, 50)["hidden"].shape == (0, 40)


@pytest.mark.parametrize("wanted", (("hidden",), ("weights",), LORA, ("hidden", "weights"), BASE, ()))
def test_only_what_is_wanted_has_the_same_bits(wanted):
    experts = random_experts(11, 3, 100, 70)
    layer = build_layer(ENGINE, experts)
    case = training_case(12, experts, 30, 2, 3)
    every = compute(layer, case, 70, wanted=("hidden", "weights", *LORA, *BASE))
    for name, array in compute(layer, case, 70, wanted=wanted).items():
        assert np.array_equal(array, every[name]), name


@pytest.mark.parametrize("alpha", (0.0, 1.702))
def test_clamped_swiglu(alpha):
    experts = random_experts(13, 3, 100, 70)
    layer = build_layer(ENGINE, experts, swiglu_limit=0.7, swiglu_alpha=alpha)
    case = training_case(14, experts, 60, 2, 8)
    found = compute(layer, case, 70, saved_dtype=F32)
    assert_close(found, reference(experts, case, float(np.float32(0.7)), float(np.float32(alpha))))


def test_the_limit_itself_has_a_gradient_and_beyond_has_none():
    """Column 0 of x goes through gate and up unchanged, so a token's g and u are its number."""
    one = to_bf16(np.eye(1, 32, dtype=np.float32))[None]
    experts = bf16_experts(one, one, np.ascontiguousarray(one.swapaxes(1, 2)))
    layer = build_layer(ENGINE, experts, swiglu_limit=2.0, top_k=1)
    numbers = np.array([1.99, 2.0, 2.02, -2.0, -2.02, 3.0], np.float32)
    hidden = np.zeros((len(numbers), 32), np.float32)
    hidden[:, 0] = numbers
    call = Call(
        to_bf16(hidden), np.zeros((len(numbers), 1), np.int64), np.ones((len(numbers), 1), np.float32)
    )
    gradient = np.zeros_like(hidden)
    gradient[:, 0] = 1
    case = Case(call, None, to_bf16(gradient))
    found = compute(layer, case, 1, saved_dtype=F32)["hidden"][:, 0]
    expected = reference(experts, case, 2.0)["hidden"][:, 0]
    assert (expected[[2, 5]] == 0).all() and (expected[[0, 1, 3, 4]] != 0).all()
    assert np.allclose(found, expected, rtol=0.01, atol=0)


def whole_numbers_case(tokens: int, hidden: int, intermediate: int):
    """g is 32 everywhere, where the sigmoid of fp32 is 1, and every number of the call is a small integer."""
    rng = np.random.default_rng(15)

    def sparse(*shape: int) -> np.ndarray:
        return (rng.integers(-1, 2, shape) * (rng.random(shape) < 0.02)).astype(np.float32)

    count, rank = 3, 2
    gate, up = np.zeros((count, intermediate, hidden), np.float32), sparse(count, intermediate, hidden)
    gate[..., 0], up[..., 0] = 32, 0
    experts = bf16_experts(to_bf16(gate), to_bf16(up), to_bf16(sparse(count, hidden, intermediate)))
    x = rng.integers(-1, 2, (tokens, hidden)).astype(np.float32)
    x[:, 0] = 1
    ids = rng.integers(0, count, (tokens, 2), dtype=np.int64)
    call = Call(to_bf16(x), ids, np.ones((tokens, 2), np.float32))
    lora = {name: sparse(*shape) for name, shape in lora_shapes(experts, rank).items()}
    lora["gate_a"][:], lora["gate_b"][:] = 0, 0
    gradient = to_bf16(sparse(tokens, hidden))
    return experts, Case(call, lora, gradient, scale=1.0, experts=count)


@pytest.mark.parametrize("hidden, intermediate", ((100, 70), (1100, 130)))
def test_exact_on_whole_numbers(hidden, intermediate):
    experts, case = whole_numbers_case(90, hidden, intermediate)
    expected = reference(experts, case)
    assert np.abs(expected["hidden"]).max() >= 32
    found = compute(
        build_layer(ENGINE, experts), case, intermediate, wanted=("hidden", "weights", *LORA, *BASE)
    )
    for name, array in found.items():
        assert np.array_equal(array, np.round(expected[name])), name


@pytest.mark.parametrize("format", (PLAIN, Format("RAWINT4", 32, BF16), *INTEGERS[:2]), ids=str)
def test_bits_do_not_depend_on_threads(format):
    experts = random_experts(17, 4, 192, 160, format)
    case = training_case(18, experts, 150, 3, 3)
    results = [
        compute(build_layer(engine, experts), case, 160, wanted=("hidden", "weights", *LORA, *BASE))
        for engine in (ENGINE, ext.Engine(1), ext.Engine(3), ext.Engine(4, 2, [0, 0]))
    ]
    for other in results[1:]:
        for name, array in other.items():
            assert array.tobytes() == results[0][name].tobytes(), name


@pytest.mark.parametrize("format", (PLAIN, INTEGERS[1]), ids=str)
def test_a_token_does_not_depend_on_its_neighbours(format):
    experts = random_experts(19, 4, 100, 70, format)
    layer = build_layer(ENGINE, experts)
    case = training_case(20, experts, 120, 3, 8)
    every = compute(layer, case, 70)
    some = [5, 7, 60]
    alone = compute(layer, replace(case, call=case.call.rows(some), gradient=case.gradient[some].copy()), 70)
    for name in ("output", "hidden", "weights"):
        assert np.array_equal(alone[name], every[name][some]), name


@pytest.mark.parametrize("format", (PLAIN, Format("MXFP4"), INTEGERS[0]), ids=str)
def test_biases_take_part(format):
    experts = random_experts(21, 3, 96, 64, format)
    biases = random_biases(22, experts)
    layer = load_with_biases(ENGINE, experts, biases)
    case = training_case(23, experts, 50, 2, 3)
    expected = reference(experts, case, 2.0, float(np.float32(1.702)), biases)
    # A limit has bf16 activations: others would cross it.
    assert_close(compute(layer, case, 64, saved_dtype=F32), expected)


def test_a_nan_weight_is_seen():
    experts = random_experts(24, 2, 64, 64, Format("FP8"))
    experts.down.weight[1, 3, 5] = 0x7F
    case = training_case(25, experts, 20, 1, 0).with_ids(np.arange(20)[:, None] % 2)
    found = compute(build_layer(ENGINE, experts, top_k=1), case, 64)
    assert np.isnan(found["hidden"][1::2]).all()
    assert not np.isnan(found["hidden"][0::2]).any()


def test_mistakes_of_the_caller_are_errors():
    experts = random_experts(26, 2, 64, 64)
    layer = build_layer(ENGINE, experts)
    case = training_case(27, experts, 4, 2, 3)
    with pytest.raises(ValueError, match=r"expert id 2 of token 0 is out of range"):
        compute(layer, case.with_ids(np.full((4, 2), 2)), 64)
    with pytest.raises(ValueError, match="dtype code 1; training expects"):
        compute(layer, replace(case, call=replace(case.call, hidden_dtype=1)), 64)
    with pytest.raises(ValueError, match="without a LoRA"):
        call = dict.fromkeys(("tokens", "top_k", "hidden", "ids", "weights", "output_gradient"), 1)
        ext.training_backward(layer, **call, dtype=0, saved=(1, 1, 0, 1), lora_gradients=[1] * 6)
