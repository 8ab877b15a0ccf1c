"""Risk: what a replayed graph asks for through memory operations is lost, mixed up, or never answered.

csrc/core/mailbox.h has the rules. All scenes are of graphs that leave tasks behind, meet other graphs or
plain calls, or go away, and run with memory operations and with host functions alike; that captures and
replays work at all is shown by test_device_stream.py and test_graph_lifetimes.py. Each runs in a process of
its own.
"""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest
from fake_device import Runtime, built
from harness import F32, Call, arguments, ext, poisoned, run, same_bits
from isolation import isolated
from test_device_stream import SIGNALS, engine_and_layer, enqueue, small_engine_and_layer

PATIENCE = 30  # seconds until waiting counts as a hang


def chain(layer, call: Call, steps: int) -> tuple[list[Call], list[np.ndarray]]:
    """Calls of which each reads what the one before wrote, and what they should write."""
    calls = [call]
    expected = [run(layer, call)]
    for _ in range(steps - 1):
        calls.append(Call(poisoned(call.hidden.shape, F32), call.ids, call.weights, F32))
        expected.append(run(layer, Call(expected[-1], call.ids, call.weights, F32)))
    return calls, expected


def submit(stream, layer, call: Call, output: np.ndarray) -> None:
    layer.submit_on_stream(stream.handle, *arguments(call, output, F32))


# ---- scenes -------------------------------------------------------------------------------------


def operations_of_a_layer(library: str) -> None:
    """A captured layer costs a write and a wait. What begins a replay comes once; plain calls have none."""
    engine, layer, call = small_engine_and_layer()
    runtime = Runtime(library)
    stream, output = runtime.stream(), poisoned(call.hidden.shape, F32)
    enqueue(stream, engine, layer, call, output)
    stream.wait()
    before = runtime.memory_operations_enqueued(), runtime.host_functions_enqueued()
    with stream.capture() as graph:
        for _ in range(5):
            enqueue(stream, engine, layer, call, output)
    counts = (
        runtime.memory_operations_enqueued() - before[0],
        runtime.host_functions_enqueued() - before[1],
    )
    uses_memory = ext.device_signals()["kind"] == "stream memory operations"
    assert counts == ((10, 1) if uses_memory else (0, 10))
    output[:] = np.nan
    graph.instantiate_only().launch(stream)
    stream.wait()
    assert same_bits(output, run(layer, call))


