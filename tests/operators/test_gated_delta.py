"""Operators of the gated delta rule (Qwen3-Next, Qwen3.5): right, and the same bits however tokens arrive.

The reference is the torch twin in float64 (kt_kernel/operators/reference/gated_delta.py), on the values that
the operator is given.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kt_kernel import kt_kernel_ext, operators
from kt_kernel.operators.reference import gated_delta as reference

native = torch.ops.sgl_kernel

TYPES = (torch.float32, torch.bfloat16)
# Relative to the largest result. bfloat16 results are rounded once.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
PACKED, NO_SLOT = True, -1


@pytest.fixture(scope="module", autouse=True)
def engine():
    """Two threads; kept, because torch's registrations outlive the tests."""
    operators.install(kt_kernel_ext.Engine(2, 1))


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    error = (got.double() - expected).abs().max() / expected.abs().max()
    return bool(error <= ERROR[dtype or got.dtype])


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


class Layer:
    """One layer's weights, the projections of `tokens` tokens, and a pool of seven states."""

    def __init__(self, dtype, tokens=70, key_heads=2, value_heads=4, keys=64, values=64, state=torch.float32):
        torch.manual_seed(3)
        self.A_log, self.dt_bias = torch.rand(value_heads).log() + 1, torch.rand(value_heads).to(dtype)
        self.q, self.k = torch.randn(2, 1, tokens, key_heads, keys).to(dtype)
        self.v = torch.randn(1, tokens, value_heads, values).to(dtype)
        self.a, self.b = torch.randn(2, tokens, value_heads).to(dtype)
        self.pool = torch.randn(7, value_heads, values, keys).to(state)

    def prompt(self, pool: torch.Tensor, slots: list[int], starts: list[int]) -> torch.Tensor:
        """The tokens starts[0] .. starts[-1] in one call, as prompts of the requests at `slots`."""
        first, last = starts[0], starts[-1]
        g, beta = native.fused_gdn_gating_cpu(
            self.A_log, self.a[first:last], self.b[first:last], self.dt_bias
        )
        q, k, v = (tensor[:, first:last] for tensor in (self.q, self.k, self.v))
        offsets = torch.tensor(starts, dtype=torch.int32) - first
        slots = torch.tensor(slots, dtype=torch.int32)
        return native.chunk_gated_delta_rule_cpu(q, k, v, g, beta, pool, offsets, True, slots)[0]

    def decode(
        self, pool: torch.Tensor, slots: list[int], tokens: list[int], steps: int = 1, **verify: object
    ) -> torch.Tensor:
        """`steps` tokens from each of `tokens` on, as one step of the requests at `slots`."""
        rows = torch.tensor([token + step for token in tokens for step in range(steps)])
        q, k, v = (tensor[:, rows] for tensor in (self.q, self.k, self.v))
        starts = torch.arange(0, len(rows) + 1, steps, dtype=torch.int32)
        slots = torch.tensor(slots, dtype=torch.int32)
        gates = self.a[rows], self.b[rows]
        return native.fused_sigmoid_gating_delta_rule_update_cpu(
            self.A_log, self.dt_bias, q, k, v, *gates, pool, slots, starts, True, **verify
        )[0]

    def expected(self, slot: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Results and the state after them, in float64."""
        pool = self.pool.double()
        gates = reference.fused_gdn_gating_cpu(
            *wide(self.A_log, self.a[first:last], self.b[first:last], self.dt_bias)
        )
        q, k, v = wide(*(tensor[:, first:last] for tensor in (self.q, self.k, self.v)))
        starts, slots = torch.tensor([0, last - first]), torch.tensor([slot])
        out = reference.chunk_gated_delta_rule_cpu(q, k, v, *gates, pool, starts, True, slots)
        return out[0], pool[slot]


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (1, 1, 128, 128), (3, 3, 40, 56)], ids=str)
def test_the_recurrence_against_float64(dtype, shape):
    layer = Layer(dtype, 70, *shape)
    pool = layer.pool.clone()
    out = layer.prompt(pool, [5, 2], [0, 50, 70])
    for slot, first, last in ((5, 0, 50), (2, 50, 70)):
        expected, state = layer.expected(slot, first, last)
        assert close(out[first:last], expected)
        assert close(pool[slot], state)
    untouched = [0, 1, 3, 4, 6]
    assert torch.equal(pool[untouched], layer.pool[untouched])


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_token_has_the_same_bits_however_its_prompt_is_cut(dtype, state):
    layer = Layer(dtype, state=state)
    whole, pieces, steps = (layer.pool.clone() for _ in range(3))
    out = layer.prompt(whole, [4], [0, 70])
    cut = [layer.prompt(pieces, [4], [first, last]) for first, last in ((0, 1), (1, 65), (65, 70))]
    assert torch.equal(out, torch.cat(cut))
    assert torch.equal(whole, pieces)
    assert torch.equal(out, torch.cat([layer.decode(steps, [4], [token]) for token in range(70)]))
    assert torch.equal(whole, steps)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_token_has_the_same_bits_among_others_and_on_any_threads(dtype):
    layer = Layer(dtype)
    alone, together = layer.pool.clone(), layer.pool.clone()
    mine = [layer.decode(alone, [slot], [10 * slot]) for slot in range(7)]
    others = layer.decode(together, list(range(7)), [10 * slot for slot in range(7)])
    assert torch.equal(torch.cat(mine), others)
    assert torch.equal(alone, together)
    prompts = layer.prompt(layer.pool.clone(), [1, 2], [0, 30, 70])
    for threads in (1, 2):
        operators.install(kt_kernel_ext.Engine(threads, 1))
        assert torch.equal(layer.prompt(layer.pool.clone(), [2], [30, 70]), prompts[30:])


def test_a_request_without_a_state_begins_with_zeros_and_leaves_nothing():
    layer = Layer(torch.float32)
    zeros, pool = torch.zeros_like(layer.pool), layer.pool.clone()
    assert torch.equal(layer.decode(pool, [-1, 3], [8, 9])[:1], layer.decode(zeros, [3], [8]))
    assert torch.equal(pool[[0, 1, 2, 4, 5, 6]], layer.pool[[0, 1, 2, 4, 5, 6]])


def test_drafts_are_verified_as_if_decoded_and_the_state_waits():
    """Three drafts in a chain; then a tree, in which the fourth follows the first."""
    layer = Layer(torch.bfloat16)
    pool, kept = layer.pool.clone(), torch.zeros(3, 4, *layer.pool.shape[1:])
    asked = {
        "disable_state_update": True,
        "intermediate_states_buffer": kept,
        "intermediate_state_indices": torch.tensor([2], dtype=torch.int32),
        "cache_steps": 4,
    }
    chain = layer.decode(pool, [4], [20], 4, **asked)
    assert torch.equal(pool, layer.pool)
    decoded = layer.pool.clone()
    for step in range(4):
        assert torch.equal(chain[step : step + 1], layer.decode(decoded, [4], [20 + step]))
        assert torch.equal(kept[2, step], decoded[4])
    parents = torch.tensor([[0, 0, 1, 0]], dtype=torch.int32)
    tree = layer.decode(pool, [4], [20], 4, **asked, retrieve_parent_token=parents)
    assert torch.equal(tree[:3], chain[:3])
    branch = layer.pool.clone()
    layer.decode(branch, [4], [20])
    assert torch.equal(tree[3:], layer.decode(branch, [4], [23]))
    assert torch.equal(kept[2, 3], branch[4])


def test_gates_against_float64():
    layer = Layer(torch.float32)
    layer.a[0] = torch.tensor([40.0, -40.0, 19.9, 20.1])
    given = layer.A_log, layer.a, layer.b, layer.dt_bias
    for got, expected in zip(
        native.fused_gdn_gating_cpu(*given), reference.fused_gdn_gating_cpu(*wide(*given)), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


# ---- the convolution -------------------------------------------------------------------------------------


class Convolution:
    """`state`: the type of the pool, whose memory is [slots, width - 1, channels] as SGLang makes it."""

    def __init__(self, dtype, channels=1100, width=4, tokens=40, state=None):
        torch.manual_seed(5)
        self.x = torch.randn(tokens, channels).to(dtype)
        self.weight = torch.randn(channels, width).to(dtype)
        self.packed = native.causal_conv1d_weight_pack(self.weight)
        self.states = torch.randn(5, width - 1, channels).to(state or dtype).transpose(1, 2)

    def copy(self) -> torch.Tensor:
        return self.states.transpose(1, 2).clone().transpose(1, 2)

    def prompt(self, states, slots, starts, has_state=None):
        index = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
        known = torch.tensor(has_state or [True] * len(slots))
        x, offsets = self.x[starts[0] : starts[-1]], index(starts) - starts[0]
        return native.causal_conv1d_fwd_cpu(
            x, self.packed, None, states, offsets, index(slots), known, True, NO_SLOT, PACKED
        )

    def step(self, states, slots, x, **drafts):
        slots = torch.tensor(slots, dtype=torch.int32)
        return native.causal_conv1d_update_cpu(
            x, states, self.packed, None, True, slots, NO_SLOT, PACKED, **drafts
        )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [2, 4])
def test_the_convolution_against_float64(dtype, width):
    layer = Convolution(dtype, width=width)
    states, starts, slots, known = layer.copy(), [0, 2, 25, 40], [3, 1, 2], [True, False, True]
    out = layer.prompt(states, slots, starts, known)
    expected_states = layer.states.double()
    expected = reference.causal_conv1d_fwd_cpu(
        *(layer.x.double(), layer.weight.double(), None, expected_states),
        *(torch.tensor(starts), torch.tensor(slots), torch.tensor(known), True, NO_SLOT, not PACKED),
    )
    assert close(out, expected)
    assert torch.equal(states.double(), expected_states)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_convolved_token_has_the_same_bits_however_its_prompt_is_cut(dtype):
    layer = Convolution(dtype)
    whole, pieces, steps = layer.copy(), layer.copy(), layer.copy()
    out = layer.prompt(whole, [2], [0, 40])
    cut = [layer.prompt(pieces, [2], [first, last]) for first, last in ((0, 1), (1, 3), (3, 40))]
    decoded = [layer.step(steps, [2], layer.x[token : token + 1]) for token in range(40)]
    for other, states in ((cut, pieces), (decoded, steps)):
        assert torch.equal(out, torch.cat(other))
        assert torch.equal(states, whole)
    # neighbours, one of them without a place
    among = layer.step(layer.copy(), [0, 2, NO_SLOT], layer.x[:3])
    assert torch.equal(among[1:2], layer.step(layer.copy(), [2], layer.x[1:2]))
    assert not among[2].any()


def test_a_state_of_another_type_is_rounded_once():
    layer = Convolution(torch.float32, state=torch.bfloat16)
    states = layer.copy()
    layer.prompt(states, [1], [0, 40])
    assert torch.equal(states[1], layer.x[37:].t().bfloat16())


@pytest.mark.parametrize("tree", [False, True])
def test_windows_of_drafts_are_kept_and_the_state_waits(tree):
    layer = Convolution(torch.bfloat16)
    states = layer.copy()
    x = layer.x[:8].view(2, 4, -1)
    windows = torch.zeros(3, 4, layer.x.shape[1], 3, dtype=torch.bfloat16)
    links = {}
    if tree:  # 0 -> 1 -> 3, 0 -> 2
        links = {
            "retrieve_next_token": torch.tensor([[1, 3, -1, -1]] * 2),
            "retrieve_next_sibling": torch.tensor([[-1, 2, -1, -1]] * 2),
            "retrieve_parent_token": torch.full((2, 4), 9),
        }
    given = {
        "intermediate_conv_window": windows,
        "intermediate_state_indices": torch.tensor([2, 0], dtype=torch.int32),
    }
    out = layer.step(states, [3, 1], x, **given, **links)
    assert torch.equal(states, layer.states)
    parents = [None, 0, 0, 1] if tree else [None, 0, 1, 2]
    if tree:
        assert links["retrieve_parent_token"].tolist() == [[0, 0, 0, 1]] * 2
    for request, (slot, row) in enumerate(((3, 2), (1, 0))):
        for step in range(4):
            decoded = layer.copy()
            if parents[step] is not None:
                decoded[slot] = windows[row, parents[step]]
            assert torch.equal(
                out[request, step], layer.step(decoded, [slot], x[request, step : step + 1])[0]
            )
            assert torch.equal(windows[row, step], decoded[slot])


# ---- around them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(2, 4), (1, 3)])
def test_projections_are_taken_apart(heads):
    torch.manual_seed(1)
    columns = 2 * heads[0] * 32 + 2 * heads[1] * 48
    qkvz, ba = torch.randn(9, columns + 8).bfloat16()[:, :columns], torch.randn(9, 2 * heads[1])
    for name in ("fused_qkvzba_split_reshape_cat_cpu", "fused_qkvzba_split_reshape_cat_contiguous_cpu"):
        got = getattr(native, name)(qkvz, ba, *heads, 32, 48)
        expected = getattr(reference, name)(qkvz.contiguous(), ba, *heads, 32, 48)
        assert [tuple(part.shape) for part in got] == [tuple(part.shape) for part in expected]
        assert all(torch.equal(mine, other) for mine, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns", [128, 40])
def test_the_gated_norm_against_float64_and_alone(dtype, columns):
    torch.manual_seed(2)
    x, gate = torch.randn(2, 70, columns).to(dtype)
    weight = torch.rand(columns).bfloat16()  # SGLang keeps it in the checkpoint's type
    out = native.fused_rmsnorm_gated_cpu(x, weight, gate, 1e-6)
    assert close(out, reference.fused_rmsnorm_gated_cpu(*wide(x, weight, gate), 1e-6))
    assert torch.equal(native.fused_rmsnorm_gated_cpu(x[40:41], weight, gate[40:41], 1e-6), out[40:41])


def test_the_twins_have_the_same_schemas():
    schemas = dict(schema.split("(", 1) for schema in operators.native_schemas())
    for name, (schema, _) in reference.OPERATORS.items():
        assert "(" + schemas[name] == schema


def test_what_cannot_be_computed_is_refused_in_one_sentence():
    layer = Layer(torch.float32)
    with pytest.raises(ValueError, match="the gate of Qwen's gated delta rule"):
        layer.decode(layer.pool, [1], [2], is_kda=True)
    with pytest.raises(ValueError, match=r"the pool of states is float32 \[7, 4, 64, 64\]"):
        layer.prompt(layer.pool.transpose(2, 3), [1], [0, 3])
    convolution = Convolution(torch.float32)
    with pytest.raises(ValueError, match="expected what causal_conv1d_weight_pack gives"):
        native.causal_conv1d_update_cpu(
            *(convolution.x[:1], convolution.states, convolution.weight, None, True),
            *(torch.tensor([1], dtype=torch.int32), NO_SLOT, not PACKED),
        )


@pytest.mark.skipif("KT_KERNEL_CPU_VARIANT" in os.environ, reason="a variant's own process")
def test_all_this_on_avx2():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "KT_KERNEL_CPU_VARIANT": "avx2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout
