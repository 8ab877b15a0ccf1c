"""Risk: the stream that computes and the one that copies meet at an expert that is half written.

Prefills, updates and short passes take turns on a device whose streams are threads with random delays, or one
of whose streams is as late as its events allow (simulated_streams.py). Every output must be that of experts
that are all there from the start. The same check must find wrong outputs when events do not hold back what
they should.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hybrid_models import EXPERTS, HIDDEN, INTERMEDIATE, MOE_LAYERS, TOP_K, expert_weights, wrappers
from simulated_streams import Late, SimulatedDevice, SimulatedEvent, dawdling_streams, ordered_streams
from torch.utils._python_dispatch import _disable_current_modes

from kt_kernel.device_ops.routing import Split
from kt_kernel.hybrid import update
from kt_kernel.hybrid.copies import CopyWorker
from kt_kernel.hybrid.layer import HybridLayer
from kt_kernel.hybrid.model import HybridModel
from kt_kernel.hybrid.options import HybridOptions
from kt_kernel.hybrid.slots import EMPTY, LayerPlacement, Placement, Tables
from kt_kernel.hybrid.statistics import LayerStatistics
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

CPU = torch.device("cpu")
THRESHOLD = 5
ROWS = (1, 2, 3, THRESHOLD, THRESHOLD + 1, THRESHOLD + 2)
STEPS = 16
NEW_TOPIC_EVERY = 8  # steps; then other experts are busy, and enter
GIVEN_UP = 0.15  # share of the passes that end after two layers
SLOWEST_WORK = 0.003  # seconds

# ---- what is different on an accelerator -----------------------------------------------------------


class _Placement(LayerPlacement):
    """One set of tables at a fixed address, rewritten in stream order."""

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        self._fixed = Tables(placement, CPU)

    def tables(self, device: torch.device) -> Tables:
        return self._fixed

    def switch(self, new: Placement) -> None:
        with _disable_current_modes():
            super().switch(new)
            fresh = Tables(new, CPU)
        self._fixed.become(fresh)


class _Statistics(LayerStatistics):
    """Reading the counts waits for the device; what follows is done with them on the CPU."""

    def __init__(self, num_experts: int, device: SimulatedDevice) -> None:
        super().__init__(num_experts)
        self._device = device

    def totals(self) -> torch.Tensor:
        self._device.serving.wait()
        with _disable_current_modes():
            return super().totals()

    def advance(self) -> None:
        with _disable_current_modes():
            super().advance()


class _Layer(HybridLayer):
    def _check_ids(self, ids: torch.Tensor) -> None:
        """A device's ids are not looked at."""


