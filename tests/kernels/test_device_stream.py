"""Risk: work on a device stream runs too early, out of order, only once though captured, or loses its error.

Two functions of a stand-in for the CUDA runtime (fake_device_runtime.c) are enough: kt_kernel looks them up
in the process. Each scene runs in a process of its own, because a loaded runtime cannot be unloaded.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
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
from tools import tool

HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Stream:
    """One stream of the fake runtime."""

    def __init__(self, library: str):
        self._runtime = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        self._runtime.fake_stream_create.restype = ctypes.c_void_p
        self.handle = self._runtime.fake_stream_create()
        self._callbacks: list = []

    def _call(self, name: str, *values) -> None:
        getattr(self._runtime, name)(ctypes.c_void_p(self.handle), *values)

    def hold(self) -> None:
        self._call("fake_stream_hold", 1)

    def release(self) -> None:
        self._call("fake_stream_hold", 0)

    def begin_capture(self) -> None:
        self._call("fake_stream_capture", 1)

    def end_capture(self) -> None:
        self._call("fake_stream_capture", 0)

    def replay(self) -> None:
        self._call("fake_stream_replay")

    def fail_with(self, status: int) -> None:
        self._call("fake_stream_fail", status)

    def wait(self) -> None:
        self._call("fake_stream_wait")

    def then(self, function) -> None:
        """Enqueues a Python function, as another library on the same stream would."""
        self._callbacks.append(HOST_FUNCTION(lambda _: function()))
        self._call("cudaLaunchHostFunc", self._callbacks[-1], None)


def engine_and_layer():
    engine = ext.Engine(2)
    experts = random_experts(1, 2, 1024, 256)
    return engine, build_layer(engine, experts), random_call(1, experts, 64, top_k=2)


def no_runtime(library: str) -> None:
    """Without a runtime: a sentence. With one loaded afterwards: found."""
    engine, layer, call = engine_and_layer()
    output = poisoned(call.hidden.shape, F32)
    assert not ext.device_runtime_present()
    with pytest.raises(RuntimeError, match="no CUDA or HIP runtime"):
        layer.submit_on_stream(1234, *arguments(call, output, F32))
    with pytest.raises(RuntimeError, match="no CUDA or HIP runtime"):
        engine.sync_on_stream(1234)
    assert np.isnan(output).all()
    stream = Stream(library)
    assert ext.device_runtime_present()
    layer.submit_on_stream(stream.handle, *arguments(call, output, F32))
    engine.sync_on_stream(stream.handle)
    stream.wait()
    assert same_bits(output, run(layer, call))


def order(library: str) -> None:
    """Nothing before the stream gets there; all of it before the stream goes on."""
    engine, layer, call = engine_and_layer()
    stream = Stream(library)
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


def sync_may_leave_some(library: str) -> None:
    engine, layer, call = engine_and_layer()
    stream = Stream(library)
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
    held, free = Stream(library), Stream(library)
    expected = run(layer, call)
    outputs = [poisoned(call.hidden.shape, F32) for _ in range(2)]
    held.hold()
    for stream, output in zip((held, free), outputs, strict=True):
        layer.submit_on_stream(stream.handle, *arguments(call, output, F32))
        engine.sync_on_stream(stream.handle)
    free.wait()
    assert same_bits(outputs[1], expected)
    assert np.isnan(outputs[0]).all()
    held.release()
    held.wait()
    assert same_bits(outputs[0], expected)


def errors(library: str) -> None:
    """A bad id in the middle surfaces once, at the next sync, not in the stream; a bad shape at once."""
    engine, layer, call = engine_and_layer()
    stream = Stream(library)
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
    layer.submit_on_stream(stream.handle, *arguments(call, outputs[1], F32))
    engine.sync_on_stream(stream.handle)
    stream.wait()
    assert same_bits(outputs[1], outputs[0])


def capture_and_replay(library: str) -> None:
    """A captured call runs at each replay, on what its buffers hold then, even with the layer dropped."""
    engine, layer, call = engine_and_layer()
    stream = Stream(library)
    steps = []
    for seed in range(4):
        values = np.random.default_rng(seed).standard_normal(call.hidden.shape, dtype=np.float32)
        ids = np.random.default_rng(seed).integers(-1, 2, call.ids.shape)
        step = call.with_hidden(values)
        step.ids = ids
        steps.append((step, run(layer, step)))

    output = poisoned(call.hidden.shape, F32)
    stream.begin_capture()
    layer.submit_on_stream(stream.handle, *arguments(call, output, F32))
    engine.sync_on_stream(stream.handle)
    stream.end_capture()
    time.sleep(0.05)
    assert np.isnan(output).all(), "a captured call ran before its replay"
    del layer, engine
    gc.collect()
    for step, expected in [*steps, steps[0], steps[0]]:
        call.hidden[:], call.ids[:] = step.hidden, step.ids
        output[:] = np.nan
        stream.replay()
        stream.wait()
        assert same_bits(output, expected)


def drop_everything_before_the_stream_gets_there(library: str) -> None:
    engine, layer, call = engine_and_layer()
    stream = Stream(library)
    expected = run(layer, call)
    output = poisoned(call.hidden.shape, F32)
    stream.hold()
    layer.submit_on_stream(stream.handle, *arguments(call, output, F32))
    engine.sync_on_stream(stream.handle)
    del layer, engine
    gc.collect()
    stream.release()
    stream.wait()
    assert same_bits(output, expected)
    time.sleep(0.2)  # for the engine's threads to end


SCENES = [
    no_runtime,
    order,
    sync_may_leave_some,
    two_streams,
    errors,
    capture_and_replay,
    drop_everything_before_the_stream_gets_there,
]


@pytest.fixture(scope="session")
def fake_runtime(tmp_path_factory) -> str:
    library = tmp_path_factory.mktemp("fake_device_runtime") / "libfake_device_runtime.so"
    source = Path(__file__).parent / "fake_device_runtime.c"
    subprocess.run(
        [tool("cc", "gcc", "clang"), "-shared", "-fPIC", "-O1", "-Wall", "-pthread", "-o", library, source],
        check=True,
    )
    return str(library)


@pytest.mark.parametrize("scene", SCENES)
def test_scene(scene, fake_runtime):
    isolated("test_device_stream", scene.__name__, fake_runtime)
