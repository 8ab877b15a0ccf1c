"""Risk: work on a device stream runs too early, out of order, only once though captured, or loses its error.

The device runtime is a fake (fake_device.py) with the names of CUDA's or HIP's: kt_kernel looks them up in
the process. Each scene runs in a process of its own, because a loaded runtime cannot be unloaded. What
captured work holds, and for how long, is in test_graph_lifetimes.py.
"""

from __future__ import annotations

import ctypes
import gc
import time

import numpy as np
import pytest
from fake_device import RELAXED, Runtime, built
from harness import (
    F32,
    Call,
    arguments,
    build_layer,
    ext,
    poisoned,
    random_call,
    random_experts,
    run,
    same_bits,
)
from isolation import isolated

# How graphs and the CPU meet (device_signals.h), and the environment that has it so with a faultless driver.
SIGNALS = {"memory": {}, "host": {"KT_KERNEL_DEVICE_SIGNALS": "host-functions"}}


def engine_and_layer(tokens: int = 64):
    engine = ext.Engine(2)
    experts = random_experts(1, 2, 1024, 256)
    return engine, build_layer(engine, experts), random_call(1, experts, tokens, top_k=2)


def small_engine_and_layer(tokens: int = 3):
    engine = ext.Engine(2)
    experts = random_experts(1, 4, 72, 40)
    return engine, build_layer(engine, experts), random_call(1, experts, tokens, top_k=2)


def enqueue(stream, engine, layer, call: Call, output: np.ndarray, **more) -> None:
    """The call and the wait for it, as the wrapper enqueues them."""
    layer.submit_on_stream(stream.handle, *arguments(call, output, F32), **more)
    engine.sync_on_stream(stream.handle)


# ---- without a graph ----------------------------------------------------------------------------


def no_runtime(library: str) -> None:
    """Without a runtime: a sentence. With one loaded afterwards: found."""
    engine, layer, call = engine_and_layer()
    output = poisoned(call.hidden.shape, F32)
    assert not ext.device_runtime_present()
    for use in (
        lambda: layer.submit_on_stream(1234, *arguments(call, output, F32)),
        lambda: engine.sync_on_stream(1234),
        lambda: ext.capture_id(1234),
        lambda: ext.exchange_capture_mode(RELAXED),
        lambda: ext.page_lock(output.ctypes.data, output.nbytes),
    ):
        with pytest.raises(RuntimeError, match="no CUDA or HIP runtime"):
            use()
    assert np.isnan(output).all()
    stream = Runtime(library).stream()
    assert ext.device_runtime_present()
    enqueue(stream, engine, layer, call, output)
    stream.wait()
    assert same_bits(output, run(layer, call))


def order(library: str) -> None:
    """Nothing before the stream gets there; all of it before the stream goes on."""
    engine, layer, call = engine_and_layer()
    stream = Runtime(library).stream()
    expected = run(layer, call)
    twice = run(layer, Call(expected, call.ids, call.weights, F32))
    first, second = poisoned(call.hidden.shape, F32), poisoned(call.hidden.shape, F32)
    observed = []

    stream.hold()
    stream.then(lambda: observed.append(np.isnan(first).all()))
    layer.submit_on_stream(stream.handle, *arguments(call, first, F32))
    layer.submit_on_stream(stream.handle, *arguments(Call(first, call.ids, call.weights, F32), second, F32))
    engine.sync_on_stream(stream.handle)
    stream.then(lambda: observed.append(same_bits(first, expected) and same_bits(second, twice)))
    time.sleep(0.05)
    assert engine.pending == 0
    assert np.isnan(first).all()
    stream.release()
    stream.wait()
    assert observed == [True, True]


def deferred_in_the_same_operation(library: str) -> None:
    """One operation of the stream queues both tasks; only the second may be pending after the wait."""
    engine, layer, call = small_engine_and_layer()
    stream = Runtime(library).stream()
    other_ids = np.ascontiguousarray((call.ids + 1) % 4)
    later = Call(call.hidden, other_ids, call.weights, call.hidden_dtype)
    output, deferred = poisoned(call.hidden.shape, F32), poisoned(call.hidden.shape, F32)
    more = {"deferred_ids_ptr": other_ids.ctypes.data, "deferred_output_ptr": deferred.ctypes.data}
    seen = []
    layer.submit_on_stream(stream.handle, *arguments(call, output, F32), **more)
    engine.sync_on_stream(stream.handle, 1)
    stream.then(lambda: seen.append(same_bits(output, run(layer, call))))
    engine.sync_on_stream(stream.handle)
    stream.wait()
    assert seen == [True]
    assert same_bits(deferred, run(layer, later))


