"""Which backend computes a layer: KERNELS, the extension's, or REFERENCE, torch in float32 and far slower."""

from __future__ import annotations

import torch

from kt_kernel.errors import ConfigurationError
from kt_kernel.moe import KTMoEWrapper
from kt_kernel.swiglu import Swiglu
from kt_kernel.training.backend import Backend, Call, Gradients, Needs, Saved, WeightSource
from kt_kernel.training.kernel_backend import KernelBackend
from kt_kernel.training.reference import ReferenceBackend

KERNELS, REFERENCE = "kernels", "reference"


class KernelsWithoutDropout:
    """A `Backend`: the kernels, except for calls with dropout, which the reference computes."""

    def __init__(self, kernels: KernelBackend, reference: ReferenceBackend) -> None:
        self._kernels, self._reference = kernels, reference
        self.num_experts = kernels.num_experts
        self.hidden_size = kernels.hidden_size
        self.intermediate_size = kernels.intermediate_size

    def forward(self, call: Call, needs: Needs) -> tuple[torch.Tensor, Saved]:
        return self._of(call).forward(call, needs)

    def backward(self, call: Call, saved: Saved, dout: torch.Tensor, needs: Needs) -> Gradients:
        return self._of(call).backward(call, saved, dout, needs)

    def _of(self, call: Call) -> Backend:
        return self._kernels if call.dropout is None else self._reference


def choose_backend(name: str, layer: KTMoEWrapper, weights: WeightSource, swiglu: Swiglu) -> Backend:
    """The backend called `name`; `weights`: of the loaded layer, decoded. Raises ConfigurationError."""
    if name not in (KERNELS, REFERENCE):
        raise ConfigurationError(f"backend is {name!r}, expected {KERNELS!r} or {REFERENCE!r}.")
    reference = ReferenceBackend(weights, swiglu)
    return reference if name == REFERENCE else KernelsWithoutDropout(KernelBackend(layer), reference)
