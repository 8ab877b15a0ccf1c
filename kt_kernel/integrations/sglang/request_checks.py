"""Requests that would end the scheduler, and with it the server, are refused before they reach it.

SGLang 0.5.23 checks lengths, sampling parameters and biased ids, but not the ids of a prompt, nor that it has
any, nor how many alternatives or samples are asked for. A ValueError of these functions is the client's 400.
"""

from __future__ import annotations

import re
from typing import Any

# A request becomes so many while it is taken apart, before any queue bounds it.
MOST_SAMPLES = 1024
# Each is looked for after every token.
MOST_STOPS = 256


def check_samples(request: Any) -> None:
    """Before `GenerateReqInput.normalize_batch_and_arguments`, which copies the request `n` times."""
    sampling = request.sampling_params
    for parameters in sampling if isinstance(sampling, list) else [sampling]:
        samples = parameters.get("n") if isinstance(parameters, dict) else None
        if samples is not None:
            _check_between("n", samples, 1, MOST_SAMPLES)


def check_request(manager: Any, request: Any, input_ids: list[int] | None) -> None:
    """Before `TokenizerManager._validate_one_request`: all that it names must lie in the vocabulary.

    `input_ids` may be the work of the model's own processor, so those that came with the request are checked.
    """
    vocabulary = manager.model_config.vocab_size
    sampling = request.sampling_params or {}
    if not input_ids and getattr(request, "input_embeds", None) is None:
        raise ValueError("the prompt is empty, expected at least one token.")
    _check_overrides(request.positional_embed_overrides, len(input_ids or ()))
    _check_ids("input_ids", request.input_ids, vocabulary)
    _check_ids("stop_token_ids", sampling.get("stop_token_ids"), vocabulary)
    for name in ("stop", "stop_regex", "stop_token_ids"):
        if isinstance(sampling.get(name), list):
            _check_between(f"the number of {name}", len(sampling[name]), 0, MOST_STOPS)
    _check_patterns(sampling.get("stop_regex"))
    if getattr(request, "return_logprob", None):
        _check_between("top_logprobs_num", request.top_logprobs_num or 0, 0, vocabulary)
        if request.logprob_start_len is not None:
            _check_between("logprob_start_len", request.logprob_start_len, -1, len(input_ids or ()))


def _check_ids(name: str, ids: list[int] | None, vocabulary: int) -> None:
    if not ids:
        return
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocabulary:
        return  # three passes in C: a prompt may have 100,000
    wrong = next(token for token in ids if type(token) is not int or not 0 <= token < vocabulary)
    raise ValueError(f"{name} holds {wrong!r}, expected ids from 0 to {vocabulary - 1} (the vocabulary).")


def _check_overrides(overrides: Any, tokens: int) -> None:
    """Embeddings in place of tokens come as an object from Python programs, never in JSON."""
    positions = getattr(overrides, "positions", None)
    if overrides is not None and positions is None:
        raise ValueError(
            f"positional_embed_overrides is a {type(overrides).__name__}, expected SGLang's PositionalEmbeds."
        )
    for position in positions or ():
        _check_between("a position of positional_embed_overrides", position, 0, tokens - 1)


def _check_patterns(patterns: str | list[str] | None) -> None:
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"stop_regex holds {pattern!r}, which is no expression: {error}.") from None


def _check_between(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected an integer from {least} to {most}.")
