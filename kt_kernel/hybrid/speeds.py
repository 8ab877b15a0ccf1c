"""How quick this machine is with an expert: on the CPU, and on its way to the device.

Measured once, then kept in the folder `speeds` of the user's cache. A file is named by a hash of its key,
which says what was measured; one that is damaged, or whose key is another, is measured anew.
"""

from __future__ import annotations

import bisect
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kt_kernel.errors import ConfigurationError
from kt_kernel.user_cache import file_of_key, write_json

logger = logging.getLogger(__name__)

Key = Mapping[str, str | int]

TOKENS_MEASURED = (1, 4, 16, 64)
# The median of so many calls each: one that another process disturbs does not count.
_REPEATS = 5


@dataclass(frozen=True)
class ExpertSpeeds:
    """`cpu_seconds[i]`: for one of several experts that get `tokens[i]` tokens each. `fetch_seconds`: to
    bring one of several experts to the device.

    Raises ConfigurationError if these are no positive numbers, or the tokens do not ascend.
    """

    tokens: tuple[int, ...]
    cpu_seconds: tuple[float, ...]
    fetch_seconds: float

    def __post_init__(self) -> None:
        numbers = (*self.tokens, *self.cpu_seconds, self.fetch_seconds)
        positive = all(isinstance(n, (int, float)) and 0 < n < math.inf for n in numbers)
        ascending = positive and all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        if not (ascending and self.tokens and len(self.tokens) == len(self.cpu_seconds)):
            raise ConfigurationError(
                f"{self} is no table of speeds: expected positive seconds for ascending numbers of tokens; "
                "measure again."
            )

    def cpu_seconds_of(self, tokens: int) -> float:
        """For one expert with so many tokens: in proportion between two measurements and after the last."""
        after = bisect.bisect_left(self.tokens, tokens)
        if after == 0:
            return self.cpu_seconds[0]
        if after == len(self.tokens):
            return self.cpu_seconds[-1] * tokens / self.tokens[-1]
        (t0, t1), (s0, s1) = self.tokens[after - 1 : after + 1], self.cpu_seconds[after - 1 : after + 1]
        return s0 + (s1 - s0) * (tokens - t0) / (t1 - t0)


def seconds_per_expert(work: Callable[[], int]) -> float:
    """`work` deals with several experts, and returns how many when it is done.

    It should take others at every call, or caches would answer for the memory. Its first call, which may
    still be allocating, does not count.
    """
    work()
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        experts = work()
        seconds.append((time.perf_counter() - begin) / experts)
    return statistics.median(seconds)


# ---- the user's cache --------------------------------------------------------------------------


def cpu_name() -> str:
    """What /proc/cpuinfo calls the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def read_speeds(key: Key) -> ExpertSpeeds | None:
    """What was measured for `key`, None if nothing was, or not in a form that can be used."""
    try:
        content = json.loads(_path(key).read_text())
        if content["key"] != dict(key):
            return None
        values = content["speeds"]
        return ExpertSpeeds(
            tuple(values["tokens"]), tuple(values["cpu_seconds"]), float(values["fetch_seconds"])
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("the measured speeds in %s cannot be used (%s): measuring again", _path(key), error)
        return None


def write_speeds(key: Key, speeds: ExpertSpeeds) -> None:
    """Keep `speeds`, whole or not at all; a cache that cannot be written costs a measurement each time."""
    path = _path(key)
    content: dict[str, Any] = {"key": dict(key), "speeds": asdict(speeds)}
    try:
        write_json(path, content)
    except OSError as error:
        logger.warning("the measured speeds cannot be kept in %s (%s)", path.parent, error)


def _path(key: Key) -> Path:
    return file_of_key("speeds", key)
