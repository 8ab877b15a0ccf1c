"""Whose rows a call of a model of transformers has: one sequence of its batch is one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kt_kernel.hybrid.pass_rows import RequestRows, streamed_tokens


def requests_of(
    arguments: Sequence[Any], options: Mapping[str, Any], threshold: int
) -> list[RequestRows] | None:
    """From what a decoder is called with; None where a call is one prompt without padding, or too short.

    A sequence's padding does not count, but is computed as the sequence is. A mask tells it: [batch, tokens],
    or the last query of [batch, heads, queries, tokens], the one for full attention where there are several.
    Without a mask of these kinds every token counts.
    """
    tokens = options.get("input_ids", arguments[0] if arguments else None)
    tokens = options.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        return None
    batch, width = tokens.shape[:2]
    if not 0 < threshold <= batch * width:
        return None
    mask = options.get("attention_mask", arguments[1] if len(arguments) > 1 else None)
    lengths = _lengths(mask, batch, width)
    if lengths == [width]:
        return None
    return [RequestRows(width, width * bool(streamed_tokens(length, threshold, None))) for length in lengths]


def _lengths(mask: Any, batch: int, width: int) -> list[int]:
    """The tokens of each sequence that are no padding."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor) or mask.shape[0] != batch or mask.dim() not in (2, 4):
        return [width] * batch
    seen = mask != 0
    if mask.dim() == 4:
        last = mask[:, 0, -1]
        seen = last if last.dtype == torch.bool else last == 0  # else it is added to the scores
    return seen[:, -width:].sum(dim=1).tolist()
