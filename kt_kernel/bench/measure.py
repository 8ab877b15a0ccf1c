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
from kt_kernel.bench.targets import Target, gguf_target, target_for

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


ONE_ROUND = Effort(rounds=1, seconds=0.15, least=2)
QUICK = Effort(rounds=3, seconds=0.15, least=2)
THOROUGH = Effort(rounds=5, seconds=0.4, least=2)


@dataclass(frozen=True)
class Row:
    """`format`: the type of a GGUF layer, else the method's name.
    `gigabytes_per_second` counts the distinct experts used, as stored in a checkpoint, scales included.

    Shares: of the measured read bandwidth; of the measured peak of the products that `activations` asks for
    (`peak_limit`); `roof`: the time that the slower of these two limits alone would take / time.
    """

    method: str
    format: str
    activations: str
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
    def label(self) -> str:
        """Method and, where it has several, format."""
        return self.method if self.format == self.method else f"{self.method} {self.format}"

    @property
    def misses_target(self) -> bool:
        """Whether there is a target and it is not reached."""
        return self.target is not None and self.share(self.target.limit) < self.target.share

    def share(self, limit: str) -> float:
        """The share of "read", "peak" or "roof"."""
        return getattr(self, f"share_of_{limit}")


def kernels(method: str, ggml_type: str | None = None) -> dict[str, str]:
    """Activations ("auto" among them) -> name of the kernel that runs the method with them here."""
    named: dict[str, str] = {}
    for row in kt_kernel_ext.dispatch_table():
        if row["method"] != method or row["format"] != (ggml_type or row["format"]):
            continue
        if row["state"] != "unavailable":
            named.setdefault(row["activations"], row["kernel"])
            if row["state"] == "chosen":
                named["auto"] = row["kernel"]
    return named


# Kernels of integers of 8 bits: without VNNI their products do not add up in 16 bits.
_OF_WIDE_INTEGERS = ("int8_int8.", "code4wide_int8.")


def peak_limit(activations: str, kernel: str) -> str:
    """Name of the limit of a kernel's arithmetic: bf16 products where a CPU has them (else f32), or int8."""
    if activations == "bf16":
        return "bf16_dot"
    return "int8_widened" if kernel.startswith(_OF_WIDE_INTEGERS) else "int8_dot"


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
    activations: Sequence[str] = ("auto",),
    ggml_type: str | None = None,
) -> list[Row]:
    """A row per token count and kind of activations: medians over the calls of all rounds.

    A machine's speed drifts and drops for moments, so each round measures the limits too, whose medians
    count, and the calls of `others` and of different activations alternate.
    """
    layers = [
        RandomLayer(
            method,
            shape,
            threads=threads,
            max_tokens=max(tokens),
            activations=kind,
            ggml_type=ggml_type,
        )
        for kind in activations
    ]
    samples = {
        (layer, count): _Samples({name: [] for name in [_OURS, *(others or {})]})
        for count in tokens
        for layer in layers
    }
    limits = []
    for _ in range(effort.rounds):
        limits.append(measure_limits(layers[0].cpu_infer))
        for (layer, count), own in samples.items():
            _measure_round(own, {_OURS: layer.run, **(others or {})}, shape, count, effort)
    medians = median_limits(limits)
    rows = [_row(layer, shape, count, own, medians) for (layer, count), own in samples.items()]
    for row in rows:
        same = [other for other in rows if other is not row and other.tokens == row.tokens]
        row.other_ms.update({other.activations: other.ms for other in same})
    return rows


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
    known = kernels(layer.method, layer.format)
    kernel = known[layer.activations]
    activations = next(kind for kind, name in known.items() if kind != "auto" and name == kernel)
    medians = {name: statistics.median(seconds) for name, seconds in samples.seconds.items()}
    ours = medians.pop(_OURS)
    bytes_read = statistics.mean(samples.distinct_experts) * layer.expert_bytes
    read_seconds = bytes_read / limits["read"]["per_second"]
    bits = 8 * layer.expert_bytes / shape.expert_elements
    compute_seconds = shape.flops(tokens) / limits[peak_limit(activations, kernel)]["per_second"]
    return Row(
        method=layer.method,
        format=layer.format,
        activations=activations,
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
        target=_target(layer, kernel, bits, tokens, activations),
        limits=limits,
        other_ms={name: 1e3 * seconds for name, seconds in medians.items()},
    )


def _target(layer: RandomLayer, kernel: str, bits: float, tokens: int, activations: str) -> Target | None:
    if layer.format != layer.method:
        return gguf_target(kernel, layer.format, layer.shape.name, tokens)
    return target_for(kernel, bits, layer.shape.name, tokens, activations)


def _seconds(function: Callable[[Call], object], call: Call) -> float:
    begin = time.perf_counter()
    function(call)
    return time.perf_counter() - begin
