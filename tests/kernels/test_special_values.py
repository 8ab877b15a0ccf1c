"""Risk: NaN, Inf, denormals and zeros spread to other tokens, vanish, or turn into ordinary wrong numbers."""

from __future__ import annotations

import numpy as np
import pytest
from formats import (
    BF16,
    E4M3_NAN,
    F16,
    F32,
    ONE_PER_PATH,
    PATHS,
    PLAIN,
    Format,
    decode,
    from_bf16,
    to_bf16,
)
from harness import (
    NMSE_BOUNDS,
    Call,
    Experts,
    bf16_experts,
    build_layer,
    ext,
    load,
    nmse,
    random_call,
    random_experts,
    reference,
    run,
    same_bits,
)

ENGINE = ext.Engine(2)
TOKENS, VICTIM = 40, 13


def make(format: Format = PLAIN, hidden: int = 72, intermediate: int = 40) -> tuple[Experts, Call]:
    experts = random_experts(1, 4, hidden, intermediate, format)
    call = random_call(1, experts, TOKENS, top_k=2)
    call.ids[VICTIM] = [1, 3]
    return experts, call


def assert_only_victim_changed(output: np.ndarray, clean: np.ndarray) -> None:
    others = np.arange(TOKENS) != VICTIM
    assert same_bits(output[others], clean[others])


@pytest.mark.parametrize(
    ("format", "hidden_dtype"),
    [*[(PLAIN, dtype) for dtype in (BF16, F16, F32)], *[(format, F32) for format in ONE_PER_PATH[1:]]],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 37, 71])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_hidden_value_reaches_every_output_of_its_token_and_no_other(
    format, value, place, hidden_dtype
):
    experts, call = make(format)
    layer = build_layer(ENGINE, experts)
    values = decode(call.hidden, BF16)
    clean = run(layer, call.with_hidden(values, hidden_dtype))
    values[VICTIM, place] = value
    output = run(layer, call.with_hidden(values, hidden_dtype))
    assert_only_victim_changed(output, clean)
    assert not np.isfinite(output[VICTIM]).any()


