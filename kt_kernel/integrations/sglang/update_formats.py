"""For which models experts may move while serving: those whose slots slot_formats/ can fill."""

from __future__ import annotations

from typing import Any

from kt_kernel.errors import FeatureUnavailableError

# (SGLang's quantisation, --kt-method): the MoE backends whose slots are filled while serving, the one to
# recommend last; see slot_formats/. An unquantised device takes experts of any method.
_FILLED_WHILE_SERVING = {
    (None, None): ("auto", "triton"),
    ("fp8", "FP8"): ("auto", "triton"),
    ("fp8", "MXFP4"): ("marlin",),
    ("mxfp8", "MXFP8"): ("cutlass",),
    ("w8a8_fp8", "FP8_PERCHANNEL"): ("auto", "triton"),
    ("compressed-tensors", "FP8"): ("auto", "triton"),
    ("compressed-tensors", "FP8_PERCHANNEL"): ("auto", "triton"),
    ("compressed-tensors", "RAWINT4"): ("triton", "marlin", "auto"),
    ("compressed-tensors", "NVFP4"): ("marlin", "auto"),
    ("gptq_marlin", "GPTQ_INT4"): ("auto",),
    ("modelopt_fp4", "NVFP4"): ("auto", "marlin"),
}


def check_update_format(method: str, model: Any, options: Any) -> None:
    """Experts that move are written into the device's own weights, in a format that this version can fill.

    `method`: of the weight path. Each layer looks again once it is loaded, for the kernels are chosen by
    then. Prefill on the device and fetched misses need no such check: their slots are unquantised if need be.
    """
    what, backend = "--kt-enable-dynamic-expert-update", options.moe_runner_backend
    backends = _FILLED_WHILE_SERVING.get((model.quantization, method))
    if model.quantization is None:
        backends = _FILLED_WHILE_SERVING[None, None]
    if backends is None:
        raise FeatureUnavailableError(
            f"not available yet: {what} for a model that is {model.quantization} on the device with "
            f"{method} experts on the CPU; use a model whose experts have the same format in both "
            "places, or leave that flag out."
        )
    if backend not in backends:
        raise FeatureUnavailableError(
            f"not available yet: {what} together with --moe-runner-backend {backend}; choose "
            f"{backends[-1]}, or leave one of them out."
        )