def sync_may_leave_some(library: str) -> None:
    engine, layer, call = engine_and_layer()
    stream = Runtime(library).stream()
    outputs = [poisoned(call.hidden.shape, F32) for _ in range(6)]
    pending = []
    for output in outputs:
        layer.submit_on_stream(stream.handle, *arguments(call, output, F32))
    engine.sync_on_stream(stream.handle, 2)
    stream.then(lambda: pending.append(engine.pending))
    engine.sync_on_stream(stream.handle)
    stream.then(lambda: pending.append(engine.pending))
    stream.wait()
    assert pending[0] <= 2
    assert pending[1] == 0


def two_streams(library: str) -> None:
    """A held stream does not keep another one's work from running."""
    engine, layer, call = engine_and_layer()
    runtime = Runtime(library)
    held, free = runtime.stream(), runtime.stream()
    expected = run(layer, call)
    outputs = [poisoned(call.hidden.shape, F32) for _ in range(2)]
    held.hold()
    for stream, output in zip((held, free), outputs, strict=True):
        enqueue(stream, engine, layer, call, output)
    free.wait()
    assert same_bits(outputs[1], expected)
    assert np.isnan(outputs[0]).all()
    held.release()
    held.wait()
    assert same_bits(outputs[0], expected)


def order_across_streams(library: str) -> None:
    """Streams that wait for each other's events pass a call's output on, back and forth."""
    engine, layer, call = small_engine_and_layer()
    runtime = Runtime(library)
    streams = runtime.stream(), runtime.stream()
    steps = [call.hidden] + [poisoned(call.hidden.shape, F32) for _ in range(10)]
    calls = [call] + [Call(step, call.ids, call.weights, F32) for step in steps[1:-1]]
    streams[0].hold()
    for number, (step, output) in enumerate(zip(calls, steps[1:], strict=True)):
        this, other = streams[number % 2], streams[1 - number % 2]
        this.wait_for(other)
        enqueue(this, engine, layer, step, output)
    time.sleep(0.05)
    assert all(np.isnan(step).all() for step in steps[1:])
    streams[0].release()
    streams[1].wait()
    expected = call
    for step in steps[1:]:
        expected = Call(run(layer, expected), call.ids, call.weights, F32)
        assert same_bits(step, expected.hidden)


def two_devices(library: str) -> None:
    """Handle 0 is the default stream of the current device: another one on each."""
    engine, layer, call = small_engine_and_layer()
    other_engine, other_layer, _ = small_engine_and_layer()
    runtime = Runtime(library)
    expected = run(layer, call)
    outputs = [poisoned(call.hidden.shape, F32) for _ in range(2)]
    streams = []
    for device, (its_engine, its_layer) in enumerate(((engine, layer), (other_engine, other_layer))):
        runtime.set_device(device)
        streams.append(runtime.stream())
        default = runtime.default_stream()
        if device == 1:
            default.hold()
        enqueue(default, its_engine, its_layer, call, outputs[device])
    runtime.set_device(0)
    runtime.default_stream().wait()
    assert same_bits(outputs[0], expected)
    assert np.isnan(outputs[1]).all()
    runtime.set_device(1)
    runtime.default_stream().release()
    runtime.default_stream().wait()
    assert same_bits(outputs[1], expected)
    # A capture on one device, work on the other meanwhile, replays on both.
    captured = poisoned(call.hidden.shape, F32)
    outputs[0][:] = np.nan
    with streams[1].capture() as graph:
        enqueue(streams[1], other_engine, other_layer, call, captured)
        enqueue(streams[0], engine, layer, call, outputs[0])
    streams[0].wait()
    assert same_bits(outputs[0], expected)
    assert np.isnan(captured).all()
    executable = graph.instantiate_only()
    for stream in streams:
        captured[:] = np.nan
        executable.launch(stream)
        stream.wait()
        assert same_bits(captured, expected)


def errors(library: str) -> None:
    """A bad id in the middle surfaces once, at the next sync, not in the stream; a bad shape at once."""
    engine, layer, call = engine_and_layer()
    stream = Runtime(library).stream()
    bad = call.rows(slice(64))
    bad.ids[0, 0] = 5
    outputs = [poisoned(call.hidden.shape, F32) for _ in range(3)]
    for each, output in zip((call, bad, call), outputs, strict=True):
        layer.submit_on_stream(stream.handle, *arguments(each, output, F32))
    engine.sync_on_stream(stream.handle)
    stream.wait()
    with pytest.raises(ValueError, match="id 5 of token 0"):
        engine.raise_pending_error()
    engine.sync()
    assert np.isnan(outputs[1]).all()
    assert same_bits(outputs[0], outputs[2])
    with pytest.raises(ValueError, match="got 5000 tokens"):
        layer.submit_on_stream(stream.handle, 5000, *arguments(call, outputs[0], F32)[1:])
    with pytest.raises(ValueError, match="negative"):
        engine.sync_on_stream(stream.handle, -1)
    stream.fail_with(719)
    with pytest.raises(RuntimeError, match="719"):
        layer.submit_on_stream(stream.handle, *arguments(call, outputs[0], F32))
    with pytest.raises(RuntimeError, match="719"):
        engine.sync_on_stream(stream.handle)
    stream.fail_with(0)
    enqueue(stream, engine, layer, call, outputs[1])
    stream.wait()
    assert same_bits(outputs[1], outputs[0])


