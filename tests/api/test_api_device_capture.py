"""Risk: layers captured in a graph read stale or foreign buffers, outlive their memory, or lose an error.

DevicePath runs on the fake device runtime of the kernel tests, with torch's part played by
fake_torch_device.py; what replays compute is compared with the CPU path. Each scene runs in a process of its
own, because a loaded runtime cannot be unloaded.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import weakref
from pathlib import Path

import pytest
import torch
from api_support import EXPERTS, HIDDEN, loaded_wrapper, random_call, random_experts
from fake_device import Runtime, Stream, built
from fake_torch_device import TorchDevice
from isolation import isolated

from kt_kernel import kt_kernel_ext
from kt_kernel.calls.buffers import BufferCache
from kt_kernel.calls.device_path import DevicePath
from kt_kernel.device_ops.routing import Split
from kt_kernel.errors import InputError
from kt_kernel.hybrid.device import CudaBackend

LAYERS = 3
# How graphs and the CPU meet (device_signals.h), and the environment that has it so with a faultless driver.
SIGNALS = {"memory": {}, "host": {"KT_KERNEL_DEVICE_SIGNALS": "host-functions"}}
CPU = torch.device("cpu")


class Model:
    """Layers behind each other, each fed with what the one before it returned, on a fake device."""

    def __init__(self, device: TorchDevice, max_deferred: int = 0, buffers: BufferCache | None = None):
        self.device, self.buffers = device, buffers or BufferCache()
        self.wrappers = [
            loaded_wrapper(
                random_experts(seed=20 + index),
                layer_idx=index,
                weight_path=f"capture-{id(self)}",
                max_deferred_experts_per_token=max_deferred,
            )
            for index in range(LAYERS)
        ]
        for wrapper in self.wrappers:
            device.keep_on_host(wrapper.gpu_experts_mask)
        self.paths = [
            DevicePath(w._config, w.cpu_infer, w._chain, w.moe, w.gpu_experts_mask, self.buffers, device)
            for w in self.wrappers
        ]

    def forward(self, hidden, ids, weights, device_experts=None) -> torch.Tensor:
        for path in self.paths:
            hidden = path.forward(hidden, ids, weights, None, Split(on_device=device_experts))
        return hidden

    def expected(self, hidden, ids, weights, device_experts=None) -> torch.Tensor:
        for wrapper in self.wrappers:
            hidden = wrapper.forward(hidden, ids, weights, device_experts=device_experts)
        return hidden


class Captured:
    """A model's pass as a graph, with the tensors that stay in place."""

    def __init__(self, model: Model, stream: Stream, tokens: int):
        self.hidden, self.ids, self.weights, self.on_device = self.tensors = step(99, tokens)
        self._output = torch.full((tokens, HIDDEN), float("nan"), dtype=torch.bfloat16)
        with stream.capture() as graph:
            output = model.forward(*self.tensors)
            with model.device.on_stream(stream.handle, CPU):
                self._output.copy_(output)
        self._executable = graph.instantiate_only()

    def launch(self, stream: Stream, *values: torch.Tensor) -> torch.Tensor:
        """A replay with these values; the output is there when the stream has got there."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)
        self._output.fill_(float("nan"))
        self._executable.launch(stream)
        return self._output

    def replay(self, stream: Stream, *values: torch.Tensor) -> torch.Tensor:
        output = self.launch(stream, *values)
        stream.wait()
        return output.clone()

    def destroy(self) -> None:
        self._executable.destroy()


def step(seed: int, tokens: int, padded: int = 0):
    """A call and a table of experts on the device; its last rows are padding."""
    hidden, ids, weights = random_call(seed, tokens)
    on_device = torch.rand(EXPERTS + 1, generator=torch.Generator().manual_seed(seed)) < 0.3
    on_device[EXPERTS] = False
    if padded:
        ids[-padded:] = -1
        hidden[-padded:] = float("nan")
    return hidden, ids, weights, on_device


# ---- scenes -------------------------------------------------------------------------------------


def calls_that_run(library: str, max_deferred: str) -> None:
    """Nothing happens while the stream is held; then everything, in order, for changing batch sizes."""
    device = TorchDevice(Runtime(library))
    model, stream = Model(device, int(max_deferred)), device.stream()
    for seed, tokens in enumerate([1, 5, 64, 3, 1, 8]):
        call = step(seed, tokens)
        expected = model.expected(*call)
        stream.hold()
        output = model.forward(*call)
        assert output.isnan().all()
        stream.release()
        stream.wait()
        assert torch.equal(output, expected)


def replays(library: str, max_deferred: str) -> None:
    """Each replay computes what stands in the captured tensors then, whatever else ran in between."""
    device = TorchDevice(Runtime(library))
    model, stream = Model(device, int(max_deferred)), device.stream()
    model.buffers.set_capture_sizes([1, 6])
    graphs = {}
    for tokens in (6, 1):
        model.forward(*step(0, tokens))  # as serving warms up, on the stream that captures next
        stream.wait()
        allocations = device.allocations
        graphs[tokens] = Captured(model, stream, tokens)
        assert device.allocations == allocations, "memory was allocated during a capture"
    other = device.stream()
    for seed in range(30):
        tokens = (6, 1)[seed % 2]
        call = step(seed, tokens, padded=seed % 3 if tokens > 1 else 0)
        expected = model.expected(*call)
        if seed % 4 == 0:  # a prompt on the same stream, a replay on the other
            model.forward(*step(seed, 20))
        output = graphs[tokens].replay(other if seed % 4 < 2 else stream, *call)
        assert torch.equal(output, expected)


def a_thousand_replays(library: str) -> None:
    device = TorchDevice(Runtime(library))
    model, stream = Model(device, 1), device.stream()
    graph = Captured(model, stream, 2)
    calls = [step(seed, 2) for seed in range(5)]
    expected = [model.expected(*call) for call in calls]
    for number in range(1000):
        assert torch.equal(graph.replay(stream, *calls[number % 5]), expected[number % 5])


def graphs_of_one_size_share_no_buffers(library: str) -> None:
    """Two graphs of two streams under way at once, and a call of the same size between them."""
    device = TorchDevice(Runtime(library))
    model = Model(device)
    streams = [device.stream() for _ in range(2)]
    graphs = []
    for stream in streams:
        device.current = stream
        graphs.append(Captured(model, stream, 4))
    calls = [step(seed, 4) for seed in range(3)]
    expected = [model.expected(*call) for call in calls]
    for _ in range(20):
        outputs = [
            graph.launch(stream, *call) for stream, graph, call in zip(streams, graphs, calls, strict=False)
        ]
        outputs.append(model.forward(*calls[2]))
        for stream in streams:
            stream.wait()
        assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


def buffers_live_as_long_as_the_graph(library: str, max_deferred: str) -> None:
    """Clearing the cache and dropping the layers leaves a graph whole; destroying it frees everything."""
    runtime = Runtime(library)
    device = TorchDevice(runtime)
    model, stream = Model(device, int(max_deferred)), device.stream()
    graph = Captured(model, stream, 4)
    call = step(7, 4)
    expected = model.expected(*call)
    (ring,) = model.buffers._captured.values()
    references = [weakref.ref(ring), weakref.ref(model.wrappers[0].gpu_experts_mask)]
    model.buffers.clear()
    del ring, model
    gc.collect()
    for _ in range(3):
        assert torch.equal(graph.replay(stream, *call), expected)
    assert all(reference() is not None for reference in references)
    graph.destroy()
    runtime.wait_for_destructors()
    kt_kernel_ext.release_finished()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def error_in_a_replay(library: str) -> None:
    """An impossible id of a replay is an InputError of the next call; what follows is right."""
    device = TorchDevice(Runtime(library))
    model, stream = Model(device), device.stream()
    graph = Captured(model, stream, 4)
    good = step(1, 4)
    expected = model.expected(*good)
    hidden, ids, weights, on_device = good
    bad = ids.clone()
    bad[2, 1] = -7
    graph.replay(stream, hidden, bad, weights, on_device)
    with pytest.raises(InputError, match="id -7 of token 2"):
        model.forward(*good)
    stream.wait()
    assert torch.equal(graph.replay(stream, *good), expected)
    output = model.forward(*good)
    stream.wait()
    assert torch.equal(output, expected)


def a_second_device(library: str) -> None:
    """Work for a device that is not the current one goes to its streams, its default stream included."""
    runtime = Runtime(library)
    first, second = TorchDevice(runtime, 0), TorchDevice(runtime, 1)
    model = Model(second)
    call = step(3, 4)
    expected = model.expected(*call)
    runtime.set_device(1)
    runtime.default_stream().hold()
    runtime.set_device(0)
    output = model.forward(*call)
    on_first = Model(first)
    output_of_first = on_first.forward(*call)
    assert runtime.device() == 0
    runtime.default_stream().wait()
    assert torch.equal(output_of_first, expected)
    assert output.isnan().all()
    runtime.set_device(1)
    runtime.default_stream().release()
    runtime.default_stream().wait()
    assert torch.equal(output, expected)


def memory_that_cannot_be_page_locked(library: str) -> None:
    """A failing page lock is a warning; the next check of a kernel launch must not raise it."""
    runtime = Runtime(library)
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("kt_kernel").addHandler(handler)
    runtime.fake("lockable", ctypes.c_size_t(4095))
    backend = CudaBackend(torch.device("cuda", 0))
    backend.page_lock(torch.empty(4096, dtype=torch.uint8))
    assert runtime.status_of("GetLastError") == 0
    (warning,) = warnings
    assert "4096 bytes" in warning
    assert "error 2" in warning
    backend.page_lock(torch.empty(4095, dtype=torch.uint8))
    assert len(warnings) == 1


SCENES = [
    (calls_that_run, "0"),
    (calls_that_run, "2"),
    (replays, "0"),
    (replays, "2"),
    (a_thousand_replays,),
    (graphs_of_one_size_share_no_buffers,),
    (buffers_live_as_long_as_the_graph, "0"),
    (buffers_live_as_long_as_the_graph, "1"),
    (error_in_a_replay,),
    (a_second_device,),
    (memory_that_cannot_be_page_locked,),
]


@pytest.fixture(scope="session")
def fake_runtime(tmp_path_factory) -> str:
    return str(built(tmp_path_factory.mktemp("fake_device_runtime") / "libfake_device_runtime.so"))


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="torch for CUDA asks the driver, which is not there, where this test plays it",
)
@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: "-".join([scene[0].__name__, *scene[1:]]))
def test_scene(scene, signals, fake_runtime):
    function, *arguments = scene
    here = str(Path(__file__).parent)
    isolated(
        "test_api_device_capture",
        function.__name__,
        fake_runtime,
        *arguments,
        PYTHONPATH=here,
        **SIGNALS[signals],
    )
