"""Risk: a captured graph goes on with the placement, or the deferral, of the moment of its capture.

The layers run on the fake device runtime of the kernel tests (tests/api/fake_torch_device.py): their tensors
count as a device's, and whatever torch or the engine does with them happens when the stream gets there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(_TESTS / "api"), str(_TESTS / "kernels")]

from fake_device import Runtime, built  # noqa: E402
from fake_torch_device import TorchDevice  # noqa: E402
from hybrid_models import (  # noqa: E402
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    Reference,
    assert_close,
    expert_weights,
    wrappers,
)
from isolation import isolated  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

from kt_kernel.buffers import BufferCache  # noqa: E402
from kt_kernel.device_ops.routing import Split  # noqa: E402
from kt_kernel.device_path import DevicePath  # noqa: E402
from kt_kernel.hybrid.layer import HybridLayer  # noqa: E402
from kt_kernel.hybrid.model import HybridModel, HybridOptions  # noqa: E402
from kt_kernel.hybrid.slots import EMPTY, LayerPlacement, Placement, Tables  # noqa: E402
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts  # noqa: E402

CPU = torch.device("cpu")
LAYERS = (0, 1)


class _Wrapper:
    """A layer's CPU experts, called the way an accelerator's tensors call them."""

    def __init__(self, wrapper: Any, device: TorchDevice, buffers: BufferCache) -> None:
        self._wrapper = wrapper
        native, mask = wrapper.moe, wrapper.gpu_experts_mask
        device.keep_on_host(mask)
        self._path = DevicePath(
            wrapper._config, wrapper.cpu_infer, wrapper._chain, native, mask, buffers, device
        )

    def join_chain(self, chain: Any) -> None:
        self._wrapper.join_chain(chain)
        self._path.chain = chain

    def submit_split(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, split: Split
    ) -> torch.Tensor | None:
        with _disable_current_modes():  # the path puts its own work on the stream
            return self._path.submit(hidden, ids, weights, None, split)

    def sync_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            return self._path.sync(hidden, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


class _Placement(LayerPlacement):
    """As on an accelerator: one set of tables at a fixed address."""

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        self._fixed = Tables(placement, CPU)

    def tables(self, device: torch.device) -> Tables:
        return self._fixed

    def switch(self, new: Placement) -> None:
        super().switch(new)
        self._fixed.become(Tables(new, CPU))


class _Experts(TorchDeviceExperts):
    """Computes in the way that a capture takes for few tokens."""

    def compute(self, hidden, slots, weights):
        output = torch.zeros(hidden.shape)
        self._add_gathered(output, hidden, slots, weights)
        return output


class _Model:
    def __init__(self, device: TorchDevice, max_deferred: int) -> None:
        self.device = device
        self.model = HybridModel(HybridOptions())
        self.layers = [self._layer(index, max_deferred, BufferCache()) for index in LAYERS]

    def _layer(self, index: int, max_deferred: int, buffers: BufferCache) -> HybridLayer:
        loaded = wrappers(max_deferred)[index]

        def room(count: int) -> _Experts:
            return _Experts(count, HIDDEN, INTERMEDIATE, torch.float32, "cpu", loaded.encoding(1))

        placement = _Placement(Placement(0, (2, 5, EMPTY), EXPERTS))
        wrapper = _Wrapper(loaded, self.device, buffers)
        layer = HybridLayer(index, wrapper, room(3), placement, room, self.model)
        layer.load_residents()
        layer._check_ids = lambda ids: None  # ids of an accelerator are not looked at
        return layer

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with self.device.on_stream(self.device.current.handle, CPU):
            for layer in self.layers:
                hidden = layer.forward(hidden, ids, weights)
        return hidden

    def placements(self) -> dict[int, frozenset[int]]:
        return {layer.layer_idx: frozenset(layer.placement.current.experts) for layer in self.layers}


def _call(seed: int, tokens: int, padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    ids[tokens - padded :] = -1
    return hidden, ids, weights


def _expected(model: _Model, max_deferred: int, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
    reference = Reference(max_deferred)
    reference.on_device |= model.placements()
    hidden, ids, weights = call[0].double(), call[1], call[2].double()
    for index in LAYERS:
        hidden = reference._experts(index, hidden, ids, weights)
    return hidden


def _retire(layer: HybridLayer, slot: int) -> None:
    """The slot is about to be written: whoever still reads it finds no numbers."""
    layer.placement.switch(layer.placement.current.with_slots({slot: EMPTY}))
    layer.resident.w13[slot] = float("nan")
    layer.resident.w2[slot] = float("nan")


def _admit(layer: HybridLayer, slot: int, expert: int) -> None:
    gate, up, down = (matrices[expert] for matrices in expert_weights(layer.layer_idx))
    layer.resident.w13[slot] = torch.cat([gate, up])
    layer.resident.w2[slot] = down
    layer.placement.switch(layer.placement.current.with_slots({slot: expert}))


def replays_follow_the_placement(library: str, max_deferred: str) -> None:
    device = TorchDevice(Runtime(library))
    stream = device.stream()
    model, tokens = _Model(device, int(max_deferred)), 5
    captured = _call(0, tokens, padded=0)
    output = torch.full((tokens, HIDDEN), float("nan"))
    model.forward(*captured)  # as serving warms up
    stream.wait()
    with stream.capture() as graph:
        result = model.forward(*captured)
        with device.on_stream(stream.handle, CPU):
            output.copy_(result)
    executable = graph.instantiate_only()
    seeds = iter(range(1, 100))

    def check_replay() -> None:
        call = _call(next(seeds), tokens, padded=2)
        for tensor, value in zip(captured, call, strict=True):
            tensor.copy_(value)
        output.fill_(float("nan"))
        executable.launch(stream)
        stream.wait()
        assert_close(output, _expected(model, int(max_deferred), call))

    uses = [int(layer.statistics.totals().sum()) for layer in model.layers]
    check_replay()
    for number, expert in enumerate((7, 1, 0, 3)):
        for layer in model.layers:
            _retire(layer, number % 3)
        check_replay()
        for layer in model.layers:
            _admit(layer, number % 3, expert)
        check_replay()
    counted = [
        int(layer.statistics.totals().sum()) - before
        for layer, before in zip(model.layers, uses, strict=True)
    ]
    assert counted == [9 * (tokens - 2) * TOP_K] * len(LAYERS), "replays must be counted"
    executable.destroy()
    model.model.close()


@pytest.fixture(scope="session")
def fake_runtime(tmp_path_factory) -> str:
    return str(built(tmp_path_factory.mktemp("fake_device_runtime") / "libfake_device_runtime.so"))


@pytest.mark.parametrize("max_deferred", ["0", "2"])
def test_replays_follow_the_placement(max_deferred, fake_runtime):
    here = str(Path(__file__).parent)
    isolated(
        "test_capture", replays_follow_the_placement.__name__, fake_runtime, max_deferred, PYTHONPATH=here
    )
