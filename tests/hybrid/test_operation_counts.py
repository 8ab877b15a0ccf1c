"""Risk: a decode layer grows slower by one small operation at a time, which no test of results would see.

Every operation that a layer enqueues on a device's stream is listed here by name, for each kind of layer.
Who adds one must change the list, and doc/hybrid.md, where the count stands. What the device's own experts
enqueue is not ours to count: one operation stands for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device_models import CPU, Model
from fake_device import Runtime, built
from fake_torch_device import TorchDevice
from hybrid_models import EXPERTS, HIDDEN, TOP_K
from isolation import isolated

from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.slots import EMPTY

# Operators of kt_kernel/device_ops and the device operations that each is (test_routing.py counts them).
INDEX_WORK = {"kt_kernel.route": 1, "kt_kernel.protected_experts": 2}
EXPERTS_OF_DEVICE = "aten.neg"  # stands for them

SPLIT = ["kt_kernel.route", "copy to host", EXPERTS_OF_DEVICE, "copy to device", "aten.add"]
CASES = {
    # name: experts in the slots, deferred per token, what the first layer enqueues, and the last one
    "split": ((2, 5, EMPTY), 0, SPLIT, SPLIT),
    "deferring": ((2, 5, EMPTY), 2, ["kt_kernel.protected_experts", *SPLIT], SPLIT),
    "cpu-alone": ((), 0, *[["kt_kernel.route", "copy to host", "copy to device"]] * 2),
    "device-alone": (tuple(range(EXPERTS)), 0, *[["kt_kernel.route", EXPERTS_OF_DEVICE]] * 2),
}


def layers_enqueue_what_is_listed(library: str) -> None:
    runtime = Runtime(library)
    for case in CASES:
        _check_case(case, runtime)


def _check_case(case: str, runtime: Runtime) -> None:
    """Two layers, called and captured, with updates and statistics on and a factor for the CPU's weights."""
    slots, max_deferred, *expected = CASES[case]
    device = TorchDevice(runtime)
    stream = device.stream()
    options = HybridOptions(prefill_threshold=100, update_after_prefill=True, update_interval=3)
    model = Model(device, max_deferred, options, slots, factor=2.5)
    for layer in model.layers:
        if layer.resident is not None:
            layer.resident.compute = lambda hidden, slots, weights: hidden.neg()

    def run_pass() -> list[int]:
        """What the extension has enqueued in each layer, beside the listed operations of torch."""
        hidden, ids = torch.randn(3, HIDDEN), torch.randint(EXPERTS, (3, TOP_K), dtype=torch.int32)
        weights, of_extension = torch.rand(3, TOP_K), []
        with device.on_stream(stream.handle, CPU):
            for layer, operations in zip(model.layers, expected, strict=True):
                device.enqueued.clear()
                before = _in_runtime(runtime)
                hidden = layer.forward(hidden, ids, weights)
                assert device.enqueued == operations, (case, layer.layer_idx, device.enqueued)
                of_extension.append(_in_runtime(runtime) - before - len(operations))
        return of_extension

    allowed = [_allowed_of_extension(operations) for operations in expected]
    run_pass()  # the first one also tries what the runtime can do
    assert run_pass() == allowed, (case, "called")
    stream.wait()
    uses = 2 * 3 * TOP_K
    assert all(int(layer.statistics.totals().sum()) == uses for layer in model.layers)
    with stream.capture() as graph:
        captured = run_pass()
    assert captured[1:] == allowed[1:], (case, "captured", captured)
    # A graph begins with one host function more, where the extension has work in it (device_calls.h).
    assert captured[0] == allowed[0] + (allowed[0] > 0), (case, "captured", captured)
    graph.destroy()
    model.model.close()


def _in_runtime(runtime: Runtime) -> int:
    """What torch's stand-in and the extension have enqueued together."""
    return runtime.host_functions_enqueued() + runtime.memory_operations_enqueued()


def _allowed_of_extension(operations: list[str]) -> int:
    """Queueing the CPU's tasks and waiting for them; the list itself must be within the limits too."""
    with_cpu = "copy to host" in operations
    assert sum(INDEX_WORK.get(operation, 0) for operation in operations) <= 3
    assert operations.count("copy to host") == operations.count("copy to device") == int(with_cpu)
    return 2 if with_cpu else 0


def a_rank_without_the_cpu(library: str) -> None:
    device = TorchDevice(Runtime(library))
    stream = device.stream()
    layer = Model(device, 0).layers[0]
    layer.wrapper = None
    layer.resident.compute = lambda hidden, slots, weights: hidden.neg()
    call = torch.randn(3, HIDDEN), torch.zeros(3, TOP_K, dtype=torch.int32), torch.rand(3, TOP_K)
    with device.on_stream(stream.handle, CPU):
        layer.forward(*call)
    assert device.enqueued == ["kt_kernel.route", EXPERTS_OF_DEVICE], device.enqueued
    stream.wait()


@pytest.fixture(scope="session")
def fake_runtime(tmp_path_factory) -> str:
    return str(built(tmp_path_factory.mktemp("fake_device_runtime") / "libfake_device_runtime.so"))


def test_a_layer_enqueues_what_is_listed_and_nothing_else(fake_runtime):
    _in_process(layers_enqueue_what_is_listed, fake_runtime)


def test_ranks_without_cpu_experts_enqueue_one_operation_before_their_own_experts(fake_runtime):
    _in_process(a_rank_without_the_cpu, fake_runtime)


def _in_process(scene, library: str) -> None:
    isolated("test_operation_counts", scene.__name__, library, PYTHONPATH=str(Path(__file__).parent))