def a_stream_in_order_across_graphs_and_plain_calls(library: str) -> None:
    """Three graphs and plain calls leave tasks behind; each next one reads what the one before left."""
    engine, layer, call = engine_and_layer()
    stream = Runtime(library).stream()
    calls, expected = chain(layer, call, 6)
    outputs = [each.hidden for each in calls[1:]] + [poisoned(call.hidden.shape, F32)]
    executables = []
    for number in (0, 2, 4):
        with stream.capture() as graph:
            submit(stream, layer, calls[number], outputs[number])  # and nobody waits for it
        executables.append(graph.instantiate_only())
    for _ in range(20):
        for output in outputs:
            output[:] = np.nan
        for number in range(6):
            if number % 2 == 0:
                executables[number // 2].launch(stream)
            else:
                submit(stream, layer, calls[number], outputs[number])
        engine.sync_on_stream(stream.handle)
        stream.wait()
        assert all(same_bits(*pair) for pair in zip(outputs, expected, strict=True))


def a_graph_waits_for_what_another_one_left(library: str) -> None:
    """Pieces of a model, each a graph: one defers a task, the next only waits for it."""
    engine, layer, call = engine_and_layer()
    stream = Runtime(library).stream()
    expected = run(layer, call)
    first, second = poisoned(call.hidden.shape, F32), poisoned(call.hidden.shape, F32)
    with stream.capture() as left:
        submit(stream, layer, call, first)
        submit(stream, layer, call, second)
        engine.sync_on_stream(stream.handle, 1)
    with stream.capture() as waited:
        engine.sync_on_stream(stream.handle)
    left, waited = left.instantiate_only(), waited.instantiate_only()
    complete = []
    for _ in range(20):
        first[:], second[:] = np.nan, np.nan
        left.launch(stream)
        stream.then(lambda: complete.append(same_bits(first, expected)))
        waited.launch(stream)
        stream.then(lambda: complete.append(same_bits(second, expected)))
        stream.wait()
    assert complete == [True] * 40


def replays_that_nobody_waits_for(library: str) -> None:
    """A graph without a wait, launched again and again: every task of every replay runs."""
    engine, layer, call = small_engine_and_layer()
    stream, output = Runtime(library).stream(), poisoned(call.hidden.shape, F32)
    with stream.capture() as graph:
        for _ in range(3):
            submit(stream, layer, call, output)
    executable = graph.instantiate_only()
    for _ in range(100):
        executable.launch(stream)
    executable.destroy()
    stream.wait()
    engine.sync()
    assert engine.stats()["calls"] == 300
    assert same_bits(output, run(layer, call))


def a_graph_destroyed_with_requests_unseen(library: str) -> None:
    """What the stream has asked for runs although graph, layer and engine are gone."""
    engine, layer, call = engine_and_layer()
    runtime = Runtime(library)
    stream, expected = runtime.stream(), run(layer, call)
    outputs = [poisoned(call.hidden.shape, F32) for _ in range(20)]
    with stream.capture() as graph:
        for output in outputs:
            submit(stream, layer, call, output)
    executable = graph.instantiate_only()
    long = engine_and_layer(tokens=1024)[2]
    long_output = poisoned(long.hidden.shape, F32)
    layer.submit(*arguments(long, long_output, F32))  # the queue's thread has no time to look at requests
    executable.launch(stream)
    stream.wait()
    executable.destroy()
    runtime.wait_for_destructors()
    del engine, layer
    ext.release_finished()
    gc.collect()
    deadline = time.monotonic() + PATIENCE
    while not all(same_bits(output, expected) for output in outputs):
        assert time.monotonic() < deadline, "tasks were dropped with their graph"
        time.sleep(0.01)


def one_capture_launched_in_turn_on_two_streams(library: str) -> None:
    engine, layer, call = small_engine_and_layer()
    runtime = Runtime(library)
    streams, output = (runtime.stream(), runtime.stream()), poisoned(call.hidden.shape, F32)
    with streams[0].capture() as graph:
        enqueue(streams[0], engine, layer, call, output)
    executables = graph.instantiate(), graph.instantiate()
    expected = run(layer, call)
    for number in range(50):
        this, other = streams[number % 2], streams[1 - number % 2]
        this.wait_for(other)
        executables[number % 2].launch(this)
    for stream in streams:
        stream.wait()
    assert engine.stats()["calls"] == 51
    assert same_bits(output, expected)


def three_graphs_on_three_streams(library: str) -> None:
    """Replays under way at once: one that is held does not hold up the others."""
    engine, layer, call = small_engine_and_layer()
    runtime = Runtime(library)
    expected = run(layer, call)
    made = []
    for _ in range(3):
        stream, output = runtime.stream(), poisoned(call.hidden.shape, F32)
        with stream.capture() as graph:
            for _ in range(4):
                enqueue(stream, engine, layer, call, output)
        made.append((stream, output, graph.instantiate_only()))
    held = made[0][0]
    for _ in range(30):
        held.hold()
        for _, output, _ in made:
            output[:] = np.nan
        for stream, _, executable in made:
            executable.launch(stream)
        for stream, output, _ in made[1:]:
            stream.wait()
            assert same_bits(output, expected)
        held.release()
        held.wait()
        assert same_bits(made[0][1], expected)


def a_sync_wider_than_the_graph(library: str) -> None:
    """More tasks may be left than the graph has: still nothing from before it is."""
    engine, layer, call = engine_and_layer()
    stream = Runtime(library).stream()
    expected = run(layer, call)
    before, inside = poisoned(call.hidden.shape, F32), poisoned(call.hidden.shape, F32)
    with stream.capture() as graph:
        submit(stream, layer, call, inside)
        engine.sync_on_stream(stream.handle, 1)
    executable = graph.instantiate_only()
    complete = []
    for _ in range(10):
        before[:] = np.nan
        submit(stream, layer, call, before)
        executable.launch(stream)
        stream.then(lambda: complete.append(same_bits(before, expected)))
        stream.wait()
    engine.sync()
    assert complete == [True] * 10
    assert same_bits(inside, expected)


def a_replay_that_begins_while_the_last_one_left_a_task_running(library: str) -> None:
    """The end of what was left is not taken for that of the new replay's first task."""
    engine, layer, call = engine_and_layer()
    long = engine_and_layer(tokens=1024)[2]
    stream = Runtime(library).stream()
    expected = run(layer, call)
    first, left = poisoned(call.hidden.shape, F32), poisoned(long.hidden.shape, F32)
    with stream.capture() as graph:
        submit(stream, layer, call, first)
        submit(stream, layer, long, left)
        engine.sync_on_stream(stream.handle, 1)
    executable = graph.instantiate_only()
    complete = []

    def look() -> None:
        complete.append(same_bits(first, expected))
        first[:] = np.nan

    for _ in range(6):
        executable.launch(stream)
        stream.then(look)
    stream.wait()
    engine.sync()
    assert complete == [True] * 6


SCENES = [
    operations_of_a_layer,
    a_stream_in_order_across_graphs_and_plain_calls,
    a_graph_waits_for_what_another_one_left,
    replays_that_nobody_waits_for,
    a_graph_destroyed_with_requests_unseen,
    one_capture_launched_in_turn_on_two_streams,
    three_graphs_on_three_streams,
    a_sync_wider_than_the_graph,
    a_replay_that_begins_while_the_last_one_left_a_task_running,
]


@pytest.fixture(scope="session")
def fake_runtime(tmp_path_factory) -> str:
    return str(built(tmp_path_factory.mktemp("fake_device_runtime") / "libfake_device_runtime.so"))


@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize("scene", SCENES)
def test_scene(scene, signals, fake_runtime):
    isolated("test_mailbox", scene.__name__, fake_runtime, **SIGNALS[signals])
