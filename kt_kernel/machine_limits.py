"""How fast this CPU reads and multiplies, measured and kept in the user's cache.

A busy machine measures too little, never too much. So the first few runs measure, half a second each, and the
best of each limit counts: after that nothing is measured any more. Delete the file to begin again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from kt_kernel.user_cache import file_of_key, write_json

logger = logging.getLogger(__name__)

MEASUREMENTS = 3


@dataclass(frozen=True)
class Limits:
    """Of all threads that would compute: bytes read per second, bf16 products summed in fp32 and int8
    products per second. `assumed`: nothing was measured.
    """

    read: float
    bf16: float
    int8: float
    assumed: bool = False


def limits_key(cpu: str, variant: str, threads: int, nodes: int) -> dict[str, str | int]:
    """What limits are kept for: the CPU's name, the kernels' variant, all threads that would compute, and
    NUMA nodes.
    """
    return {"cpu": cpu, "variant": variant, "threads": threads, "nodes": nodes}


def known_limits(key: dict[str, str | int]) -> tuple[Limits | None, int]:
    """The best seen for `key` (what was measured) and in how many measurements."""
    try:
        content = json.loads(limits_file(key).read_text())
        return Limits(**content["limits"]), int(content["measurements"])
    except (OSError, ValueError, TypeError, KeyError):
        return None, 0


def best_of(first: Limits | None, second: Limits) -> Limits:
    """The higher of each."""
    if first is None:
        return second
    return Limits(*(max(getattr(first, name), getattr(second, name)) for name in ("read", "bf16", "int8")))


def keep_limits(key: dict[str, str | int], limits: Limits, measurements: int) -> None:
    """Whole or not at all; a cache that cannot be written costs a measurement each time."""
    path = limits_file(key)
    content = {"key": key, "measurements": measurements, "limits": asdict(limits)}
    try:
        write_json(path, content)
    except OSError as error:
        logger.debug("the measured limits cannot be kept in %s (%s)", path.parent, error)


def limits_file(key: dict[str, str | int]) -> Path:
    """Where they are kept."""
    return file_of_key("limits", key)
