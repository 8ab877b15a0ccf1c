"""Risk: memory operations are used where a driver refuses, ignores or never finishes them: the server hangs.

The first question for a device tries them (device_signals.h). The fake driver (fake_device.py) misbehaves in
each way that a real one may. Each scene runs in a process of its own.
"""

from __future__ import annotations

import pytest
from fake_device import MemoryOperations, Runtime, built
from harness import ext
from isolation import isolated

HOST_FUNCTIONS, MEMORY_OPERATIONS = "host functions", "stream memory operations"


def without_a_runtime(library: str) -> None:
    with pytest.raises(RuntimeError, match="no CUDA or HIP runtime"):
        ext.device_signals()


def they_work(library: str, prefix: str) -> None:
    """Found once per device; trying them leaves neither an error nor a stream in the way."""
    runtime = Runtime(library, prefix)
    for device in (0, 1):
        runtime.set_device(device)
        assert ext.device_signals()["kind"] == MEMORY_OPERATIONS
        enqueued = runtime.memory_operations_enqueued()
        assert enqueued == 6 * (device + 1)  # a round enqueued and one captured
        ext.device_signals()
        assert runtime.memory_operations_enqueued() == enqueued
    assert runtime.status_of("GetLastError") == 0


def they_are_tried_while_a_stream_captures(library: str, prefix: str) -> None:
    runtime = Runtime(library, prefix)
    stream = runtime.stream()
    with stream.capture() as graph:
        assert ext.device_signals()["kind"] == MEMORY_OPERATIONS
    graph.instantiate_only().launch(stream)
    stream.wait()


def they_do_not_work(library: str, behaviour: str, reason: str) -> None:
    """Host functions, with the reason; other streams go on, and no error is left behind."""
    runtime = Runtime(library)
    runtime.misbehave(MemoryOperations[behaviour])
    signals = ext.device_signals()
    assert signals["kind"] == HOST_FUNCTIONS
    assert reason in signals["reason"], signals
    assert runtime.status_of("GetLastError") == 0
    stream = runtime.stream()
    reached = []
    stream.then(lambda: reached.append(True))
    stream.wait()
    assert reached


def they_are_unwanted(library: str) -> None:
    runtime = Runtime(library)
    signals = ext.device_signals()
    assert signals["kind"] == HOST_FUNCTIONS
    assert "KT_KERNEL_DEVICE_SIGNALS" in signals["reason"]
    assert runtime.memory_operations_enqueued() == 0


def an_unknown_wish(library: str) -> None:
    Runtime(library)
    with pytest.raises(ValueError, match="KT_KERNEL_DEVICE_SIGNALS is 'mailbox'; the one value"):
        ext.device_signals()


@pytest.fixture(scope="session")
def fake_runtime(tmp_path_factory) -> str:
    return str(built(tmp_path_factory.mktemp("fake_device_runtime") / "libfake_device_runtime.so"))


def scene(function, *arguments: str, **environment: str) -> None:
    isolated("test_device_signals", function.__name__, *arguments, **environment)


def test_there_must_be_a_runtime(fake_runtime):
    scene(without_a_runtime, fake_runtime)


@pytest.mark.parametrize("prefix", ["cuda", "hip"])
@pytest.mark.parametrize("function", [they_work, they_are_tried_while_a_stream_captures])
def test_operations_that_work_are_used(function, prefix, tmp_path):
    library = built(tmp_path / "libfake.so", f"FAKE_PREFIX={prefix}")
    scene(function, str(library), prefix)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("REFUSED", "writing in stream order failed with device error 801"),
        ("NOT_CAPTURED", "in a graph, writing in stream order failed with device error 900"),
        ("NEVER_PASS", "the device did not see a value"),
        ("PASS_AT_ONCE", "the device did not wait"),
        ("NEVER_ARRIVE", "what the device wrote did not arrive"),
    ],
)
def test_operations_that_do_not_work_leave_host_functions(behaviour, reason, fake_runtime):
    scene(they_do_not_work, fake_runtime, behaviour, reason)


def test_a_runtime_that_cannot_own_objects_has_host_functions(tmp_path):
    library = built(tmp_path / "libplain.so", "FAKE_PLAIN")
    scene(they_do_not_work, str(library), "WORK", "too old")


def test_users_can_forbid_them(fake_runtime):
    scene(they_are_unwanted, fake_runtime, KT_KERNEL_DEVICE_SIGNALS="host-functions")
    scene(an_unknown_wish, fake_runtime, KT_KERNEL_DEVICE_SIGNALS="mailbox")
