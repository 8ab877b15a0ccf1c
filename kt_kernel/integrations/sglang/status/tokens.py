"""Tokens that a scheduler has computed, found in its prefix cache and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TokenCounts:
    """Since the start. `prompt`: computed by prefill; `cached`: of prompts, found in the prefix cache
    instead; `output`: written.

    A request that was put back and begins anew counts again as computed, but what it finds of itself in the
    cache is no hit.
    """

    prompt: int = 0
    cached: int = 0
    output: int = 0

    def count_prefill(self, batch: Any) -> None:
        """Before a batch's result is processed. The last chunk of a prompt brings the first token of the
        answer; decoding requests may be in the same batch, with one token each.
        """
        if not batch.forward_mode.is_extend():
            return
        self.output += sum(request.inflight_middle_chunks <= 0 for request in batch.reqs)
        stats = batch.prefill_stats
        if stats is not None:
            self.prompt += stats.log_input_tokens
            self.cached += stats.log_hit_tokens - stats.reprocessed_log_hit_tokens

    def count_decode(self, tokens: int) -> None:
        """Once for each decode step."""
        self.output += tokens


COUNTS = TokenCounts()
"""Those of this process's scheduler."""


def count_decode(reporter: Any, *arguments: Any, num_generated_tokens: int = 0, **options: Any) -> None:
    """Before `SchedulerMetricsReporter.report_decode_stats`, which is called after each decode step."""
    COUNTS.count_decode(num_generated_tokens)
