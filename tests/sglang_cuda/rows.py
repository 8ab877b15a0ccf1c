"""The rows of the contract, and of the table of device formats in doc/serving.md.

A row: a format of layer_formats.py, the value of --moe-runner-backend, and on which GPUs a layer with fewer
slots than experts works, or is refused by us and why. On the others SGLang itself does not take the format
and the backend.
"""

from __future__ import annotations

from typing import NamedTuple

EVERY_GPU = ("8.0", "8.9", "9.0", "10.0", "12.0")
SINCE_8_9, SINCE_9_0, SINCE_10_0 = EVERY_GPU[1:], EVERY_GPU[2:], EVERY_GPU[3:]
UP_TO_9_0 = EVERY_GPU[:3]


class Row(NamedTuple):
    title: str
    format: str
    backend: str
    works: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    why: str = ""  # part of the sentence that refuses it

    def expected(self, capability: str) -> str:
        if capability in self.works:
            return "works"
        return "refused" if capability in self.refused else "not SGLang"


_16_BIT, _BLOCK, _TENSOR, _STATIC = (
    "16 bit",
    "FP8 per block",
    "FP8 per tensor",
    "FP8 per tensor, static inputs",
)
_CT = "compressed-tensors"
_BIASED_16_BIT, _BIASED_MXFP4 = "16 bit with biases (gpt-oss)", "MXFP4 with biases (gpt-oss)"
_NO_IDS = "its kernels take a routing over all experts instead of ids"
_ROUTES = "its kernels route by themselves, over all experts"
_EVERY_ID = "its kernels expect every id of a token to be that of an expert"
_SHARES = "it cuts its input scales into equal shares of ranks"
_UNCHECKED = "nobody has checked it with fewer slots than experts"
_LOST_FACTOR = "a model whose routed scaling factor is 2.5, which SGLang 0.5.23 loses there"
_TRTLLM_V4 = "SGLang's Mxfp4FlashinferTrtllmMoEMethod"
_V4 = "DeepSeek-V4's MXFP4"