@pytest.mark.parametrize("output_dtype", [BF16, F16, F32])
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_nan_is_nan_in_every_output_dtype(bits, output_dtype):
    """Careless rounding to bf16 turns the first of these into Inf and the last two into zeros."""
    experts, call = make()
    layer = build_layer(ENGINE, experts)
    values = decode(call.hidden, BF16)
    values.view(np.uint32)[VICTIM, 5] = bits
    output = decode(run(layer, call.with_hidden(values, F32), output_dtype), output_dtype)
    assert np.isnan(output[VICTIM]).all()
    assert np.isfinite(np.delete(output, VICTIM, axis=0)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_a_bad_routing_weight_stays_with_its_token(format, value):
    experts, call = make(format)
    layer = build_layer(ENGINE, experts)
    clean = run(layer, call)
    call.weights[VICTIM, 0] = value
    output = run(layer, call)
    assert_only_victim_changed(output, clean)
    assert not np.isfinite(output[VICTIM]).any()


def test_nan_of_a_skipped_token_is_not_computed():
    experts, call = make()
    call.ids[VICTIM] = -1
    values = decode(call.hidden, BF16)
    values[VICTIM] = np.nan
    call.weights[VICTIM] = np.nan
    output = run(build_layer(ENGINE, experts), call.with_hidden(values, BF16))
    assert np.isfinite(output).all()
    assert not output[VICTIM].any()


NAN_CODES = {"bf16": (0x7F81, 0x7FC0, 0xFFC0, 0xFFFF), "e4m3": E4M3_NAN}
NAN_SCALES = {
    "e4m3": np.uint8(0x7F),
    BF16: np.uint16(0x7FC0),
    F16: np.float16(np.nan),
    F32: np.float32(np.nan),
}
NAN_CODE_CASES = [(format, code) for format in ONE_PER_PATH for code in NAN_CODES.get(format.codes, ())]


def assert_nan_where_it_belongs(experts: Experts, call: Call, clean: np.ndarray, rows_of_down) -> None:
    """Expert 3 holds NaN: in these rows of down, or (None) in gate or up, from where every output gets it."""
    columns = np.arange(experts.hidden) if rows_of_down is None else rows_of_down
    chosen = (call.ids == 3).any(axis=1)
    for tokens in (TOKENS, 3):  # many tokens of the expert, and few
        output = run(build_layer(ENGINE, experts), call.rows(slice(tokens)))
        expected = np.isin(np.arange(experts.hidden), columns) & chosen[:tokens, None]
        assert np.array_equal(np.isnan(output), expected)
        assert same_bits(output[~expected], clean[:tokens][~expected])


@pytest.mark.parametrize(("format", "code"), NAN_CODE_CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_a_nan_code_reaches_exactly_what_it_touches(part, format, code):
    experts, call = make(format)
    call.ids[1] = [3, 0]
    clean = run(build_layer(ENGINE, experts), call)
    getattr(experts, part).weight[3, 7, 11] = code
    assert_nan_where_it_belongs(experts, call, clean, [7] if part == "down" else None)


@pytest.mark.parametrize(("format", "code"), NAN_CODE_CASES, ids=lambda value: str(value))
def test_nan_codes_at_the_edges_of_panels_and_matrices(format, code):
    """One after the other in the first and last rows of panels and of the matrix, in columns of all kinds."""
    experts, call = make(format, 101, 75)
    call.ids[1] = [3, 0]
    clean = run(build_layer(ENGINE, experts), call)
    rows, columns = experts.down.rows, experts.down.columns
    places = [(0, 0), (31, columns - 1), (32, 63), (63, 64), (64, 1), (rows - 1, 32), (rows - 1, columns - 1)]
    for row, column in places:
        codes = experts.down.weight[3]
        before = codes[row, column]
        codes[row, column] = code
        assert_nan_where_it_belongs(experts, call, clean, [row])
        codes[row, column] = before
    for row, column in places:
        experts.down.weight[3, row, column] = code
    assert_nan_where_it_belongs(experts, call, clean, [row for row, _ in places])


@pytest.mark.parametrize("format", [f for f in ONE_PER_PATH if f.codes in NAN_CODES], ids=str)
def test_nan_codes_go_when_other_weights_come(format):
    experts, call = make(format)
    layer = build_layer(ENGINE, experts)
    clean = run(layer, call)
    experts.up.weight[3, 7, 11], before = NAN_CODES[format.codes][0], experts.up.weight[3, 7, 11].copy()
    load(layer, experts)
    assert np.isnan(run(layer, call)).any()
    experts.up.weight[3, 7, 11] = before
    load(layer, experts)
    assert same_bits(run(layer, call), clean)


@pytest.mark.parametrize("format", [f for f in PATHS if f.scale_kind in ("float", "e4m3")], ids=str)
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_a_nan_scale_reaches_exactly_the_rows_it_covers(part, format):
    groups = slice(None if (PATHS.index(format) + len(part)) % 2 else -1, None)
    experts, call = make(format, 160, 144)
    call.ids[1] = [3, 0]
    clean = run(build_layer(ENGINE, experts), call)
    matrix = getattr(experts, part)
    kind = format.scale_dtype if format.scale_kind == "float" else "e4m3"
    for row in (1,) if format.method == "FP8" else (7, 9):  # of one panel
        matrix.row_scales(3)[row, groups] = NAN_SCALES[kind]
    touched = np.flatnonzero(np.isnan(matrix.decoded(3)).any(axis=1))
    assert_nan_where_it_belongs(experts, call, clean, touched if part == "down" else None)


def test_a_nan_factor_of_nvfp4_reaches_every_output_of_its_expert():
    experts, call = make(Format("NVFP4"))
    call.ids[1] = [3, 0]
    clean = run(build_layer(ENGINE, experts), call)
    experts.down.factor[3] = np.nan
    assert_nan_where_it_belongs(experts, call, clean, None)


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_zero_routing_weight_adds_zero(format):
    experts, call = make(format)
    layer = build_layer(ENGINE, experts)
    skipped = call.rows(slice(TOKENS))
    skipped.ids[:, 1] = -1
    call.weights[:, 1] = 0
    assert np.array_equal(run(layer, call), run(layer, skipped))


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_zero_hidden_states_give_zeros(format, zero):
    experts, call = make(format)
    output = run(build_layer(ENGINE, experts), call.with_hidden(np.full(call.hidden.shape, zero, np.float32)))
    assert not output.any()


@pytest.mark.parametrize("hidden_dtype", [BF16, F32])
@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_denormal_hidden_states_count_as_themselves_or_as_zero(format, hidden_dtype):
    """VDPBF16PS and AMX read denormals as zero, FMA does not; ordinary values beside them must not suffer."""
    experts, call = make(format)
    layer = build_layer(ENGINE, experts)
    denormals = np.random.default_rng(1).uniform(-1e-38, 1e-38, call.hidden.shape).astype(np.float32)
    tiny = run(layer, call.with_hidden(denormals, hidden_dtype))
    assert np.abs(tiny).max() <= 1e-37
    values = decode(call.hidden, BF16)
    mixed = np.where(np.arange(experts.hidden) % 3 == 0, denormals, values)
    zeroed = np.where(np.arange(experts.hidden) % 3 == 0, np.float32(0), values)
    assert np.array_equal(
        run(layer, call.with_hidden(mixed, hidden_dtype)), run(layer, call.with_hidden(zeroed, hidden_dtype))
    )


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_hidden_states_of_every_magnitude(format):
    """Each token has numbers in 32 columns alone, small or large ones. SwiGLU passes half of the gate on."""
    hidden, exponents = 288, np.arange(-30, 19, 3)
    experts = random_experts(3, 1, hidden, 96, format)
    values = np.zeros((len(exponents), experts.hidden))
    numbers = np.random.default_rng(3).standard_normal((len(exponents), 32))
    for row, exponent in enumerate(exponents):
        first = 32 * (row % (hidden // 32))
        values[row, first : first + 32] = numbers[row] * 10.0**exponent
    ones = np.ones((len(exponents), 1))
    call = Call(to_bf16(values), ones.astype(np.int64) * 0, ones.astype(np.float32))
    output = run(build_layer(ENGINE, experts, top_k=1, swiglu_alpha=1e-37), call)
    expected = reference(experts, call, alpha=1e-37)
    for row, exponent in enumerate(exponents):
        error = nmse(output[row], expected[row])
        assert error <= 3 * NMSE_BOUNDS[format.activations], f"NMSE {error:.2e} at 1e{exponent}"


@pytest.mark.parametrize("format", ONE_PER_PATH, ids=str)
def test_denormal_f16_hidden_states_are_ordinary_bf16_numbers(format):
    experts, call = make(format)
    values = np.random.default_rng(2).uniform(-6e-5, 6e-5, call.hidden.shape).astype(np.float16)
    small = call.with_hidden(values, F16)
    output, expected = run(build_layer(ENGINE, experts), small), reference(experts, small)
    assert np.abs(output - expected).max() <= 0.02 * np.abs(expected).max()


def test_f16_output_overflows_to_infinity_with_the_right_sign():
    experts, call = make()
    call.weights *= 1e7
    layer = build_layer(ENGINE, experts)
    with np.errstate(over="ignore"):
        expected = run(layer, call, F32).astype(np.float16)
    assert np.isinf(expected).any()
    assert same_bits(run(layer, call, F16), expected)


def test_the_largest_finite_values_do_not_become_nan():
    """gate and up of 2^127 and -2^127: silu is the gate itself or zero; down of 2^-127 brings it back."""
    big, small = np.float32(2.0**60), np.float32(2.0**-60)
    gate = to_bf16(np.full((1, 32, 32), big))
    gate[0, 1::2] = to_bf16(-big)
    experts = bf16_experts(
        gate, to_bf16(np.full((1, 32, 32), small)), to_bf16(np.full((1, 32, 32), np.float32(1)))
    )
    call = Call(
        to_bf16(np.eye(4, 32, dtype=np.float32)), np.zeros((4, 1), np.int64), np.ones((4, 1), np.float32)
    )
    output = run(build_layer(ENGINE, experts, top_k=1), call)
    assert np.array_equal(output, np.full((4, 32), 16, np.float32))
    assert from_bf16(gate).min() == -big
