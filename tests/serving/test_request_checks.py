"""Risk: a check refuses what SGLang would have answered, or lets through what ends the scheduler.

The checks before a running server: tests/cli/served_hostile.py.
"""

from __future__ import annotations

import json
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kt_kernel.integrations.sglang import request_checks

VOCABULARY = 1000
MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCABULARY))


def check(sampling: dict[str, Any] | None = None, **fields: Any) -> SimpleNamespace:
    request = SimpleNamespace(
        **{
            "input_ids": [1, 2],
            "input_embeds": None,
            "positional_embed_overrides": None,
            "return_logprob": False,
            "top_logprobs_num": 0,
            "logprob_start_len": -1,
            "sampling_params": sampling,
            **fields,
        }
    )
    request_checks.check_request(MANAGER, request, request.input_ids)
    return request


@pytest.mark.parametrize(
    "ids", [list(np.array([1, 2])), np.array([1, 2]), array("q", [1, 2]), [0, VOCABULARY - 1]], ids=repr
)
def test_ids_of_every_integer_type_are_ids(ids):
    check(input_ids=ids)


@pytest.mark.parametrize(
    "wrong", [-1, VOCABULARY, 2**70, 1.0, None, "1", np.int64(VOCABULARY), np.float64(1)]
)
def test_what_is_no_id_of_the_vocabulary_is_named(wrong):
    with pytest.raises(ValueError, match="expected ids from 0 to 999"):
        check(input_ids=[1, wrong, 2])


def test_stops_that_never_come_are_dropped_and_the_clients_own_dictionary_stays():
    sampling = {"stop_token_ids": [None, 2, np.int64(3), -4, VOCABULARY, 128009]}
    assert check(sampling).sampling_params["stop_token_ids"] == [2, 3]
    assert len(sampling["stop_token_ids"]) == 6


def test_a_prompt_of_embeddings_has_its_length():
    embeds = [[0.0]] * 4
    check(input_ids=None, input_embeds=embeds, return_logprob=True, logprob_start_len=3)
    with pytest.raises(ValueError, match="logprob_start_len is 5, expected an integer from -1 to 4"):
        check(input_ids=None, input_embeds=embeds, return_logprob=True, logprob_start_len=5)
    with pytest.raises(ValueError, match="the prompt is empty"):
        check(input_ids=None)


@pytest.mark.parametrize("name", request_checks.NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 10**40, -(10**40), "1", [1]])
def test_numbers_that_no_tensor_holds_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*, expected a number from"):
        check({name: value})


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), float("-inf"), 1e39, -1e39, "1", None])
def test_a_bias_that_makes_logits_infinite_is_refused(bias):
    with pytest.raises(ValueError, match="logit_bias of 5 is"):
        check({"logit_bias": {"5": bias}})


def test_the_bounds_keep_probabilities_finite():
    """At their worst together."""
    logits = torch.tensor([100.0, -100.0, request_checks.MOST_BIAS, -request_checks.MOST_BIAS])
    least = request_checks.NUMBERS["repetition_penalty"][0]
    probabilities = torch.softmax(logits / least / 1e-6, dim=-1)
    assert torch.isfinite(probabilities).all()
    hot = request_checks.NUMBERS["temperature"][1]
    assert torch.isfinite(torch.softmax(torch.tensor([1.0, float("-inf")]) / hot, dim=-1)).all()
    assert torch.tensor([request_checks.NUMBERS["top_k"][1]], dtype=torch.int32).item() == 2**31 - 1


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": -1},
        {"top_k": 1 << 30},  # SGLang's "whole vocabulary"
        {"temperature": np.float32(0.5), "top_p": 1, "max_new_tokens": np.int64(3), "min_p": None},
        {"logit_bias": {"5": -100, "6": 1e20}},
        {"stop_regex": "a+", "stop_token_ids": []},
    ],
    ids=repr,
)
def test_what_sglang_takes_passes(sampling):
    check(sampling)


@pytest.mark.parametrize("pattern", ["(", "(?<=a+)b", "a{99999999999}", "(" * 200], ids=repr)
def test_patterns_that_do_not_compile_are_refused(pattern):
    with pytest.raises(ValueError, match="stop_regex holds"):
        check({"stop_regex": [pattern]})


def test_where_a_grammar_leaves_only_the_end_it_can_be_sampled():
    penalty = SimpleNamespace(stop_token_penalties=torch.tensor([[0.0, float("-inf"), 0.0]]))
    request_checks.allow_the_end(None, penalty)
    only_the_end = torch.tensor([[float("-inf"), 5.0, float("-inf")]]) + penalty.stop_token_penalties
    assert torch.softmax(only_the_end / 1e-6, dim=-1).tolist() == [[0.0, 1.0, 0.0]]
    free = torch.tensor([[1.0, 5.0, 1.0]]) + penalty.stop_token_penalties
    assert torch.softmax(free, dim=-1).tolist() == [[0.5, 0.0, 0.5]]


def nested(levels: int) -> str:
    schema: dict[str, Any] = {"type": "string", "pattern": '[[{{"'}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return json.dumps(schema)


@pytest.mark.parametrize("name", ["json_schema", "structural_tag"])
def test_a_schema_that_takes_minutes_to_compile_is_refused(name):
    check({name: nested(63)})
    with pytest.raises(ValueError, match=f"{name} is nested deeper than 128 levels"):
        check({name: nested(64)})
    check({name: "[" * 128 + "]" * 128 + "[" * 100})


def test_a_schema_of_quotes_without_an_end_does_not_hold_up_the_process():
    check({"json_schema": '"' + '\\"' * 200_000})  # minutes, if each began a search of its own
