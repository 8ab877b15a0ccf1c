"""Failures made on purpose, for tests: KT_FAULT="point" or "point:n" lets the first, or the n-th, use of a
point fail, once in each process that comes there.

A point is reached where the real failure would show, so that what handles that is what is tested
(tests/faults). Some are in the extension (csrc/core/fault.h), which counts by itself.
"""

from __future__ import annotations

import logging
import os

from kt_kernel.errors import ConfigurationError

logger = logging.getLogger(__name__)

VARIABLE = "KT_FAULT"

# What fails there.
IN_EXTENSION = {
    "allocation": "memory for weights or scratch cannot be reserved",
    "thread-start": "a thread of the pools or of the task queue cannot be started",
    "queue-task": "a queued task of the CPU throws",
    "device-copy": "an expert's copy to the device fails",
}
IN_PYTHON = {
    "file-read": "a file of weights cannot be read",
    "device-memory": "the device has no memory for more experts",
    "copy-job": "a job of the copying thread raises",
    "rank-death": "the process of the last rank is killed at the begin of a step",
}
POINTS = IN_EXTENSION | IN_PYTHON

_uses_left: dict[str, int] = {}  # until the use that fails; normally empty


def fails(point: str) -> bool:
    """Is this use of a point in Python the one that is to fail?"""
    if point not in _uses_left:
        return False
    _uses_left[point] -= 1
    if _uses_left[point] > 0:
        return False
    del _uses_left[point]
    return True


def arm(point: str, nth: int = 1) -> None:
    """Let the `nth` use of `point` from now on fail, in this process; 0 = none. Raises ConfigurationError for
    a point that there is not.
    """
    if point not in POINTS:
        raise ConfigurationError(f"the fault point {point!r} is unknown; use one of {', '.join(POINTS)}.")
    if point in IN_EXTENSION:
        from kt_kernel import kt_kernel_ext

        kt_kernel_ext.arm_fault(point, nth)
    elif nth:
        _uses_left[point] = nth
    else:
        _uses_left.pop(point, None)


def asked_for(text: str) -> tuple[str, int]:
    """The point and the number of the use of "point" or "point:n"; raises ConfigurationError."""
    point, colon, number = text.partition(":")
    nth = int(number) if number.isdecimal() else 1
    if point not in POINTS or (colon and not number.isdecimal()):
        raise ConfigurationError(
            f"{VARIABLE} is {text!r}, expected one of {', '.join(POINTS)}, perhaps with :n for the n-th use."
        )
    return point, nth


if VARIABLE in os.environ:
    _point, _nth = asked_for(os.environ[VARIABLE])
    logger.warning("%s=%s: %s, on purpose", VARIABLE, os.environ[VARIABLE], POINTS[_point])
    if _point in IN_PYTHON and _nth:
        _uses_left[_point] = _nth
