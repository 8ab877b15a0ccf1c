"""Risk: a captured graph goes on with the placement, or the deferral, of the moment of its capture.

The layers are those of device_models.py: whatever torch or the engine does with their tensors happens when
the stream gets there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device_models import CPU, LAYERS, Model
from fake_device import Runtime, built
from fake_torch_device import TorchDevice
from hybrid_models import EXPERTS, HIDDEN, TOP_K, Reference, assert_close, expert_weights
from isolation import isolated

from kt_kernel.hybrid.layer import HybridLayer
from kt_kernel.hybrid.slots import EMPTY


def _call(seed: int, tokens: int, padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    ids[tokens - padded :] = -1
    return hidden, ids, weights


def _expected(model: Model, max_deferred: int, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
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
    model, tokens = Model(device, int(max_deferred)), 5
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
