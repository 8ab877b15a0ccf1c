"""What a level of load amounts to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kt_kernel.bench.serving.requests import Sample


@dataclass(frozen=True)
class Level:
    """Users at the same time, and how long their prompts and answers are to be, in tokens."""

    users: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Spread:
    """Milliseconds."""

    median: float
    p95: float


@dataclass(frozen=True)
class Figures:
    """Of one level: TTFT (time to first token), TPOT (time per output token after it), ITL (gap between two
    pieces), and tokens of all users per second of wall clock, as the server counted them.

    Without a finished request all but the counts are None.
    """

    level: Level
    finished: int
    failed: int
    seconds: float
    prompt_tokens: float | None
    output_tokens: float | None
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None


def figures(level: Level, samples: Sequence[Sample], failed: int, seconds: float) -> Figures:
    """Of the requests that finished within `seconds`."""
    outputs = sum(sample.output_tokens for sample in samples)
    prompts = sum(sample.prompt_tokens for sample in samples)
    per_token = [found for sample in samples if (found := sample.seconds_per_token) is not None]
    count = len(samples)
    return Figures(
        level=level,
        finished=count,
        failed=failed,
        seconds=seconds,
        prompt_tokens=prompts / count if count else None,
        output_tokens=outputs / count if count else None,
        ttft_ms=spread_ms([sample.first_token_seconds for sample in samples]),
        tpot_ms=spread_ms(per_token),
        itl_ms=spread_ms([gap for sample in samples for gap in sample.gaps]),
        output_tokens_per_s=outputs / seconds if count else None,
        total_tokens_per_s=(outputs + prompts) / seconds if count else None,
    )


def spread_ms(seconds: Sequence[float]) -> Spread | None:
    """Median and 95th percentile (nearest rank); None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return Spread(1e3 * _rank(ordered, 0.5), 1e3 * _rank(ordered, 0.95))


def _rank(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
