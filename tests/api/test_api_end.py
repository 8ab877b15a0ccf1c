"""Risk: a program that ends while other threads are in calls of ours aborts instead of ending."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from api_support import loaded_wrapper, random_call, random_experts
from isolation import isolated

_THREADS = 3


def _call_for_ever(what: str) -> None:
    """Threads that Python does not wait for; returns when each has called."""
    begun = threading.Barrier(_THREADS + 1)

    def calls() -> None:
        wrapper = loaded_wrapper(random_experts(seed=1))
        hidden, ids, weights = random_call(1, 40)
        wrapper.forward(hidden, ids, weights)
        begun.wait()
        while True:
            if what == "forward":
                wrapper.forward(hidden, ids, weights)
            else:
                wrapper.submit_forward(hidden, ids, weights)
                wrapper.sync_forward(hidden)

    for _ in range(_THREADS):
        threading.Thread(target=calls, daemon=True).start()
    begun.wait()


def ends_while_others_compute(what: str) -> None:
    _call_for_ever(what)


@pytest.mark.parametrize("what", ["forward", "submit"])
def test_a_program_ends_cleanly_while_other_threads_compute(what):
    here = str(Path(__file__).parent)
    for _ in range(3):  # chance decides where the threads are
        isolated(Path(__file__).stem, ends_while_others_compute.__name__, what, timeout=120, PYTHONPATH=here)