class _Experts(TorchDeviceExperts):
    """What is being stored is no number until all of it is there."""

    def compute(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros(hidden.shape)
        self._add_gathered(output, hidden, slots, weights)
        return output

    def store(self, slot: int, tensors: Any) -> int:
        self.w13[slot].fill_(float("nan"))
        self.w2[slot].fill_(float("nan"))
        return super().store(slot, tensors)


class _Wrapper:
    """A layer's CPU experts, which write real images but whose part of a pass is enqueued like all else."""

    def __init__(self, wrapper: Any, experts: _Experts) -> None:
        self._wrapper, self._experts = wrapper, experts

    def submit_split(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, split: Split
    ) -> torch.Tensor:
        split.count(ids)
        mine = torch.where(split.on_device[ids.long()], EMPTY, ids)
        self._sum = self._experts.compute(hidden, mine, weights)
        return split.slots(ids)

    def sync_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._sum

    def take_deferred(self, hidden: torch.Tensor) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


# ---- passes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A layer's call and the output that the streams will fill."""

    layer: int
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor


class _Served:
    """A model on a simulated device. `everything`: of each MoE layer all experts, there from the start."""

    def __init__(self, device: SimulatedDevice) -> None:
        options = HybridOptions(prefill_threshold=THRESHOLD, update_after_prefill=True, update_interval=1)
        self.device = device
        self.model = HybridModel(options)
        context = self.model.context
        context.copies.close()
        context.backend, context.copies = device, CopyWorker(device)
        self.everything = [_all_experts(layer) for layer in MOE_LAYERS]
        self.layers = [
            self._layer(*layer_and_all) for layer_and_all in zip(MOE_LAYERS, self.everything, strict=True)
        ]
        device.synchronize()

    def _layer(self, index: int, everything: _Experts) -> HybridLayer:
        wrapper = _Wrapper(wrappers(0)[index], everything)
        placement = _Placement(Placement(0, (6, 7, EMPTY), EXPERTS))

        def room(count: int) -> _Experts:
            return _Experts(count, HIDDEN, INTERMEDIATE, torch.float32, CPU, wrapper.encoding(1))

        layer = _Layer(index, wrapper, room(placement.current.capacity), placement, room, self.model)
        layer.statistics = _Statistics(EXPERTS, self.device)
        with torch.no_grad(), self.device.on_serving():
            layer.load_residents()
        return layer

    def run_passes(self, seed: int) -> list[_Call]:
        """Long and short ones, some given up; the calls of all, with their outputs filled."""
        choices, values = random.Random(seed), torch.Generator().manual_seed(seed)
        calls = []
        for step in range(STEPS):
            if step % NEW_TOPIC_EVERY == 0:
                likely = (1.0 + torch.randperm(EXPERTS, generator=values)) ** -2.0
            rows = choices.choice(ROWS)
            layers = self.layers[:2] if choices.random() < GIVEN_UP else self.layers
            inputs = [_random_call(rows, likely, values) for _ in layers]
            with torch.no_grad(), self.device.on_serving():
                self.model.begin_step()
                for position, (layer, call) in enumerate(zip(layers, inputs, strict=True)):
                    calls.append(_Call(position, *call, layer.forward(*call)))
        self.device.synchronize()
        return calls

    def wrong(self, calls: list[_Call]) -> int:
        """How many outputs are not those of experts that were there from the start."""
        expected = [
            self.everything[call.layer].compute(call.hidden, call.ids, call.weights) for call in calls
        ]
        return sum(
            not torch.allclose(call.output, right, atol=1e-3, rtol=1e-3)
            for call, right in zip(calls, expected, strict=True)
        )


def _all_experts(layer: int) -> _Experts:
    gate, up, down = expert_weights(layer)
    experts = _Experts(EXPERTS, HIDDEN, INTERMEDIATE, torch.float32, CPU)
    experts.w13.copy_(torch.cat([gate, up], dim=1))
    experts.w2.copy_(down)
    return experts


def _random_call(rows: int, likely: torch.Tensor, values: torch.Generator) -> tuple[torch.Tensor, ...]:
    ids = torch.multinomial(likely.expand(rows, EXPERTS), TOP_K, generator=values)
    return torch.randn(rows, HIDDEN, generator=values), ids, torch.rand(rows, TOP_K, generator=values)


# ---- the tests -------------------------------------------------------------------------------------


class _ServingDoesNotWait(SimulatedEvent):
    """Passes do not wait for the copies of what they use."""

    def wait(self) -> None:
        if self._device.current_stream() is not self._device.serving:
            super().wait()


class _CopyingDoesNotWait(SimulatedEvent):
    """Copies do not wait for the passes that use what they overwrite."""

    def wait(self) -> None:
        if self._device.current_stream() is self._device.serving:
            super().wait()


class _NobodySynchronizes(SimulatedEvent):
    """Host memory is written again while it is being copied."""

    def synchronize(self) -> None:
        return None


@pytest.fixture
def served(request, monkeypatch):
    """A model on a device with the streams and the events that the test asks for."""
    monkeypatch.setattr(update, "_MARGIN", 0.0)  # so few tokens say little
    make_streams, event = request.param
    device = SimulatedDevice(make_streams(), event)
    served = _Served(device)
    yield served
    served.model.close()
    device.close()


def _dawdling():
    return dawdling_streams(seed=1, most_seconds=SLOWEST_WORK)


def _late_copies():
    return ordered_streams(serving=Late.NEVER, copying=Late.AS_LATE_AS_POSSIBLE)


def _late_passes():
    return ordered_streams(serving=Late.AS_LATE_AS_POSSIBLE, copying=Late.NEVER)


@pytest.mark.parametrize(
    "served",
    [(streams, SimulatedEvent) for streams in (_dawdling, _late_copies, _late_passes)],
    indirect=True,
    ids=["dawdling", "late copies", "late passes"],
)
def test_no_pass_sees_an_expert_that_is_being_copied(served):
    calls = served.run_passes(seed=1)
    assert served.wrong(calls) == 0
    assert served.model.prefill.chunks > 0
    assert served.model.updater.figures.bytes_copied > 0
    assert len(calls) > 2 * STEPS


@pytest.mark.parametrize(
    "served",
    [
        (_late_copies, _ServingDoesNotWait),
        (_late_passes, _CopyingDoesNotWait),
        (_late_copies, _NobodySynchronizes),
    ],
    indirect=True,
    ids=["serving does not wait", "copying does not wait", "nobody synchronizes"],
)
def test_the_check_above_sees_a_broken_order(served):
    assert served.wrong(served.run_passes(seed=1)) > 0
