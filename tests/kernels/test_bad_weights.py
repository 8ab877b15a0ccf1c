"""Risk: weights that cannot be what their method says crash the process or become silently wrong numbers.

Each gives one sentence with what was seen, a layer that was loaded before keeps its weights, and a layer that
was not stays without.
"""

from __future__ import annotations

import pytest
from formats import BF16, F16, F32, FORMATS, ONE_PER_METHOD, Format
from harness import (
    Experts,
    build_layer,
    ext,
    load,
    load_pointers,
    make_layer,
    random_call,
    random_experts,
    run,
    same_bits,
)
from isolation import isolated

ENGINE = ext.Engine(2)
COUNT = 3
SCALED = [format for format in ONE_PER_METHOD if format.scale_kind]
UE8M0 = [format for format in ONE_PER_METHOD if format.scale_kind == "ue8m0"]


def make(format: Format, hidden: int = 64, intermediate: int = 160) -> Experts:
    return random_experts(1, COUNT, hidden, intermediate, format)


def pointers(experts: Experts) -> list[list[tuple]]:
    return [part.pointers() for part in experts.parts]


def assert_refused(layer, experts: Experts, message: str, **changes) -> None:
    """load_experts raises one sentence that matches; `changes` replace its arguments."""
    arguments = dict(zip(("gate", "up", "down"), pointers(experts), strict=True))
    arguments |= {"group_size": experts.format.group, "scale_dtype": experts.format.scale_dtype}
    with pytest.raises(ValueError, match=message) as raised:
        layer.load_experts(**(arguments | changes))
    assert "\n" not in str(raised.value)
    assert not layer.loaded
    assert layer.weight_bytes == 0


@pytest.mark.parametrize("format", ONE_PER_METHOD, ids=str)
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_wrong_number_of_experts(part, format):
    experts = make(format)
    matrices = getattr(experts, part).pointers()
    for wrong in (matrices[:-1], [*matrices, matrices[0]], []):
        assert_refused(make_layer(ENGINE, experts), experts, "for 3 experts", **{part: wrong})


def load_null_pointers() -> None:
    engine = ext.Engine(2)
    for format in ONE_PER_METHOD:
        experts = make(format)
        for part in ("gate", "up", "down"):
            for place in (0, 1) if format.scale_kind else (0,):
                print(f"{format} {part} {place=}", flush=True)
                matrices = getattr(experts, part).pointers()
                matrices[1] = tuple(0 if i == place else value for i, value in enumerate(matrices[1]))
                message = f"{part} .*expert 1.* null pointer.*{('weight', 'scale')[place]}"
                assert_refused(make_layer(engine, experts), experts, message, **{part: matrices})


def test_null_pointers_are_errors_and_no_crash():
    isolated("test_bad_weights", "load_null_pointers")


@pytest.mark.parametrize("wrong", [(1,), (1, 2), (1, 2, 1.0, 4), ("a", 2, 1.0)])
def test_something_else_than_pointers(wrong):
    experts = make(Format("FP8"))
    with pytest.raises(TypeError):
        make_layer(ENGINE, experts).load_experts([wrong] * COUNT, [wrong] * COUNT, [wrong] * COUNT)


@pytest.mark.parametrize("group", [-32, -1, 1, 8, 15, 24, 33, 96, 128, 1 << 20])
@pytest.mark.parametrize("method", ["RAWINT4", "GPTQ_INT4"])
def test_group_size_that_does_not_fit(method, group):
    """hidden 64 and intermediate 160: some of these divide one of them."""
    experts = make(Format(method, 16, F32))
    assert_refused(
        make_layer(ENGINE, experts), experts, rf"group size {group} .*\b(64|160)\b", group_size=group
    )


@pytest.mark.parametrize("part", ["gate", "down"])
@pytest.mark.parametrize("method", ["RAWINT4", "GPTQ_INT4"])
def test_a_group_size_has_to_divide_both_dimensions(method, part):
    fits, wide = (64, 96)
    hidden, intermediate = (wide, fits) if part == "gate" else (fits, wide)
    experts = make(Format(method, 32, F32), hidden, intermediate)
    assert_refused(make_layer(ENGINE, experts), experts, r"group size 64 .*\b96\b", group_size=64)


# (format, sizes it can have, sizes it cannot): the same pointers, so that nothing is read past their ends.
SIZES = [
    (Format("RAWINT4", 0, BF16), 34, 33, "33.* even"),
    (Format("GPTQ_INT4", 0, F16), 40, 36, "36.*multiple of 8"),
    (Format("MXFP4"), 64, 48, "48.*32"),
    (Format("MXFP4"), 64, 63, "63"),
    (Format("MXFP8"), 64, 40, "40.*32"),
    (Format("MXFP8"), 64, 63, "63.*32"),
    (Format("NVFP4"), 32, 24, "24.*16"),
    (Format("NVFP4"), 32, 31, "31"),
]


@pytest.mark.parametrize(("format", "good", "bad", "message"), SIZES)
@pytest.mark.parametrize("dimension", ["hidden", "intermediate"])
def test_number_of_columns_that_the_format_cannot_have(dimension, format, good, bad, message):
    experts = make(format, good, good)
    assert_refused(make_layer(ENGINE, experts, **{dimension: bad}), experts, message)


@pytest.mark.parametrize("place", [(0, 0), (7, 1), (-1, -1)])
@pytest.mark.parametrize("part", ["gate", "up", "down"])
@pytest.mark.parametrize("format", UE8M0, ids=str)
def test_the_scale_that_is_not_a_number(format, part, place):
    experts = make(format)
    matrix = getattr(experts, part)
    matrix.scale[(2, *place)] = 255
    row = place[0] % matrix.rows
    column = place[1] % matrix.scale.shape[2] * 32
    message = rf"expert 2, {part}.*row {row}\b.*columns from {column}\b.*255"
    assert_refused(make_layer(ENGINE, experts), experts, message)


@pytest.mark.parametrize("dtype", [-1, 3, 99])
def test_unknown_scale_dtype(dtype):
    experts = make(Format("RAWINT4", 32, BF16))
    assert_refused(make_layer(ENGINE, experts), experts, rf"scale dtype code {dtype}", scale_dtype=dtype)


@pytest.mark.parametrize("format", SCALED, ids=str)
def test_a_refused_load_leaves_the_old_weights(format):
    experts, newer = make(format), random_experts(2, COUNT, 64, 160, format)
    call = random_call(1, experts, 9, top_k=2)
    layer = build_layer(ENGINE, experts)
    expected = run(layer, call)
    size = layer.weight_bytes
    matrices = pointers(newer)
    matrices[2][2] = (matrices[2][2][0], 0, 1.0)
    with pytest.raises(ValueError, match="null pointer"):
        load_pointers(layer, newer, *matrices)
    if format.scale_kind == "ue8m0":
        newer.down.scale[2, -1, -1] = 255
        with pytest.raises(ValueError, match="255"):
            load(layer, newer)
    assert layer.weight_bytes == size
    assert same_bits(run(layer, call), expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packed_weights_take_little_more_than_the_checkpoint(format):
    """Sizes that fill whole panels of 32 rows: nothing but alignment is added, whatever the scales."""
    experts = random_experts(1, 2, 768, 1536, format)
    stored = sum(tensor.nbytes for part in experts.parts for tensor in part.tensors())
    layer = build_layer(ENGINE, experts)
    assert stored * 0.98 <= layer.weight_bytes <= stored * 1.03
