"""Whose rows a batch of the scheduler has, for prompts that meet whole layers on the device.

What a prompt's tokens meet is settled when the scheduler first takes it up, by the tokens that the prefix
cache does not have then. How the prompt is cut into chunks later depends on other requests, and changes
nothing. All ranks have the same requests, so they settle the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kt_kernel.hybrid.pass_rows import RequestRows, streamed_tokens

_ATTRIBUTE = "_kt_streamed"  # of SGLang's requests


@dataclass(frozen=True)
class _Streamed:
    """Places in the prompt: from the first new one up to the first that is not streamed."""

    first: int
    end: int


def rows_of(batch: Any, threshold: int, chunk: int | None) -> list[RequestRows]:
    """Of each request in `batch`, in the order of the rows; none for a batch that only decodes."""
    if not _has_prompts(batch.forward_mode):
        return []
    parts = zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)
    return [_rows(request, before, new, threshold, chunk) for request, before, new in parts]


def _has_prompts(mode: Any) -> bool:
    return mode.is_extend() and not mode.is_target_verify() and not mode.is_dllm_extend()


def _rows(request: Any, before: int, new: int, threshold: int, chunk: int | None) -> RequestRows:
    """Of a request with `new` tokens in this batch, behind `before` others."""
    streamed = getattr(request, _ATTRIBUTE, None)
    # One that had to give its memory up may find less of its beginning in the cache than it once did.
    if streamed is None or before < streamed.first:
        length = len(request.origin_input_ids) - before
        streamed = _Streamed(before, before + streamed_tokens(length, threshold, chunk))
        setattr(request, _ATTRIBUTE, streamed)
    return RequestRows(new, min(max(streamed.end - before, 0), new))
