"""Risk: a server that waits for requests burns CPU, because workers spin instead of sleeping."""

from __future__ import annotations

import time
from pathlib import Path

from harness import F32, arguments, build_layer, ext, poisoned, random_call, random_experts

WATCHED_SECONDS = 1.0
# 1 % of one core for all our threads together; sleeping threads measure 0.
ALLOWED_SECONDS = 0.01


def seconds_on_cpu() -> dict[str, float]:
    """CPU time of this process's worker and queue threads, by thread id and name (nanosecond clock)."""
    times = {}
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith("kt-"):
            times[f"{task.name} {name}"] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return times


def test_idle_workers_sleep():
    engines = [ext.Engine(2), ext.Engine(3), ext.Engine(3, 3)]
    for engine in engines:
        experts = random_experts(1, 4, 72, 40)
        layer = build_layer(engine, experts)
        call = random_call(1, experts, 33, top_k=2)
        output = poisoned(call.hidden.shape, F32)
        layer.forward(*arguments(call, output, F32))
        layer.submit(*arguments(call, output, F32))
        engine.sync()
    time.sleep(0.05)
    before = seconds_on_cpu()
    assert sum("kt-worker" in thread for thread in before) >= 1 + 2 + 2
    assert sum("kt-queue" in thread for thread in before) >= 3
    time.sleep(WATCHED_SECONDS)
    spent = {thread: now - before[thread] for thread, now in seconds_on_cpu().items()}
    assert sum(spent.values()) <= ALLOWED_SECONDS, f"CPU seconds in {WATCHED_SECONDS} s of idling: {spent}"
