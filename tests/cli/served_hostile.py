"""One request must not end the server: each is refused with a sentence, and the next one is answered."""

from __future__ import annotations

from typing import Any

import pytest
import requests

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def generate(sampling: dict[str, Any] | None = None, **fields: Any) -> tuple[str, dict[str, Any]]:
    prompt = {} if "input_ids" in fields else {"text": "hi"}
    return "/generate", {**prompt, "sampling_params": {"max_new_tokens": 2, **(sampling or {})}, **fields}


# What ended the server, or would have filled its memory, before; and the sentence.
REFUSED = [
    (generate(input_ids=[1000000]), "input_ids holds 1000000, expected ids from 0 to 49151"),
    (generate(input_ids=[-5]), "input_ids holds -5"),
    (generate(input_ids=[[1], [-5]]), "input_ids holds -5"),
    (generate(text=""), "the prompt is empty"),
    (generate(text=["a", ""]), "the prompt is empty"),
    (generate(return_logprob=True, top_logprobs_num=1000000), "top_logprobs_num is 1000000"),
    (generate(return_logprob=True, top_logprobs_num=-3), "top_logprobs_num is -3"),
    (
        generate(return_logprob=True, logprob_start_len=9),
        "logprob_start_len is 9, expected an integer from -1 to 1",
    ),
    (generate({"n": 0}), "n is 0, expected an integer from 1 to 1024"),
    (generate({"n": 1000000000}), "n is 1000000000"),
    (generate({"logit_bias": {"1000000": 1}}), "logit_bias"),
    (
        generate({"logit_bias": {"5": 1e39}}),
        "logit_bias of 5 is 1e+39, expected a number from -1e+20 to 1e+20",
    ),
    (generate({"top_k": 2**40}), "top_k is 1099511627776, expected a number from -1 to 2147483647"),
    (generate({"temperature": 1e300}), "temperature is 1e+300"),
    (generate({"repetition_penalty": 1e-300}), "repetition_penalty is 1e-300"),
    (generate({"max_new_tokens": 1.5}), "invalid type"),
    (generate({"json_schema": {"type": "object"}}), "invalid type"),
    (generate({"json_schema": "{"}), "Failed to compile json grammar"),
    (generate({"regex": "("}), "Failed to compile regex grammar"),
    (generate({"stop": ["x"] * 257}), "at most 32 stop strings"),
    (generate({"stop_regex": ["("]}), "stop_regex holds '('"),
    (generate(return_logprob=[True]), "$.return_logprob"),
    (generate(session_params={"id": 5}), "$.session_params"),
    (generate(positional_embed_overrides=[1]), "positional_embed_overrides is a list"),
    (("/v1/completions", {"model": "demo", "prompt": [99999999]}), "input_ids holds 99999999"),
    (("/v1/chat/completions", {"model": "demo", "messages": QUESTION, "n": -4}), "n is -4"),
    (
        ("/v1/chat/completions", {"model": "demo", "messages": QUESTION, "top_k": 2**31}),
        "top_k is 2147483648",
    ),
    (
        ("/v1/messages", {"model": "demo", "messages": QUESTION, "max_tokens": 2, "top_k": 2**31}),
        "top_k is 2147483648",
    ),
]


@pytest.mark.parametrize(("request_of_a_client", "sentence"), REFUSED, ids=lambda value: str(value)[:60])
def test_it_is_refused_in_a_sentence(demo, request_of_a_client, sentence):
    path, body = request_of_a_client
    answer = requests.post(demo.url + path, json=body, timeout=120)
    assert answer.status_code == 400, answer.text
    assert sentence in answer.text


def test_afterwards_the_server_answers(demo):
    assert demo.process.poll() is None
    answer = demo.client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=40)
    assert "Paris" in answer.choices[0].message.content


def test_what_is_unusual_is_still_answered(demo):
    for path, body in (
        generate({"n": 2}),
        generate({"top_k": 2**30, "temperature": 1, "logit_bias": {"5": -100}, "repetition_penalty": 2}),
        generate({"logit_bias": {"5": 1e20}, "temperature": 2e-6}),
        generate({"stop": ["x"], "stop_token_ids": [5], "stop_regex": "a+"}),
        generate(return_logprob=True, top_logprobs_num=3, logprob_start_len=0),
        generate(input_ids=[0, 49151]),
    ):
        answer = requests.post(demo.url + path, json=body, timeout=120)
        assert answer.ok, answer.text
