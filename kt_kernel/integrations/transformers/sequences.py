"""Whose rows a call of a model of transformers has: one sequence of its batch is one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kt_kernel.hybrid.pass_rows import RequestRows, streamed_tokens


def requests_of(
    arguments: Sequence[Any], options: Mapping[str, Any], threshold: int
) -> list[RequestRows] | None:
    """From what a decoder is called with; None where that does not tell, or no batch is long enough.

    A sequence's padding does not count, but is computed as the sequence is.
    """
    tokens = options.get("input_ids", arguments[0] if arguments else None)
    tokens = options.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2 or tokens.shape[0] == 1:
        return None
    batch, width = tokens.shape[:2]
    if not 0 < threshold <= batch * width:
        return None
    lengths = _lengths(options.get("attention_mask"), batch, width)
    return [RequestRows(width, width * bool(streamed_tokens(length, threshold, None))) for length in lengths]


def _lengths(mask: Any, batch: int, width: int) -> list[int]:
    """The tokens of each sequence that are no padding."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[0] == batch:
        return (mask[:, -width:] != 0).sum(dim=1).tolist()
    return [width] * batch
