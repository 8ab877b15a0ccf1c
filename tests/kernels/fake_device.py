"""The fake device runtime (fake_device_runtime.c) for tests: built, loaded, and played on as torch would.

    runtime = Runtime(built(Path("library.so")))
    stream = runtime.stream()
    with stream.capture() as graph:
        ...                                  enqueues nothing, records
    executable = graph.instantiate()
    executable.launch(stream)
    stream.wait()

A loaded runtime cannot be unloaded and is found by everything in the process: tests run in a process of
their own (isolation.py).
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_int, c_ulonglong, c_void_p
from enum import IntEnum
from pathlib import Path

from tools import tool

SOURCE = Path(__file__).parent / "fake_device_runtime.c"
GLOBAL, RELAXED = 0, 2  # what a capture forbids its process: much, nothing


class MemoryOperations(IntEnum):
    """How operations on memory behave; those that misbehave do as a driver or a virtual machine might."""

    WORK = 0
    REFUSED = 1
    NOT_CAPTURED = 2
    NEVER_PASS = 3
    PASS_AT_ONCE = 4
    NEVER_ARRIVE = 5


_HOST_FUNCTION = ctypes.CFUNCTYPE(None, c_void_p)


def built(library: Path, *macros: str) -> Path:
    """Compile the runtime; `macros` are those at the head of its source, such as FAKE_PREFIX=hip."""
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-pthread", *(f"-D{macro}" for macro in macros)]
    subprocess.run([tool("cc", "gcc", "clang"), *flags, "-o", library, SOURCE], check=True)
    return library


class Runtime:
    """A loaded fake runtime."""

    def __init__(self, library: str | Path, prefix: str = "cuda"):
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._prefix = prefix
        self._callbacks: list = []  # of the process's life: graphs replay them

    def call(self, name: str, *arguments) -> None:
        """A function of the runtime by its name without prefix; fails when it fails."""
        status = self.status_of(name, *arguments)
        assert status == 0, f"{name} failed with {status}"

    def status_of(self, name: str, *arguments) -> int:
        return getattr(self._library, self._prefix + name)(*arguments)

    def fake(self, name: str, *arguments) -> None:
        function = getattr(self._library, f"fake_{name}")
        function.restype = None
        function(*arguments)

    def misbehave(self, behaviour: MemoryOperations) -> None:
        self.fake("memory_operations", int(behaviour))

    def memory_operations_enqueued(self) -> int:
        """So far, those that were captured included."""
        return self._library.fake_memory_operations_enqueued()

    def host_functions_enqueued(self) -> int:
        return self._library.fake_host_functions_enqueued()

    def pointer(self) -> object:
        """Where a function of the runtime can write an address."""
        return byref(c_void_p())

    def callback(self, function: Callable[[], object]) -> Callable:
        """A Python function as a host function."""
        self._callbacks.append(_HOST_FUNCTION(lambda _: function() and None))
        return self._callbacks[-1]

    def set_device(self, number: int) -> None:
        self.call("SetDevice", number)

    def device(self) -> int:
        number = c_int()
        self.call("GetDevice", byref(number))
        return number.value

    def stream(self) -> Stream:
        """A new stream of the current device."""
        handle = c_void_p()
        self.call("StreamCreate", byref(handle))
        return Stream(self, handle.value)

    def default_stream(self) -> Stream:
        """Handle 0: of whichever device is current when it is used."""
        return Stream(self, 0)

    def wait_for_destructors(self) -> None:
        """Until the user objects of everything destroyed so far are destroyed, on the runtime's thread."""
        self.fake("wait_for_destructors")


class Stream:
    def __init__(self, runtime: Runtime, handle: int):
        self.runtime, self.handle = runtime, handle
        self._as_parameter_ = c_void_p(handle)

    def hold(self) -> None:
        self.runtime.fake("stream_hold", self, 1)

    def release(self) -> None:
        self.runtime.fake("stream_hold", self, 0)

    def fail_with(self, status: int) -> None:
        self.runtime.fake("stream_fail", self, status)

    def wait(self) -> None:
        self.runtime.call("StreamSynchronize", self)

    def then(self, function: Callable[[], object]) -> None:
        """Enqueues a Python function, as another library on the same stream would."""
        self.runtime.call("LaunchHostFunc", self, self.runtime.callback(function), None)

    def wait_for(self, other: Stream) -> None:
        """What is enqueued from now on runs after what `other` was given so far."""
        event = c_void_p()
        self.runtime.call("EventCreate", byref(event))
        self.runtime.call("EventRecord", event, other)
        self.runtime.call("StreamWaitEvent", self, event, 0)

    @contextmanager
    def capture(self, mode: int = GLOBAL) -> Iterator[Graph]:
        graph = Graph(self.runtime)
        self.runtime.call("StreamBeginCapture", self, mode)
        try:
            yield graph
        finally:
            self.runtime.call("StreamEndCapture", self, byref(graph.handle))


class Graph:
    """What was captured."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.handle = runtime, c_void_p()

    def instantiate(self) -> Executable:
        executable = c_void_p()
        self.runtime.call("GraphInstantiate", byref(executable), self.handle, c_ulonglong(0))
        return Executable(self.runtime, executable)

    def instantiate_only(self) -> Executable:
        """As torch does: what was captured is destroyed, the executable graph stays."""
        executable = self.instantiate()
        self.destroy()
        return executable

    def destroy(self) -> None:
        self.runtime.call("GraphDestroy", self.handle)


class Executable:
    def __init__(self, runtime: Runtime, handle: c_void_p):
        self.runtime, self.handle = runtime, handle

    def launch(self, stream: Stream) -> None:
        self.runtime.call("GraphLaunch", self.handle, stream)

    def destroy(self) -> None:
        self.runtime.call("GraphExecDestroy", self.handle)