def drop_everything_before_the_stream_gets_there(library: str) -> None:
    engine, layer, call = engine_and_layer()
    stream = Runtime(library).stream()
    expected = run(layer, call)
    output = poisoned(call.hidden.shape, F32)
    stream.hold()
    enqueue(stream, engine, layer, call, output)
    del layer, engine
    gc.collect()
    stream.release()
    stream.wait()
    assert same_bits(output, expected)
    time.sleep(0.2)  # for the engine's threads to end


# ---- capture and replay -------------------------------------------------------------------------


def capture_and_replay(library: str) -> None:
    """A captured call runs at each replay, on what its buffers hold then, even with the layer dropped."""
    engine, layer, call = engine_and_layer()
    stream = Runtime(library).stream()
    steps = []
    for seed in range(4):
        values = np.random.default_rng(seed).standard_normal(call.hidden.shape, dtype=np.float32)
        ids = np.random.default_rng(seed).integers(-1, 2, call.ids.shape)
        step = call.with_hidden(values)
        step.ids = ids
        steps.append((step, run(layer, step)))

    output = poisoned(call.hidden.shape, F32)
    with stream.capture() as graph:
        enqueue(stream, engine, layer, call, output)
    executable = graph.instantiate_only()
    time.sleep(0.05)
    assert np.isnan(output).all(), "a captured call ran before its replay"
    del layer, engine
    gc.collect()
    for step, expected in [*steps, steps[0], steps[0]]:
        call.hidden[:], call.ids[:] = step.hidden, step.ids
        output[:] = np.nan
        executable.launch(stream)
        stream.wait()
        assert same_bits(output, expected)


def a_thousand_replays(library: str) -> None:
    """Enqueued all at once; each sees its own input, and each output is complete when the stream goes on."""
    engine, layer, call = small_engine_and_layer()
    stream = Runtime(library).stream()
    inputs = [random_call(seed, random_experts(1, 4, 72, 40), 3, top_k=2) for seed in range(7)]
    expected = [run(layer, each) for each in inputs]
    output = poisoned(call.hidden.shape, F32)
    with stream.capture() as graph:
        enqueue(stream, engine, layer, call, output)
    executable = graph.instantiate_only()
    wrong = []

    def fill(number: int) -> None:
        step = inputs[number % 7]
        call.hidden[:], call.ids[:], call.weights[:] = step.hidden, step.ids, step.weights
        output[:] = np.nan

    def compare(number: int) -> None:
        if not same_bits(output, expected[number % 7]):
            wrong.append(number)

    stream.hold()
    for number in range(1000):
        stream.then(lambda number=number: fill(number))
        executable.launch(stream)
        stream.then(lambda number=number: compare(number))
    stream.release()
    stream.wait()
    assert not wrong
    assert engine.stats()["calls"] == 1000 + len(expected)


def padded_rows_are_skipped(library: str) -> None:
    """A graph of 16 rows serves fewer: ids of -1 mark the rest, whatever their hidden states hold."""
    engine, layer, call = small_engine_and_layer(tokens=16)
    stream = Runtime(library).stream()
    full = call.rows(slice(16))
    output = poisoned(call.hidden.shape, F32)
    with stream.capture() as graph:
        enqueue(stream, engine, layer, call, output)
    executable = graph.instantiate_only()
    for tokens in (16, 5, 1, 0, 16):
        call.hidden[:], call.ids[:] = full.hidden, full.ids
        call.hidden[tokens:], call.ids[tokens:] = 0x7FC0, -1  # NaN
        output[:] = np.nan
        executable.launch(stream)
        stream.wait()
        if tokens:
            assert same_bits(output[:tokens], run(layer, full.rows(slice(tokens))))
        assert not output[tokens:].any()


