"""Risk: a bias is lost, or is another row's or expert's, where panels, pools, kernels or formats meet."""

from __future__ import annotations

import numpy as np
import pytest
from formats import ONE_PER_METHOD, by_int8, from_bf16
from harness import (
    NMSE_BOUNDS,
    activation,
    arguments,
    ext,
    make_layer,
    nmse,
    poisoned,
    random_call,
    random_experts,
    run,
)

# What each number of tokens of an expert is computed by: few, many, several blocks.
TOKENS = (1, 5, 200)
LIMIT, ALPHA = 2.0, 1.702
FORMATS = (*ONE_PER_METHOD, *by_int8(ONE_PER_METHOD))


def random_biases(seed: int, experts) -> list[np.ndarray]:
    """Of gate, up and down: float32 [E, rows], as large as the products they join."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((experts.count, part.rows), dtype=np.float32) * 4 for part in experts.parts]


def load_with_biases(engine, experts, biases: list[np.ndarray | None], **changes):
    layer = make_layer(engine, experts, swiglu_limit=LIMIT, swiglu_alpha=ALPHA, **changes)
    addresses = [
        [0] * experts.count if bias is None else [row.ctypes.data for row in bias] for bias in biases
    ]
    layer.load_experts(
        *(part.pointers() for part in experts.parts),
        formats=[part.format.type for part in experts.parts] if hasattr(experts.format, "type") else [],
        group_size=experts.format.group,
        scale_dtype=experts.format.scale_dtype,
        biases=addresses,
    )
    return layer


def reference(experts, call, biases: list[np.ndarray | None]) -> np.ndarray:
    hidden = from_bf16(call.hidden).astype(np.float64)
    output = np.zeros(hidden.shape)
    for token, place in np.argwhere(call.ids >= 0):
        expert = call.ids[token, place]

        def times(which: int, x: np.ndarray, expert: int = expert) -> np.ndarray:
            bias = biases[which]
            return experts.parts[which].decoded(expert) @ x + (0 if bias is None else bias[expert])

        x = hidden[token]
        middle = activation(times(0, x), times(1, x), LIMIT, float(np.float32(ALPHA)))
        output[token] += call.weights[token, place] * times(2, middle)
    return output


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_format_adds_the_biases_of_the_row_and_expert(format):
    experts = random_experts(1, 3, 100, 70, format)
    biases = random_biases(1, experts)
    layer = load_with_biases(ext.Engine(2, 2), experts, biases)
    for tokens in TOKENS:
        call = random_call(tokens, experts, tokens, top_k=2)
        error = nmse(run(layer, call), reference(experts, call, biases))
        assert error <= 2 * NMSE_BOUNDS[format.activations], f"{tokens} tokens"


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_projection_may_have_none(missing):
    experts = random_experts(2, 3, 64, 96)
    biases = random_biases(2, experts)
    biases[missing] = None
    call = random_call(2, experts, 20, top_k=2)
    layer = load_with_biases(ext.Engine(2), experts, biases)
    assert nmse(run(layer, call), reference(experts, call, biases)) <= NMSE_BOUNDS["bf16"]


@pytest.mark.parametrize(("threads", "subpools"), [(1, 1), (3, 3)])
def test_slow_twin_and_pools_agree(threads, subpools):
    experts = random_experts(3, 3, 100, 70)
    biases = random_biases(3, experts)
    call = random_call(3, experts, 7, top_k=2)
    layer = load_with_biases(ext.Engine(threads, subpools), experts, biases)
    twin = poisoned(call.hidden.shape, 2)
    layer.forward_reference(*arguments(call, twin, 2))
    assert nmse(twin, reference(experts, call, biases)) < 1e-14
    assert run(layer, call).tobytes() == run(load_with_biases(ext.Engine(2), experts, biases), call).tobytes()


def test_each_piece_of_a_wide_expert_has_the_biases_of_its_own_rows():
    """Crowded experts are cut into pieces of 256 rows of gate and up."""
    experts = random_experts(5, 1, 64, 544)
    biases = random_biases(5, experts)
    call = random_call(5, experts, 64, top_k=1)
    layer = load_with_biases(ext.Engine(2), experts, biases)
    assert nmse(run(layer, call), reference(experts, call, biases)) <= NMSE_BOUNDS["bf16"]


def test_a_token_does_not_feel_its_neighbours():
    experts = random_experts(4, 3, 100, 70)
    layer = load_with_biases(ext.Engine(2), experts, random_biases(4, experts))
    call = random_call(4, experts, 90, top_k=2)
    together = run(layer, call)
    alone = np.concatenate([run(layer, call.rows([t])) for t in range(0, 90, 7)])
    assert together[::7].tobytes() == alone.tobytes()


def test_too_few_addresses_are_refused():
    experts = random_experts(5, 3, 64, 64)
    pointers = [part.pointers() for part in experts.parts]
    layer = make_layer(ext.Engine(1), experts)
    with pytest.raises(ValueError, match="got 2 biases of up for 3 experts"):
        layer.load_experts(*pointers, biases=[[0] * 3, [0] * 2, [0] * 3])
