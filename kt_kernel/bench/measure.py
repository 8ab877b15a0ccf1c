"""One row of a benchmark: a layer's median time for so many tokens, as shares of the machine's limits.

Every call uses other tokens and other experts, and the layer is larger than the caches, so the weights come
from memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kt_kernel import kt_kernel_ext
from kt_kernel.bench.layer import RandomLayer
from kt_kernel.bench.limits import Limits, measure_limits, median_limits
from kt_kernel.bench.shapes import Call, Shape, random_call
from kt_kernel.bench.targets import Target, target_for

# torch's OpenMP threads spin for about a millisecond after their work and would share our cores meanwhile.
_SETTLE_SECONDS = 0.01
_MOST_TOKENS_IN_LONG_ROWS = 64


@dataclass(frozen=True)
class Effort:
    """How often a method is measured, and how many calls each of its rows gets in one round.

    The calls of a round follow each other directly, as the layers of a model do: at least `least`, then until
    they have taken `seconds` or there are `most`, the layers of a large model.

    (After a pause of 10 ms the first calls are slower: eight calls of one token in a row had a median 9 %
    above that of 64. Emerald Rapids in a virtual machine, 2026-11-21, GPTQ_INT4, shape S.)
    """

    rounds: int
    seconds: float
    least: int
    most: int = 48


QUICK = Effort(rounds=3, seconds=0.15, least=2)
THOROUGH = Effort(rounds=5, seconds=0.4, least=2)


@dataclass(frozen=True)
class Row:
    """`gigabytes_per_second` counts the distinct experts used, as stored in a checkpoint, scales included.

    Shares: of the measured read bandwidth; of the measured peak of bf16 products (of f32 ones on CPUs that
    multiply no bf16); `roof`: the time that the slower of these two limits alone would take / time.
    """

    method: str
    kernel: str
    shape: str
    tokens: int
    threads: int
    calls: int
    ms: float
    gigabytes_per_second: float
    bits_per_weight: float
    share_of_read: float
    share_of_peak: float
    share_of_roof: float
    target: Target | None
    limits: Limits
    other_ms: dict[str, float] = field(default_factory=dict)

    @property
    def misses_target(self) -> bool:
        """Whether there is a target and it is not reached."""
        return self.target is not None and self.share(self.target.limit) < self.target.share

    def share(self, limit: str) -> float:
        """The share of "read", "peak" or "roof"."""
        return getattr(self, f"share_of_{limit}")


def chosen_kernel(method: str) -> str:
    """Name of the kernel that runs the method on this machine."""
    rows = kt_kernel_ext.dispatch_table()
    return next(r["kernel"] for r in rows if r["method"] == method and r["state"] == "chosen")


Others = dict[str, Callable[[Call], object]]
"""Name -> the same layer in other software."""

_OURS = "ours"


@dataclass
class _Samples:
    """Seconds of each call by whose it was, and the distinct experts of each call."""

    seconds: dict[str, list[float]]
    distinct_experts: list[int] = field(default_factory=list)


def measure_method(
    method: str,
    shape: Shape,
    tokens: Sequence[int],
    threads: int,
    effort: Effort,
    others: Others | None = None,
) -> list[Row]:
    """A row per token count: medians over the calls of all rounds.

    A machine's speed drifts and drops for moments, so each round measures the limits too, whose medians
    count, and the calls of `others` alternate with ours.
    """
    layer = RandomLayer(method, shape, threads=threads, max_tokens=max(tokens))
    run = {_OURS: lambda call: layer.forward(call.hidden, call.ids, call.weights), **(others or {})}
    samples = {count: _Samples({name: [] for name in run}) for count in tokens}
    limits = []
    for _ in range(effort.rounds):
        limits.append(measure_limits(layer.cpu_infer))
        for count in tokens:
            _measure_round(samples[count], run, shape, count, effort)
    medians = median_limits(limits)
    return [_row(layer, shape, count, samples[count], medians) for count in tokens]


def _measure_round(samples: _Samples, run: Others, shape: Shape, tokens: int, effort: Effort) -> None:
    first = len(samples.distinct_experts)
    calls = [random_call(shape, tokens, seed=first + i) for i in range(_calls_to_prepare(tokens, effort))]
    time.sleep(_SETTLE_SECONDS)
    seconds = _seconds_in_a_row(run[_OURS], calls, effort)
    calls = calls[: len(seconds)]
    samples.distinct_experts += [call.distinct_experts for call in calls]
    samples.seconds[_OURS] += seconds
    for name in run.keys() - {_OURS}:
        time.sleep(_SETTLE_SECONDS)
        samples.seconds[name] += [_seconds(run[name], call) for call in calls]


def _calls_to_prepare(tokens: int, effort: Effort) -> int:
    """Calls of many tokens take memory, and long enough that few of them do."""
    return effort.most if tokens <= _MOST_TOKENS_IN_LONG_ROWS else effort.least


def _seconds_in_a_row(
    function: Callable[[Call], object], calls: Sequence[Call], effort: Effort
) -> list[float]:
    seconds: list[float] = []
    for call in calls:
        seconds.append(_seconds(function, call))
        if len(seconds) >= effort.least and sum(seconds) >= effort.seconds:
            break
    return seconds


def _row(layer: RandomLayer, shape: Shape, tokens: int, samples: _Samples, limits: Limits) -> Row:
    medians = {name: statistics.median(seconds) for name, seconds in samples.seconds.items()}
    ours = medians.pop(_OURS)
    bytes_read = statistics.mean(samples.distinct_experts) * layer.expert_bytes
    read_seconds = bytes_read / limits["read"]["per_second"]
    compute_seconds = shape.flops(tokens) / limits["bf16_dot"]["per_second"]
    kernel = chosen_kernel(layer.method)
    bits = 8 * layer.expert_bytes / shape.expert_elements
    return Row(
        method=layer.method,
        kernel=kernel,
        shape=shape.name,
        tokens=tokens,
        threads=layer.cpu_infer.threads,
        calls=len(samples.distinct_experts),
        ms=ours * 1e3,
        gigabytes_per_second=bytes_read / ours / 1e9,
        bits_per_weight=bits,
        share_of_read=read_seconds / ours,
        share_of_peak=compute_seconds / ours,
        share_of_roof=max(read_seconds, compute_seconds) / ours,
        target=target_for(kernel, bits, shape.name, tokens),
        limits=limits,
        other_ms={name: 1e3 * seconds for name, seconds in medians.items()},
    )


def _seconds(function: Callable[[Call], object], call: Call) -> float:
    begin = time.perf_counter()
    function(call)
    return time.perf_counter() - begin