def error_in_a_replay(library: str) -> None:
    """A replay that fails on the CPU fails once, as a Python exception; the next replay is right."""
    engine, layer, call = small_engine_and_layer()
    stream = Runtime(library).stream()
    expected = run(layer, call)
    output = poisoned(call.hidden.shape, F32)
    with stream.capture() as graph:
        enqueue(stream, engine, layer, call, output)
    executable = graph.instantiate_only()
    good = call.ids.copy()
    for _ in range(3):
        call.ids[1, 0] = 77
        executable.launch(stream)
        executable.launch(stream)
        stream.wait()
        with pytest.raises(ValueError, match="id 77 of token 1"):
            engine.raise_pending_error()
        engine.raise_pending_error()
        call.ids[:] = good
        output[:] = np.nan
        executable.launch(stream)
        stream.wait()
        engine.raise_pending_error()
        assert same_bits(output, expected)


def two_graphs_at_once(library: str) -> None:
    """Replays of two graphs on two streams share an engine and nothing else."""
    engine, layer, _ = small_engine_and_layer()
    runtime = Runtime(library)
    made = []
    for seed in range(2):
        call = random_call(seed, random_experts(1, 4, 72, 40), 5, top_k=2)
        stream, output = runtime.stream(), poisoned(call.hidden.shape, F32)
        with stream.capture() as graph:
            for _ in range(3):  # layers of a graph: later ones leave one task behind, as deferral does
                layer.submit_on_stream(stream.handle, *arguments(call, output, F32))
                engine.sync_on_stream(stream.handle, 1)
            engine.sync_on_stream(stream.handle)
        made.append((call, stream, output, graph.instantiate_only()))
    for _ in range(200):
        for _, stream, _, executable in made:
            executable.launch(stream)
    for call, stream, output, _ in made:
        stream.wait()
        assert same_bits(output, run(layer, call))


def capture_numbers(library: str) -> None:
    runtime = Runtime(library)
    stream, other = runtime.stream(), runtime.stream()
    assert ext.capture_id(stream.handle) is None
    seen = []
    for _ in range(2):
        with stream.capture():
            seen.append(ext.capture_id(stream.handle))
            assert ext.capture_id(stream.handle) == seen[-1]
            assert ext.capture_id(other.handle) is None
    assert 0 not in seen and seen[0] != seen[1]
    assert ext.capture_id(stream.handle) is None


def capture_mode_of_the_thread(library: str) -> None:
    """Page-locked memory can be made during a capture only in the relaxed mode."""
    runtime = Runtime(library)
    stream = runtime.stream()
    memory = runtime.pointer()
    with stream.capture():
        assert runtime.status_of("MallocHost", memory, 64) != 0
        assert ext.exchange_capture_mode(RELAXED) == 0
        assert runtime.status_of("MallocHost", memory, 64) == 0
        assert ext.exchange_capture_mode(0) == RELAXED
        assert runtime.status_of("MallocHost", memory, 64) != 0
    with pytest.raises(RuntimeError, match="exchanging the capture mode failed"):
        ext.exchange_capture_mode(9)


def calls_that_fail_are_forgotten(library: str) -> None:
    """What has failed and been dealt with must not surface at somebody's next check of a kernel launch."""
    engine, layer, call = small_engine_and_layer()
    runtime = Runtime(library)
    stream = runtime.stream()
    output = poisoned(call.hidden.shape, F32)
    runtime.fake("lockable", ctypes.c_size_t(1 << 20))
    assert ext.page_lock(output.ctypes.data, 1 << 20) == 0
    assert ext.page_lock(output.ctypes.data, (1 << 20) + 1) != 0
    assert runtime.status_of("GetLastError") == 0
    stream.fail_with(719)
    for use in (
        lambda: layer.submit_on_stream(stream.handle, *arguments(call, output, F32)),
        lambda: engine.sync_on_stream(stream.handle),
        lambda: ext.exchange_capture_mode(9),
    ):
        with pytest.raises(RuntimeError):
            use()
        assert runtime.status_of("GetLastError") == 0
    assert runtime.status_of("SetDevice", -1) == runtime.status_of("GetLastError") != 0


SCENES = [
    no_runtime,
    order,
    sync_may_leave_some,
    deferred_in_the_same_operation,
    two_streams,
    order_across_streams,
    two_devices,
    errors,
    drop_everything_before_the_stream_gets_there,
    capture_and_replay,
    a_thousand_replays,
    padded_rows_are_skipped,
    error_in_a_replay,
    two_graphs_at_once,
    capture_numbers,
    capture_mode_of_the_thread,
    calls_that_fail_are_forgotten,
]


@pytest.fixture(scope="session")
def fake_runtime(tmp_path_factory) -> str:
    return str(built(tmp_path_factory.mktemp("fake_device_runtime") / "libfake_device_runtime.so"))


@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize("scene", SCENES)
def test_scene(scene, signals, fake_runtime):
    isolated("test_device_stream", scene.__name__, fake_runtime, **SIGNALS[signals])
