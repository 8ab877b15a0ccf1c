"""How a check of `kt doctor` ended."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from kt_kernel.errors import KTError


class Status(enum.Enum):
    """How a check ended; only FAIL makes `kt doctor` fail. SKIP: what it needs has failed."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """What one check saw and, unless all is well, what to do about it; `detail` is for `kt doctor -v`."""

    status: Status
    seen: str
    advice: str = ""
    detail: str = ""


def run_check(check: Callable[[], Finding]) -> Finding:
    """The finding of one check; an exception is a failure with its message."""
    try:
        return check()
    except KTError as error:
        return Finding(Status.FAIL, str(error))
    except Exception as error:  # a broken installation can raise anything
        return Finding(
            Status.FAIL,
            f"{type(error).__name__}: {error}",
            "report this with the output of kt doctor -v and kt version",
        )
