"""Requests that would end the scheduler, and with it the server, are refused before they reach it.

SGLang 0.5.23 checks lengths, most sampling parameters and biased ids, but not the ids of a prompt, nor that
it has any, nor what float32 and int32 make of a number, nor the types of values; a message that the scheduler
cannot read ends it. A ValueError of these functions is the client's 400.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import re
from array import array
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

# A request becomes so many while it is taken apart, before any queue bounds it.
MOST_SAMPLES = 1024
# SGLang's limits, which it checks after the expressions would have been compiled here.
MOST_PATTERNS = 32
LONGEST_PATTERN = 256
# Braces and brackets inside each other in a schema. The time to compile grows with the cube: nested objects
# take xgrammar 0.05 s with 128 braces, 0.4 s with 256, 3.2 s with 512 (Zen 4, busy, 2026-11-30).
DEEPEST_SCHEMA = 128
# With a temperature of 1e-6, SGLang's least, and the least repetition penalty below, logits stay finite in
# float32; infinite ones make probabilities NaN, and the sampler raises.
MOST_BIAS = 1e20
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 1_000_000),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (-1, 2**31 - 1),  # -1: the whole vocabulary
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "repetition_penalty": (1e-6, 2),
    "min_new_tokens": (0, 2**31 - 1),
    "max_new_tokens": (0, 2**63 - 1),
}


def check_samples(request: Any) -> None:
    """Before `GenerateReqInput.normalize_batch_and_arguments`, which copies the request `n` times."""
    sampling = request.sampling_params
    for parameters in sampling if isinstance(sampling, list) else [sampling]:
        samples = parameters.get("n") if isinstance(parameters, dict) else None
        if samples is not None:
            _check_between("n", samples, 1, MOST_SAMPLES)


def check_request(manager: Any, request: Any, input_ids: Sequence[int] | None) -> None:
    """Before `TokenizerManager._validate_one_request`: all that it names must lie in the vocabulary.

    `input_ids` may be the work of the model's own processor, so those that came with the request are checked.
    """
    vocabulary = manager.model_config.vocab_size
    embeds = getattr(request, "input_embeds", None)
    tokens = next((len(prompt) for prompt in (input_ids, embeds) if prompt is not None and len(prompt)), 0)
    if not tokens:
        raise ValueError("the prompt is empty, expected at least one token.")
    _check_overrides(request.positional_embed_overrides, tokens)
    _check_ids("input_ids", request.input_ids, vocabulary)
    _check_sampling(request, vocabulary)
    if getattr(request, "return_logprob", None):
        _check_between("top_logprobs_num", request.top_logprobs_num or 0, 0, vocabulary)
        if request.logprob_start_len is not None:
            _check_between("logprob_start_len", request.logprob_start_len, -1, tokens)


def check_message(tokenized: Any, manager: Any, *arguments: Any, **options: Any) -> None:
    """After `TokenizerManager._create_tokenized_object`: can the scheduler read what will be sent to it?

    Without images, embeddings in place of tokens and times: large, and made by SGLang.
    """
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.utils import msgpack_decode_explained

    message = copy.copy(tokenized)
    message.mm_inputs = message.time_stats = message.positional_embed_overrides = None
    try:
        msgpack_decode_explained(io_struct.msgpack_encode(message))
    except (ValueError, TypeError, OverflowError) as error:
        names = type(tokenized.sampling_params).__struct_fields__
        reason = re.sub(
            r"\$\.sampling_params\[(\d+)\]",
            lambda place: f"$.sampling_params.{names[int(place[1])]}",
            str(error),
        )
        raise ValueError(f"the request has a value of a wrong type: {reason}") from None


def allow_the_end(result: Any, penalty: Any) -> None:
    """After `BatchedMinNewTokensPenalizer._prepare`: where a grammar leaves nothing but the end, it comes.

    SGLang's penalty of minus infinity would leave no token at all, upon which the sampler raises.
    """
    penalty.stop_token_penalties.clamp_(min=-MOST_BIAS)


def _check_sampling(request: Any, vocabulary: int) -> None:
    sampling = request.sampling_params or {}
    for name, (least, most) in NUMBERS.items():
        if sampling.get(name) is not None:
            _check_number(name, sampling[name], least, most)
    if isinstance(biases := sampling.get("logit_bias"), dict):
        for token, bias in biases.items():
            _check_number(f"logit_bias of {token}", bias, -MOST_BIAS, MOST_BIAS)
    _check_patterns(sampling.get("stop_regex"))
    for name in ("json_schema", "structural_tag"):
        _check_depth(name, sampling.get(name))
    if sampling.get("stop_token_ids"):
        request.sampling_params = sampling | {
            "stop_token_ids": _that_can_come(sampling["stop_token_ids"], vocabulary)
        }


def _that_can_come(stops: Iterable[Any], vocabulary: int) -> list[int]:
    """SGLang drops None; an id outside the vocabulary is harmless until any request in its batch has
    min_new_tokens, which looks up those of the whole batch.
    """
    return [int(token) for token in stops if token is not None and 0 <= int(token) < vocabulary]


def _check_ids(name: str, ids: Sequence[int] | None, vocabulary: int) -> None:
    if ids is None:
        return
    with contextlib.suppress(TypeError, OverflowError):
        numbers = array("q", ids)  # as SGLang does; a prompt may have 100,000
        if not numbers or (min(numbers) >= 0 and max(numbers) < vocabulary):
            return
    wrong = next(token for token in ids if not _is_id(token, vocabulary))
    raise ValueError(f"{name} holds {wrong!r}, expected ids from 0 to {vocabulary - 1} (the vocabulary).")


def _is_id(token: Any, vocabulary: int) -> bool:
    try:
        return 0 <= operator.index(token) < vocabulary
    except TypeError:
        return False


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
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns or ())[:MOST_PATTERNS]:
        if isinstance(pattern, str) and len(pattern) > LONGEST_PATTERN:
            continue  # SGLang refuses it
        try:
            re.compile(pattern)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"stop_regex holds {pattern!r}, which is no expression: {error}.") from None


# With strings, which may hold some. One without an end is taken to the end of the text: otherwise each quote
# in it would begin another search for the end.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


def _check_depth(name: str, schema: Any) -> None:
    if not isinstance(schema, str):
        return
    depth = 0
    for found in _BRACKETS.finditer(schema):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth > DEEPEST_SCHEMA:
            raise ValueError(
                f"{name} is nested deeper than {DEEPEST_SCHEMA} levels of braces and brackets, expected at "
                "most so many; refer to definitions ($defs) instead."
            )


def _check_between(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected an integer from {least} to {most}.")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    if not issubclass(type(value), Real) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected a number from {least} to {most}.")
