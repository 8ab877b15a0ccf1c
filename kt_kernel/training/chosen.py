"""Which backend computes a layer: KERNELS, the extension's, or REFERENCE, torch in float32 and far slower."""

from __future__ import annotations

from kt_kernel.adapters.backend import Backend, WeightSource
from kt_kernel.adapters.kernel_backend import KernelBackend
from kt_kernel.errors import ConfigurationError
from kt_kernel.moe import KTMoEWrapper
from kt_kernel.swiglu import Swiglu
from kt_kernel.training.reference import ReferenceBackend

KERNELS, REFERENCE = "kernels", "reference"


def choose_backend(name: str, layer: KTMoEWrapper, weights: WeightSource, swiglu: Swiglu) -> Backend:
    """The backend called `name`; `weights`: of the loaded layer, decoded. Raises ConfigurationError."""
    if name not in (KERNELS, REFERENCE):
        raise ConfigurationError(f"backend is {name!r}, expected {KERNELS!r} or {REFERENCE!r}.")
    return ReferenceBackend(weights, swiglu) if name == REFERENCE else KernelBackend(layer)
