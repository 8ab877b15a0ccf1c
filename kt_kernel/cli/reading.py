"""What a running server says of its experts, asked once."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

from kt_kernel.cli.errors import CommandError

# SGLang answers between two batches; one chunk of a long prompt on a slow CPU takes seconds.
TIMEOUT_SECONDS = 30
_REFUSALS = (401, 403)

Report = dict[str, Any]

# What is shown, of `kt_kernel.hybrid.report`.
_FIGURES = {
    "layers",
    "experts",
    "device_experts",
    "hit_rate",
    "updates",
    "experts_moved",
    "bytes_copied",
    "bytes",
    "prefill",
    "cpu",
    "deferred",
    "miss_policy",
}


@dataclass(frozen=True)
class Reading:
    """One answer of the server: its model's name, the experts' report, and when it came (seconds)."""

    model: str
    report: Report
    time: float


def read(url: str, api_key: str = "") -> Reading:
    """Ask the server once, with its key if it has one.

    Raises:
        CommandError: nothing answers there, or the server runs no experts of ours.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            info = json.load(answer)
    except (OSError, ValueError) as error:
        if getattr(error, "code", None) in _REFUSALS:
            raise CommandError(
                f"The server at {url} refuses the key: give its own with --api-key or KT_API_KEY"
            ) from error
        raise CommandError(
            f"No server answers at {url} ({error}): start one with kt run, or name it with --host and --port."
        ) from error
    report = _find_report(info)
    if report is None:
        raise CommandError(
            f"The server at {url} reports no experts of kt-kernel: start it with kt run, or with "
            "--kt-weight-path."
        )
    missing = sorted(_FIGURES - report.keys())
    if missing:
        raise CommandError(
            f"The report of the server at {url} lacks {', '.join(missing)}: it runs another version of "
            "kt-kernel; use the kt command of that version."
        )
    return Reading(str(info.get("served_model_name") or info.get("model_path")), report, time.monotonic())


def _find_report(info: Any) -> Report | None:
    """At the top of the answer, or in the state of the first scheduler that has one."""
    if not isinstance(info, dict):
        return None
    states = [info, *(info.get("internal_states") or ())]
    return next((state["kt"] for state in states if isinstance(state, dict) and state.get("kt")), None)
