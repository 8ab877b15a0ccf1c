"""What a patched model says, in the words of tests/serving/agreement.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from agreement import Agreement, Served, compare
from texts import ENGLISH
from tiny_models import VOCABULARY

from kt_kernel.integrations.transformers import from_pretrained

# The tokenizer of the tiny models has one token per byte.
PROMPT = [min(byte, VOCABULARY - 1) for byte in ENGLISH.encode()[:240]]
NEW_TOKENS = 24


def load(path: Path, **options: Any) -> torch.nn.Module:
    """The checkpoint in float32, patched, on two threads."""
    return from_pretrained(path, dtype=torch.float32, cpuinfer=2, threadpool_count=1, **options)


@torch.inference_mode()
def prompt_answer(model: torch.nn.Module, ids: list[int] = PROMPT) -> Served:
    """The whole prompt in one call."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return _served(ids, 1, logits)


@torch.inference_mode()
def generated(model: torch.nn.Module, ids: list[int] = PROMPT, tokens: int = NEW_TOKENS) -> Served:
    """Greedy decoding with `generate`, one token a step."""
    result = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(result.logits).float()
    # min_new_tokens forbids the end of text, which the raw logits may still prefer.
    logits[:, model.generation_config.eos_token_id] = float("-inf")
    return _served(result.sequences[0].tolist(), len(ids), logits)


def agreement(model: torch.nn.Module, reference: torch.nn.Module) -> Agreement:
    """Prompt and continuation against plain transformers."""
    return compare(reference, prompt_answer(model), generated(model))


def _served(ids: list[int], first: int, logits: torch.Tensor) -> Served:
    given = torch.tensor(ids[first:])
    logprobs = logits.log_softmax(-1).gather(1, given[:, None])[:, 0]
    return Served(ids, first, logits.argmax(-1).tolist(), logprobs.tolist())
