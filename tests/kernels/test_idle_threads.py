"""Risk: a server that waits for requests burns CPU, because threads spin instead of sleeping.

Between the layers of a device they spin on purpose (csrc/core/caller.h): for a while, and not for ever.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fake_device import Runtime, built
from harness import F32, arguments, build_layer, ext, poisoned, random_call, random_experts
from isolation import isolated
from test_device_stream import SIGNALS, enqueue, small_engine_and_layer

pytestmark = pytest.mark.alone

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


def require_sleeping_threads() -> None:
    time.sleep(0.05)
    before = seconds_on_cpu()
    time.sleep(WATCHED_SECONDS)
    spent = {thread: now - before[thread] for thread, now in seconds_on_cpu().items()}
    assert sum(spent.values()) <= ALLOWED_SECONDS, f"CPU seconds in {WATCHED_SECONDS} s of idling: {spent}"


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
    threads = seconds_on_cpu()
    assert sum("kt-worker" in thread for thread in threads) >= 1 + 2 + 2
    assert sum("kt-queue" in thread for thread in threads) >= 3
    require_sleeping_threads()


# ---- after work of a device stream, each scene in a process of its own ------------------------------


def after_graphs(library: str) -> None:
    """Thirty graphs that may be replayed at any time, some of which were, and a stream that is held back."""
    engine, layer, call = small_engine_and_layer()
    runtime = Runtime(library)
    stream, output = runtime.stream(), poisoned(call.hidden.shape, F32)
    executables = []
    for _ in range(30):
        with stream.capture() as graph:
            enqueue(stream, engine, layer, call, output)
        executables.append(graph.instantiate_only())
    for executable in executables[:10]:
        executable.launch(stream)
    stream.wait()
    stream.hold()
    executables[0].launch(stream)
    enqueue(stream, engine, layer, call, output)
    require_sleeping_threads()
    stream.release()
    stream.wait()
    require_sleeping_threads()


def after_plain_calls(library: str) -> None:
    engine, layer, call = small_engine_and_layer()
    stream, output = Runtime(library).stream(), poisoned(call.hidden.shape, F32)
    for _ in range(10):
        enqueue(stream, engine, layer, call, output)
    stream.wait()
    require_sleeping_threads()


def between_layers(library: str) -> None:
    """The queue's thread waits awake for the next layer of a device, which it does not for one of the CPU."""
    engine, experts = ext.Engine(1), random_experts(1, 4, 72, 40)
    layer, call = build_layer(engine, experts), random_call(1, experts, 3, top_k=2)
    stream, output = Runtime(library).stream(), poisoned(call.hidden.shape, F32)

    def queue_time(call_once) -> float:
        before = seconds_on_cpu()
        for _ in range(20):
            call_once()
            time.sleep(0.02)
        return sum(now - before.get(thread, 0.0) for thread, now in seconds_on_cpu().items())

    def on_cpu() -> None:
        layer.submit(*arguments(call, output, F32))
        engine.sync()

    def on_stream() -> None:
        enqueue(stream, engine, layer, call, output)
        stream.wait()

    on_stream()
    time.sleep(0.02)
    assert queue_time(on_stream) > 2 * queue_time(on_cpu)


@pytest.fixture(scope="session")
def fake_runtime(tmp_path_factory) -> str:
    return str(built(tmp_path_factory.mktemp("fake_device_runtime") / "libfake_device_runtime.so"))


@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize("scene", [after_graphs, after_plain_calls, between_layers])
def test_threads_of_a_device_sleep_in_the_end(scene, signals, fake_runtime):
    isolated("test_idle_threads", scene.__name__, fake_runtime, **SIGNALS[signals])
