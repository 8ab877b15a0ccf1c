"""Which of SGLang's GPU code computes some of a layer's experts: per method and per --moe-runner-backend.

A layer with CPU experts gives the GPU fewer slots than experts, and ids of -1 where a token's expert has no
slot. tests/sglang_cuda builds a layer for every row of doc/serving.md's table of device formats, which it
writes; what is not in the tables here was not checked and is refused when a server starts.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.utils import get_device_capability, is_cuda

from kt_kernel.errors import FeatureUnavailableError

# Their kernels skip ids of -1, which SGLang itself gives them for experts of other ranks. No other backend's
# kernels are given any.
SKIPPING = ("triton", "marlin")

# backend -> why it cannot compute some of the experts.
REFUSED = {
    "triton_kernel": "its kernels take a routing over all experts instead of ids",
    "flashinfer_trtllm": "its kernels route by themselves, over all experts",
    "flashinfer_trtllm_routed": "its kernels expect every id of a token to be that of an expert",
    "experimental_sgl_trtllm": "its kernels route by themselves, over all experts",
    "flashinfer_cutedsl": "it cuts its input scales into equal shares of ranks",
    "flashinfer_megamoe": "its kernels send tokens to other ranks",
    "hpc_ops": "SGLang accepts it only for a method that it knows",
    "humming": "nobody has checked it with fewer slots than experts",
    "lora_cutedsl": "adapters are not available",
    "lora_triton": "adapters are not available",
    "lora_marlin": "adapters are not available",
}

# Class of SGLang's method, or of its scheme -> the backends that compute some of its experts, best first.
METHODS = {
    "UnquantizedFusedMoEMethod": ("triton", "flashinfer_cutlass"),
    "Fp8MoEMethod": ("triton", "cutlass"),
    "W8A8FP8MoEMethod": ("triton",),
    "W8A8Int8MoEMethod": ("triton",),
    "CompressedTensorsWNA16MoE": ("marlin",),
    "CompressedTensorsWNA16TritonMoE": ("triton",),
    "CompressedTensorsW8A8Fp8MoE": ("triton",),
    "CompressedTensorsW4A4Nvfp4MoE": ("flashinfer_cutlass",),
    "CompressedTensorsW4A16Nvfp4MoE": ("marlin",),
    "GPTQMarlinMoEScheme": ("marlin",),
    "AWQMoEScheme": ("marlin",),
    "ModelOptFp8MoEMethod": ("triton", "flashinfer_cutlass"),
    "ModelOptNvFp4FusedMoEMethod": ("flashinfer_cutlass", "marlin"),
    "Mxfp4MoEMethod": ("marlin", "flashinfer_mxfp4"),
    "Mxfp4MarlinMoEMethod": ("marlin",),
    "Mxfp4FlashinferCutlassMoEMethod": ("flashinfer_mxfp4",),
}

# They take the largest of all experts' input scales; other methods keep one per expert, or none.
_REDUCES_INPUT_SCALES = ("Fp8MoEMethod", "ModelOptFp8MoEMethod", "CompressedTensorsW8A8Fp8MoE")

# Neither their kernels nor the routing that SGLang gives them apply a model's routed scaling factor.
_LOSES_FACTOR = ("CompressedTensorsW4A4Nvfp4MoE",)


def check_option(backend: str) -> None:
    """Raises FeatureUnavailableError for what the option alone tells; only layers know SGLang's default."""
    if backend in REFUSED:
        raise FeatureUnavailableError(
            f"not available yet: --moe-runner-backend {backend} together with --kt-weight-path "
            f"({REFUSED[backend]}); leave it out, or choose triton."
        )


def check_method(method: Any, layer: Any) -> None:
    """Can this method's kernels compute some of the experts, with the backend that it chose for this GPU?

    Raises FeatureUnavailableError with what to choose instead.
    """
    if not is_cuda():
        return
    name, backend = name_of(method, layer), backend_of(method, layer)
    if name not in METHODS:
        raise FeatureUnavailableError(
            f"not available yet: experts on the GPU as SGLang's {name} makes them together with "
            "--kt-weight-path; serve this model without the --kt flags."
        )
    factor = layer.moe_runner_config.routed_scaling_factor
    if name in _LOSES_FACTOR and factor not in (None, 1.0):
        raise FeatureUnavailableError(
            f"not available yet: experts on the GPU as SGLang's {name} makes them for a model whose routed "
            f"scaling factor is {factor}, which SGLang 0.5.23 loses there; serve another quantisation of it."
        )
    if backend in METHODS[name] and not _is_blackwell_mxfp4(backend):
        return
    if backend == "triton" and layer.moe_runner_config.num_local_experts == 0:
        return  # none of its kernels is called, and with it SGLang's routing is by ids
    reason = REFUSED.get(backend, "nobody has checked it with fewer slots than experts")
    if _is_blackwell_mxfp4(backend):
        reason = "on this GPU its kernels route by themselves, over all experts"
    others = [other for other in METHODS[name] if not _is_blackwell_mxfp4(other) and other != backend]
    advice = f"give --moe-runner-backend {others[0]}" if others else "serve it without the --kt flags"
    raise FeatureUnavailableError(
        f"not available yet: experts on the GPU as SGLang's {name} makes them for the backend {backend} "
        f"({reason}); {advice}."
    )


def name_of(method: Any, layer: Any) -> str:
    """Some of SGLang's methods leave everything to a scheme, which the layer has."""
    scheme = getattr(layer, "scheme", None)
    return type(method if scheme is None else scheme).__name__


def backend_of(method: Any, layer: Any) -> str:
    """The runner that the method chose, "none" if it has none."""
    backend = method.get_moe_runner_backend(layer)
    return "none" if backend is None else backend.value


def skips_gaps(method: Any, layer: Any) -> bool:
    """May ids of -1 reach the kernels? They look for them only where there are fewer slots than experts."""
    config = layer.moe_runner_config
    return backend_of(method, layer) in SKIPPING and config.num_local_experts != config.num_experts


def reduces_input_scales(method: Any, layer: Any) -> bool:
    """Does the method replace the experts' input scales by one for all?"""
    return name_of(method, layer) in _REDUCES_INPUT_SCALES


def _is_blackwell_mxfp4(backend: str) -> bool:
    return backend == "flashinfer_mxfp4" and get_device_capability()[0] == 10
