"""Risk: a graph replays work whose buffers are gone, or a destroyed graph keeps gigabytes for ever.

Captured work and what it holds (`keep_alive`) belong to the graph, through the runtime's user objects: they
go after the last executable copy is destroyed and its last launch has ended, and then only in a Python call,
because the runtime destroys on a thread of its own. The scenes run with every interface a runtime may have.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import weakref

import numpy as np
import pytest
from fake_device import Runtime, built
from harness import F32, arguments, ext, poisoned, run, same_bits
from isolation import isolated
from test_device_stream import SIGNALS, enqueue, small_engine_and_layer

PATIENCE = 30  # seconds until waiting counts as a hang


class Buffers:
    """Stands for what a captured call reads and writes."""


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def captured(runtime: Runtime, stream):
    """(graph of two layers, what it must hold, output, expected): everything else is dropped."""
    engine, layer, call = small_engine_and_layer()
    expected = run(layer, call)
    output = poisoned(call.hidden.shape, F32)
    held = [Buffers(), Buffers()]
    for each in held:
        each.arrays = (call, output)
    with stream.capture() as graph:
        for each in held:
            enqueue(stream, engine, layer, call, output, keep_alive=each)
    return graph, [weakref.ref(each) for each in held], output, expected


def alive(references) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def released(runtime: Runtime) -> None:
    """What no graph holds is gone after this."""
    runtime.wait_for_destructors()
    ext.release_finished()


# ---- scenes -------------------------------------------------------------------------------------


def until_the_last_launch_has_ended(library: str, prefix: str) -> None:
    runtime = Runtime(library, prefix)
    before = threads()
    stream = runtime.stream()
    graph, references, output, expected = captured(runtime, stream)
    first, second = graph.instantiate(), graph.instantiate()
    released(runtime)
    assert alive(references) == 2
    graph.destroy()
    first.destroy()
    released(runtime)
    assert alive(references) == 2
    stream.hold()
    second.launch(stream)
    second.destroy()
    released(runtime)
    assert alive(references) == 2, "buffers went while a launch was under way"
    output[:] = np.nan
    stream.release()
    stream.wait()
    assert same_bits(output, expected)
    runtime.wait_for_destructors()
    assert alive(references) == 2, "Python objects went without a Python call"
    ext.release_finished()
    assert alive(references) == 0
    # The stream's thread, and the one that destroys user objects; those of the engine are gone with it.
    wait_until(lambda: threads() <= before + 2)


def a_capture_that_is_given_up(library: str, prefix: str) -> None:
    runtime = Runtime(library, prefix)
    graph, references, output, _ = captured(runtime, runtime.stream())
    graph.destroy()
    released(runtime)
    assert alive(references) == 0
    assert np.isnan(output).all()


def many_graphs_come_and_go(library: str, prefix: str) -> None:
    runtime = Runtime(library, prefix)
    stream = runtime.stream()
    references = []
    for _ in range(20):
        graph, of_graph, output, expected = captured(runtime, stream)
        references += of_graph
        executable = graph.instantiate_only()
        for _ in range(10):
            executable.launch(stream)
        executable.destroy()
        stream.wait()
        assert same_bits(output, expected)
    released(runtime)
    assert alive(references) == 0


def the_next_call_releases_but_none_that_is_captured(library: str, prefix: str) -> None:
    """Giving page-locked memory back while a stream captures would disturb the capture."""
    runtime = Runtime(library, prefix)
    stream = runtime.stream()
    graph, references, _, _ = captured(runtime, stream)
    graph.destroy()
    runtime.wait_for_destructors()
    engine, layer, call = small_engine_and_layer()  # its loading releases
    assert alive(references) == 0
    graph, references, _, _ = captured(runtime, stream)
    graph.destroy()
    runtime.wait_for_destructors()
    output = poisoned(call.hidden.shape, F32)
    with stream.capture():
        enqueue(stream, engine, layer, call, output)
        assert alive(references) == 2
    enqueue(stream, engine, layer, call, output)
    assert alive(references) == 0
    stream.wait()
    assert same_bits(output, run(layer, call))


def calls_that_run_hold_until_they_are_done(library: str, prefix: str) -> None:
    runtime = Runtime(library, prefix)
    stream = runtime.stream()
    engine, layer, call = small_engine_and_layer()
    output = poisoned(call.hidden.shape, F32)
    held = Buffers()
    references = [weakref.ref(held)]
    stream.hold()
    enqueue(stream, engine, layer, call, output, keep_alive=held)
    del held
    ext.release_finished()
    assert alive(references) == 1
    stream.release()
    stream.wait()
    engine.sync()
    ext.release_finished()
    assert alive(references) == 0
    stream.fail_with(719)
    held = Buffers()
    references = [weakref.ref(held)]
    with pytest.raises(RuntimeError, match="719"):
        layer.submit_on_stream(stream.handle, *arguments(call, output, F32), keep_alive=held)
    del held
    ext.release_finished()
    assert alive(references) == 0


def leave_with_a_graph(library: str, prefix: str) -> None:
    """The interpreter ends while graphs hold Python objects, one of them just destroyed."""
    runtime = Runtime(library, prefix)
    stream = runtime.stream()
    kept, given_up = (captured(runtime, stream)[0].instantiate_only() for _ in range(2))
    kept.launch(stream)
    stream.wait()
    given_up.destroy()
    runtime.wait_for_destructors()
    sys.exit(0)


def kept_for_the_life_of_the_process(library: str, prefix: str) -> None:
    """A runtime that cannot own objects: nothing is ever freed, and replays go on being right."""
    runtime = Runtime(library, prefix)
    stream = runtime.stream()
    graph, references, output, expected = captured(runtime, stream)
    with stream.capture():
        assert ext.capture_id(stream.handle) == 0
    executable = graph.instantiate_only()
    for _ in range(3):
        output[:] = np.nan
        executable.launch(stream)
        stream.wait()
        assert same_bits(output, expected)
    executable.destroy()
    ext.release_finished()
    assert alive(references) == 2


SCENES = [
    until_the_last_launch_has_ended,
    a_capture_that_is_given_up,
    many_graphs_come_and_go,
    the_next_call_releases_but_none_that_is_captured,
    calls_that_run_hold_until_they_are_done,
    leave_with_a_graph,
]
INTERFACES = {
    "cuda12": ("cuda", ()),
    "cuda13": ("cuda", ("FAKE_VERSION=13000",)),
    "hip": ("hip", ("FAKE_PREFIX=hip",)),
    "plain": ("cuda", ("FAKE_PLAIN",)),
}


@pytest.fixture(scope="session")
def fake_runtimes(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("fake_device_runtimes")
    return {name: str(built(folder / f"lib{name}.so", *macros)) for name, (_, macros) in INTERFACES.items()}


@pytest.mark.parametrize(
    ("interface", "signals"),
    [("cuda12", "memory"), ("cuda12", "host"), ("cuda13", "memory"), ("hip", "memory"), ("hip", "host")],
)
@pytest.mark.parametrize("scene", SCENES)
def test_scene(scene, interface, signals, fake_runtimes):
    prefix, _ = INTERFACES[interface]
    isolated("test_graph_lifetimes", scene.__name__, fake_runtimes[interface], prefix, **SIGNALS[signals])


def test_a_runtime_that_cannot_own_objects(fake_runtimes):
    scene = kept_for_the_life_of_the_process.__name__
    isolated("test_graph_lifetimes", scene, fake_runtimes["plain"], "cuda")
