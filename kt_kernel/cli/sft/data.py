"""Texts and conversations as tokens, and which of them are learned.

One JSON object a line, of one of these kinds:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}
    {"text": ...}

What the assistant says, and completions, are learned; of a text everything is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError

from kt_kernel.errors import ConfigurationError, InputError

IGNORED = -100  # the label of a token that is not learned


@dataclass(frozen=True)
class Example:
    """`ids` of one text, and for each the label that the loss compares with: itself, or IGNORED."""

    ids: list[int]
    labels: list[int]


def read_examples(path: str, tokenizer: Any, max_length: int) -> list[Example]:
    """The examples of a file, each cut to `max_length` tokens; those with nothing to learn are left out.

    Raises ConfigurationError naming the line for one that is of no known kind, or if nothing is left.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"data '{path}' cannot be read: {error}.") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                example = _example(json.loads(line), tokenizer)
            except (ValueError, KeyError, TypeError, InputError, TemplateError) as error:
                raise ConfigurationError(
                    f"line {number} of '{path}' is no example ({error}); give one JSON object a line, with "
                    "'messages', 'prompt' and 'completion', or 'text'."
                ) from error
            examples.append(Example(example.ids[:max_length], example.labels[:max_length]))
    examples = [each for each in examples if any(label != IGNORED for label in each.labels[1:])]
    if not examples:
        raise ConfigurationError(
            f"'{path}' has no example with anything to learn in its first {max_length} tokens; check the "
            "file, or set max_length higher."
        )
    return examples


def batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Groups of `size` examples without end, each pass in another order; the same for the same seed."""
    epoch = 0
    waiting: list[Example] = []
    while True:
        generator = torch.Generator().manual_seed(seed + epoch)
        for place in torch.randperm(len(examples), generator=generator).tolist():
            waiting.append(examples[place])
            if len(waiting) == size:
                yield waiting
                waiting = []
        epoch += 1


def as_tensors(batch: Sequence[Example], padding: int, device: str) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [examples, longest]."""
    longest = max(len(each.ids) for each in batch)

    def padded(rows: list[list[int]], with_: int) -> torch.Tensor:
        return torch.tensor([row + [with_] * (longest - len(row)) for row in rows], device=device)

    return {
        "input_ids": padded([each.ids for each in batch], padding),
        "attention_mask": padded([[1] * len(each.ids) for each in batch], 0),
        "labels": padded([each.labels for each in batch], IGNORED),
    }


def _example(said: dict, tokenizer: Any) -> Example:
    if "messages" in said:
        return _conversation(said["messages"], tokenizer)
    for key in ("text", "prompt", "completion"):
        if not isinstance(said.get(key, ""), str):
            raise InputError(f"its {key!r} is a {type(said[key]).__name__}, expected a string")
    if "text" in said:
        ids = tokenizer(said["text"])["input_ids"] + _end(tokenizer)
        return Example(ids, list(ids))
    prompt = tokenizer(said["prompt"])["input_ids"]
    rest = tokenizer(said["completion"], add_special_tokens=False)["input_ids"] + _end(tokenizer)
    return Example(prompt + rest, [IGNORED] * len(prompt) + rest)


def _conversation(messages: list[dict], tokenizer: Any) -> Example:
    if not tokenizer.chat_template:
        raise InputError("the model has no chat template; give 'prompt' and 'completion'")

    def tokens(count: int, **options: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = tokens(len(messages))
    labels = [IGNORED] * len(ids)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = tokens(place, add_generation_prompt=True) if place else []
            end = tokens(place + 1)
            if ids[: len(begin)] != begin or ids[: len(end)] != end:
                raise InputError("the chat template changes earlier turns; split it into one answer a line")
            labels[len(begin) : len(end)] = ids[len(begin) : len(end)]
    return Example(ids, labels)


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
