"""Hybrid layers on the fake device of tests/api/fake_torch_device.py: what runs on it runs in stream order.

Their tensors are in CPU memory, but the layers treat them as an accelerator's: the CPU's experts are called
through DevicePath, the tables have fixed addresses, and the ids are not looked at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

_TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(_TESTS / "api"), str(_TESTS / "kernels")]

from fake_torch_device import TorchDevice  # noqa: E402
from hybrid_models import EXPERTS, HIDDEN, INTERMEDIATE, wrappers  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

from kt_kernel.calls.buffers import BufferCache  # noqa: E402
from kt_kernel.calls.device_path import DevicePath  # noqa: E402
from kt_kernel.device_ops.routing import Split  # noqa: E402
from kt_kernel.hybrid.layer import HybridLayer  # noqa: E402
from kt_kernel.hybrid.model import HybridModel  # noqa: E402
from kt_kernel.hybrid.options import HybridOptions  # noqa: E402
from kt_kernel.hybrid.slots import EMPTY, LayerPlacement, Placement, Tables  # noqa: E402
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts  # noqa: E402

CPU = torch.device("cpu")
LAYERS = (0, 1)


class Wrapper:
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

    def forward_split(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, split: Split
    ) -> torch.Tensor:
        with _disable_current_modes():
            return self._path.forward(hidden, ids, weights, None, split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


class FixedPlacement(LayerPlacement):
    """As on an accelerator: one set of tables at a fixed address."""

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        self._fixed = Tables(placement, CPU)

    def tables(self, device: torch.device) -> Tables:
        return self._fixed

    def switch(self, new: Placement) -> None:
        super().switch(new)
        self._fixed.become(Tables(new, CPU))


class GatheredExperts(TorchDeviceExperts):
    """Computes in the way that a capture takes for few tokens."""

    def compute(self, hidden, slots, weights):
        output = torch.zeros(hidden.shape)
        self._add_gathered(output, hidden, slots, weights)
        return output


class Model:
    """Two layers; `slots`: the experts in the slots of each. `factor`: HybridLayer's cpu_weight_factor."""

    def __init__(
        self,
        device: TorchDevice,
        max_deferred: int,
        options: HybridOptions | None = None,
        slots: tuple[int, ...] = (2, 5, EMPTY),
        factor: float = 1.0,
    ) -> None:
        self.device = device
        self.model = HybridModel(options or HybridOptions())
        self._slots, self._factor = slots, factor
        self.layers = [self._layer(index, max_deferred, BufferCache()) for index in LAYERS]

    def _layer(self, index: int, max_deferred: int, buffers: BufferCache) -> HybridLayer:
        loaded = wrappers(max_deferred)[index]

        def room(count: int) -> GatheredExperts:
            return GatheredExperts(count, HIDDEN, INTERMEDIATE, torch.float32, "cpu", loaded.encoding(1))

        placement = FixedPlacement(Placement(0, self._slots, EXPERTS))
        wrapper = Wrapper(loaded, self.device, buffers)
        resident = room(len(self._slots)) if self._slots else None
        layer = HybridLayer(index, wrapper, resident, placement, room, self.model, self._factor)
        if resident is not None:
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
