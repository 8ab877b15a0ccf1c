"""The quantisation of a checkpoint's experts, as SGLang's configurations: one function per format.

Import only after cuda_code.enter().
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.quantization.awq import AWQMarlinConfig
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig
from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config, ModelOptFp8Config
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config

# What gpt-oss says of its experts.
_BIASED = {"with_bias": True, "gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}
# Of layers, beside their quantisation.
ATTRIBUTES = {
    "unquantised_biased": {**_BIASED, "use_weight_loader_fused": True},
    "mxfp4_biased": _BIASED,
}


def unquantised() -> None:
    return None


def unquantised_biased() -> None:
    return None


def fp8(**values: Any) -> Fp8Config:
    return Fp8Config(**({"is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic"} | values))


def fp8_block() -> Fp8Config:
    return fp8(weight_block_size=[128, 128])


def fp8_static() -> Fp8Config:
    return fp8(activation_scheme="static")


def mxfp8() -> Fp8Config:
    return fp8(use_mxfp8=True)


def deepseek_v4() -> Fp8Config:
    return fp8(weight_block_size=[128, 128], is_fp4_experts=True)


def w8a8_fp8() -> W8A8Fp8Config:
    return W8A8Fp8Config(is_checkpoint_fp8_serialized=True)


def w8a8_int8() -> W8A8Int8Config:
    return W8A8Int8Config({})


def gptq() -> GPTQMarlinConfig:
    options = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}
    return GPTQMarlinConfig.from_config({"quant_method": "gptq", **options})


def awq() -> AWQMarlinConfig:
    options = {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return AWQMarlinConfig.from_config({"quant_method": "awq", **options})


def modelopt_fp8() -> ModelOptFp8Config:
    return ModelOptFp8Config(is_checkpoint_fp8_serialized=True)


def nvfp4() -> ModelOptFp4Config:
    return ModelOptFp4Config(is_checkpoint_nvfp4_serialized=True, group_size=16, exclude_modules=[])


def mxfp4() -> Mxfp4Config:
    return Mxfp4Config.from_config({"quant_method": "mxfp4"})


def mxfp4_biased() -> Mxfp4Config:
    return mxfp4()


def _codes(bits: int, kind: str, strategy: str, **values: Any) -> dict[str, Any]:
    fixed = {"dynamic": False, "symmetric": True, "group_size": None}
    return fixed | {"num_bits": bits, "type": kind, "strategy": strategy} | values


def _compressed_tensors(form: str, weights: dict, activations: dict | None = None) -> CompressedTensorsConfig:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "quantization_status": "compressed",
        }
    )


def compressed_int4() -> CompressedTensorsConfig:
    return _compressed_tensors("pack-quantized", _codes(4, "int", "group", group_size=32))


def compressed_fp8_channel() -> CompressedTensorsConfig:
    activations = _codes(8, "float", "token", dynamic=True)
    return _compressed_tensors("float-quantized", _codes(8, "float", "channel"), activations)


def compressed_fp8_tensor() -> CompressedTensorsConfig:
    codes = _codes(8, "float", "tensor")
    return _compressed_tensors("float-quantized", codes, codes)


def compressed_nvfp4() -> CompressedTensorsConfig:
    codes = _codes(4, "float", "tensor_group", group_size=16)
    return _compressed_tensors("nvfp4-pack-quantized", codes, codes | {"dynamic": "local"})


def compressed_nvfp4_weights() -> CompressedTensorsConfig:
    return _compressed_tensors("nvfp4-pack-quantized", _codes(4, "float", "tensor_group", group_size=16))


def compressed_mxfp4() -> CompressedTensorsConfig:
    return _compressed_tensors("mxfp4-pack-quantized", _codes(4, "float", "group", group_size=32))
