"""Risk: a router takes another expert than SGLang's torch code or weighs it otherwise."""

from __future__ import annotations

import pytest
import torch
from native_and_twin import DTYPES, assert_close, native, numbers, twin

TOKENS = 33
HIDDEN = torch.zeros(TOKENS, 4)


def assert_same_choice(actual: tuple, expected: tuple) -> None:
    """Experts whose scores differ by a rounding may change places."""
    weights, ids = actual
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert (ids != expected[1]).float().mean() < 0.003
    assert_close(weights, expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["topk_softmax_cpu", "topk_sigmoid_cpu"])
def test_choice_of_all_experts_is_its_twin(name, dtype):
    for experts, topk in ((128, 8), (60, 4), (512, 10), (8, 2), (7, 7)):
        logits = numbers(TOKENS, experts, dtype=dtype, seed=experts)
        for bias in (None, numbers(experts, dtype=torch.float32, seed=3, scale=0.1)):
            for renormalize in (True, False):
                arguments = {"topk": topk, "renormalize": renormalize, "correction_bias": bias}
                actual, expected = (
                    one(name)(hidden_states=HIDDEN, gating_output=logits, **arguments)
                    for one in (native, twin)
                )
                assert_same_choice(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_choice_of_groups_is_its_twin(dtype):
    for experts, topk, groups, kept in (
        (256, 8, 8, 4),
        (160, 6, 8, 3),
        (64, 8, 1, 1),
        (16, 4, 4, 2),
        (6, 2, 6, 3),
    ):
        logits = numbers(TOKENS, experts, dtype=dtype, seed=experts)
        bias = numbers(experts, dtype=torch.float32, seed=3, scale=0.1)
        for renormalize in (True, False):
            rest = (topk, renormalize, groups, kept, 0)
            arguments = (HIDDEN, logits, *rest, 1.5, None)
            assert_same_choice(*(one("grouped_topk_cpu")(*arguments) for one in (native, twin)))
            for scale in (2.5, None):
                arguments = (HIDDEN, logits, bias, *rest, scale, None)
                assert_same_choice(*(one("biased_grouped_topk_cpu")(*arguments) for one in (native, twin)))


def test_a_bias_counts_for_the_choice_only():
    logits, bias = torch.zeros(1, 8), torch.zeros(8)
    bias[5] = 100
    weights, ids = native("topk_softmax_cpu")(HIDDEN[:1], logits, 2, False, bias)
    assert ids.tolist() == [[5, 0]]
    assert_close(weights, torch.full((1, 2), 0.125))


@pytest.mark.parametrize("experts", [8, 40, 128])
def test_of_equal_experts_the_lower_comes_first(experts):
    logits = torch.zeros(1, experts)
    logits[0, experts // 2] = 1
    for name in ("topk_softmax_cpu", "topk_sigmoid_cpu"):
        _, ids = native(name)(HIDDEN[:1], logits, 4, True)
        assert ids.tolist() == [[experts // 2, 0, 1, 2]]
    _, ids = native("grouped_topk_cpu")(HIDDEN[:1], logits * 0, 4, True, 4, 2, 0, None, None)
    assert ids.tolist() == [list(range(4))]


def test_logits_that_are_not_numbers_give_distinct_experts():
    logits = numbers(4, 16, dtype=torch.float32, seed=1)
    logits[1] = float("nan")
    logits[2, :13] = float("-inf")
    logits[3, 5] = float("nan")
    for name in ("topk_softmax_cpu", "topk_sigmoid_cpu"):
        weights, ids = native(name)(HIDDEN[:4], logits, 4, True)
        assert all(len(set(row)) == 4 and set(row) <= set(range(16)) for row in ids.tolist())
        assert weights[0].isfinite().all() and weights[2].isfinite().all()
        assert weights[1].isnan().all()
    assert 5 not in native("topk_sigmoid_cpu")(HIDDEN[:4], logits, 4, True)[1][3]


def test_saturated_scores_are_finite():
    logits = torch.tensor([[1e30, -1e30, 300.0, 0.0], [-1e38, -1e38, -1e38, -1e38]])
    for name in ("topk_softmax_cpu", "topk_sigmoid_cpu"):
        actual, expected = (one(name)(HIDDEN[:2], logits, 2, True) for one in (native, twin))
        assert actual[1].tolist() == expected[1].tolist()
        assert actual[0].isfinite().all()


def test_bad_arguments_are_named():
    logits = torch.zeros(2, 16)
    with pytest.raises(Exception, match="chooses 17 experts; expected 1 to 16"):
        native("topk_softmax_cpu")(HIDDEN[:2], logits, 17, True)
    with pytest.raises(Exception, match="chooses 9 experts; expected 1 to 8"):
        native("grouped_topk_cpu")(HIDDEN[:2], logits, 9, True, 4, 2, 0, None, None)
    with pytest.raises(Exception, match="keeps 2 of 3 groups"):
        native("grouped_topk_cpu")(HIDDEN[:2], logits, 4, True, 3, 2, 0, None, None)
    with pytest.raises(Exception, match="num_fused_shared_experts=1; expected 0"):
        native("biased_grouped_topk_cpu")(HIDDEN[:2], logits, torch.zeros(16), 4, True, 4, 2, 1, None, None)