ROWS = (
    Row(_16_BIT, "unquantised", "auto", works=EVERY_GPU),
    Row(_16_BIT, "unquantised", "triton", works=EVERY_GPU),
    Row(_16_BIT, "unquantised", "flashinfer_cutlass", works=EVERY_GPU),
    Row(_16_BIT, "unquantised", "triton_kernel", refused=EVERY_GPU, why=_NO_IDS),
    Row(_16_BIT, "unquantised", "flashinfer_trtllm", refused=EVERY_GPU, why=_ROUTES),
    Row(_16_BIT, "unquantised", "flashinfer_trtllm_routed", refused=EVERY_GPU, why=_EVERY_ID),
    Row(_BIASED_16_BIT, "unquantised_biased", "triton", works=EVERY_GPU),
    Row(_BLOCK, "fp8_block", "auto", works=EVERY_GPU),
    Row(_BLOCK, "fp8_block", "triton", works=EVERY_GPU),
    Row(_BLOCK, "fp8_block", "cutlass", works=SINCE_9_0),
    Row(_BLOCK, "fp8_block", "deep_gemm", refused=EVERY_GPU, why=_UNCHECKED),
    Row(_BLOCK, "fp8_block", "flashinfer_trtllm", refused=EVERY_GPU, why=_ROUTES),
    Row(_BLOCK, "fp8_block", "flashinfer_trtllm_routed", refused=EVERY_GPU, why=_EVERY_ID),
    Row(_TENSOR, "fp8", "auto", works=EVERY_GPU),
    Row(_STATIC, "fp8_static", "auto", works=EVERY_GPU),
    Row(_STATIC, "fp8_static", "flashinfer_trtllm", refused=EVERY_GPU, why=_ROUTES),
    Row("W8A8 FP8", "w8a8_fp8", "auto", works=EVERY_GPU),
    Row("W8A8 INT8", "w8a8_int8", "auto", works=EVERY_GPU),
    Row(f"{_CT} INT4", "compressed_int4", "auto", works=EVERY_GPU),
    Row(f"{_CT} INT4", "compressed_int4", "triton", works=EVERY_GPU),
    Row(f"{_CT} INT4", "compressed_int4", "flashinfer_trtllm", refused=EVERY_GPU, why=_ROUTES),
    Row(f"{_CT} FP8 per channel", "compressed_fp8_channel", "auto", works=EVERY_GPU),
    Row(f"{_CT} FP8 per tensor", "compressed_fp8_tensor", "auto", works=EVERY_GPU),
    Row(f"{_CT} NVFP4, weights", "compressed_nvfp4_weights", "auto", works=EVERY_GPU),
    Row(f"{_CT} NVFP4", "compressed_nvfp4", "auto", works=UP_TO_9_0, refused=SINCE_10_0, why=_LOST_FACTOR),
    Row(f"{_CT} MXFP4", "compressed_mxfp4", "auto", refused=EVERY_GPU, why=_UNCHECKED),
    Row("GPTQ", "gptq", "auto", works=EVERY_GPU),
    Row("AWQ", "awq", "auto", works=EVERY_GPU),
    Row("ModelOpt FP8", "modelopt_fp8", "auto", works=EVERY_GPU),
    Row("ModelOpt FP8", "modelopt_fp8", "flashinfer_cutlass", works=EVERY_GPU),
    Row("ModelOpt NVFP4", "nvfp4", "auto", works=UP_TO_9_0, refused=SINCE_10_0, why=_ROUTES),
    Row("ModelOpt NVFP4", "nvfp4", "marlin", works=EVERY_GPU),
    Row("ModelOpt NVFP4", "nvfp4", "flashinfer_cutlass", works=SINCE_10_0),
    Row("ModelOpt NVFP4", "nvfp4", "flashinfer_trtllm", refused=EVERY_GPU, why=_ROUTES),
    Row("ModelOpt NVFP4", "nvfp4", "flashinfer_trtllm_routed", refused=EVERY_GPU, why=_EVERY_ID),
    Row("ModelOpt NVFP4", "nvfp4", "flashinfer_cutedsl", refused=EVERY_GPU, why=_SHARES),
    Row("MXFP4", "mxfp4", "marlin", works=SINCE_9_0),
    Row("MXFP4", "mxfp4", "flashinfer_mxfp4", works=("9.0", "12.0"), refused=("10.0",), why=_ROUTES),
    Row("MXFP4", "mxfp4", "triton_kernel", refused=EVERY_GPU, why=_NO_IDS),
    Row(_BIASED_MXFP4, "mxfp4_biased", "marlin", works=SINCE_9_0),
    Row(
        _BIASED_MXFP4,
        "mxfp4_biased",
        "flashinfer_mxfp4",
        works=("9.0", "12.0"),
        refused=("10.0",),
        why=_ROUTES,
    ),
    Row(_BIASED_MXFP4, "mxfp4_biased", "triton", refused=EVERY_GPU, why=_UNCHECKED),
    Row(_BIASED_MXFP4, "mxfp4_biased", "triton_kernel", refused=EVERY_GPU, why=_NO_IDS),
    Row("MXFP8", "mxfp8", "cutlass", works=("10.0",)),
    Row("MXFP8", "mxfp8", "flashinfer_trtllm", refused=EVERY_GPU, why=_ROUTES),
    Row(_V4, "deepseek_v4", "marlin", works=("9.0", "12.0")),
    Row(
        _V4,
        "deepseek_v4",
        "flashinfer_mxfp4",
        works=("9.0", "12.0"),
        refused=("8.0", "8.9", "10.0"),
        why=_TRTLLM_V4,
    ),
    Row(_V4, "deepseek_v4", "flashinfer_trtllm_routed", refused=EVERY_GPU, why=_EVERY_ID),
)
