"""Checkpoints of one layer in the formats whose slots are filled natively, and SGLang's view of each.

    case = CASES["NVFP4 of ModelOpt"]
    case.config()                      the quantisation SGLang reads from config.json
    case.tensors(expert)               {(projection, suffix): tensor} as the checkpoint stores them
    image(case, expert, rank, ranks)   one rank's shard of an expert, as the engine writes it

Import only after cuda_code.enter().
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.hybrid.slot_check import sample_expert

PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down"}

Tensors = dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """`suffixes`: of codes, scales and the global scale; `packed`: of the layer's parameter for codes."""

    encoding: ExpertEncoding  # of the whole expert
    config: Callable[[], Any]
    maker: str
    suffixes: tuple[str, str, str] = ("weight", "weight_scale", "")
    backend: str = "auto"
    capability: str = "9.0"
    global_is_divisor: bool = False
    ranks: tuple[int, ...] = (1, 2)

    def parts(self, expert: int) -> ExpertTensors:
        """The whole expert."""
        return sample_expert(self.encoding, seed=100 + expert)

    def tensors(self, expert: int) -> Tensors:
        parts, (codes, scales, global_scale) = self.parts(expert), self.suffixes
        found: Tensors = {}
        dim = self.encoding.up_follows_gate_along
        halves = [
            None if part is None else part.chunk(2, dim) for part in (parts.w13_weight, parts.w13_scale)
        ]
        for place, projection in enumerate(("w1", "w3", "w2")):
            down = projection == "w2"
            found[projection, codes] = parts.w2_weight if down else halves[0][place]
            found[projection, scales] = self._stored_scales(parts.w2_scale if down else halves[1][place])
            if global_scale:
                factor = parts.global_scales[place]
                found[projection, global_scale] = 1 / factor if self.global_is_divisor else factor
        return found

    def _stored_scales(self, scales: torch.Tensor) -> torch.Tensor:
        if self.encoding.method == "MXFP4":  # the engine writes its powers of two as numbers
            return (scales.float().log2() + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        return scales


def image(case: Case, expert: int, rank: int, ranks: int) -> ExpertTensors:
    """Rows [r N/R, (r+1) N/R) of gate, then of up, and the same range of down's columns (doc/formats.md)."""
    parts, encoding = case.parts(expert), dataclasses.replace(case.encoding, ranks=ranks)
    along = encoding.up_follows_gate_along
    cut = [_cut_w13(part, along, rank, ranks) for part in (parts.w13_weight, parts.w13_scale)]
    down = [_cut_w2(part, 1 - along, rank, ranks) for part in (parts.w2_weight, parts.w2_scale)]
    found = ExpertTensors(cut[0], cut[1], down[0], down[1], parts.global_scales)
    specs = (encoding.w13_weight, encoding.w13_scale, encoding.w2_weight, encoding.w2_scale)
    for part, spec in zip(found, specs, strict=False):
        assert (tuple(part.shape), part.dtype) == (spec.shape, spec.dtype)
    return found


def _cut_w13(part: torch.Tensor, along: int, rank: int, ranks: int) -> torch.Tensor:
    return torch.cat([half.chunk(ranks, along)[rank] for half in part.chunk(2, along)], along)


def _cut_w2(part: torch.Tensor, along: int, rank: int, ranks: int) -> torch.Tensor:
    whole_rows = part.shape[along] < ranks  # a scale per row: every rank needs it
    return part.contiguous() if whole_rows else part.chunk(ranks, along)[rank].contiguous()


def _compressed(fmt: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Callable[[], Any]:
    def config() -> Any:
        from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
            CompressedTensorsConfig,
        )

        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        return CompressedTensorsConfig.from_config(
            {"quant_method": "compressed-tensors", "format": fmt, "ignore": [], "config_groups": {"g": group}}
        )

    return config


def _args(bits: int, kind: str, strategy: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    found = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    return found | {"group_size": group} | more


def _int4(hidden: int, intermediate: int, group: int, **more: Any) -> Case:
    strategy, size = ("group", group) if group else ("channel", None)
    return Case(
        ExpertEncoding("RAWINT4", 1, hidden, intermediate, group, torch.bfloat16),
        _compressed("pack-quantized", _args(4, "int", strategy, size), None),
        **({"maker": "CompressedTensorsWNA16MoE"} | more),
        suffixes=("weight_packed", "weight_scale", ""),
    )


def _gptq(hidden: int, intermediate: int, group: int, dtype: torch.dtype) -> Case:
    def config() -> Any:
        from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig

        return GPTQMarlinConfig.from_config(
            {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": group or -1,
                "desc_act": False,
                "sym": True,
                "lm_head": False,
            }
        )

    encoding = ExpertEncoding("GPTQ_INT4", 1, hidden, intermediate, group, dtype)
    # With two ranks SGLang gives each all groups of down's scales: no slot of ours, see check_refusals.
    return Case(encoding, config, "GPTQMarlinMoEScheme", ("qweight", "scales", ""), ranks=(1,))


def _fp8(quantisation: str, hidden: int, intermediate: int, **more: Any) -> Case:
    def config() -> Any:
        from sglang.srt.layers.quantization.fp8 import Fp8Config

        settings = {"quant_method": quantisation, "activation_scheme": "dynamic"}
        if quantisation == "fp8":
            settings["weight_block_size"] = [128, 128]
        if quantisation == "mxfp8":
            settings["weight_block_size"] = [1, 32]
        return Fp8Config.from_config(settings)

    method = "FP8" if quantisation == "fp8" else "MXFP8"
    encoding = ExpertEncoding(method, 1, hidden, intermediate)
    return Case(encoding, config, "Fp8MoEMethod", ("weight", "weight_scale_inv", ""), **more)


def _w8a8() -> Any:
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config

    return W8A8Fp8Config(is_checkpoint_fp8_serialized=True)


def _mxfp4() -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return Fp8Config(
        is_checkpoint_fp8_serialized=True,
        activation_scheme="dynamic",
        weight_block_size=[128, 128],
        is_fp4_experts=True,
    )


def _modelopt() -> Any:
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config

    return ModelOptFp4Config(is_checkpoint_nvfp4_serialized=True, group_size=16, exclude_modules=[])


def _nvfp4(hidden: int, intermediate: int, config: Callable[[], Any], **more: Any) -> Case:
    return Case(ExpertEncoding("NVFP4", 1, hidden, intermediate), config, **more)


_FP8_ROWS = _compressed(
    "float-quantized", _args(8, "float", "channel"), _args(8, "float", "token", dynamic=True)
)
_NVFP4_WEIGHTS = _args(4, "float", "tensor_group", 16)
_NVFP4_INPUTS = _args(4, "float", "tensor_group", 16, dynamic="local")
_MODELOPT = {"maker": "ModelOptNvFp4FusedMoEMethod", "suffixes": ("weight", "weight_scale", "weight_scale_2")}
_COMPRESSED_NVFP4 = {
    "maker": "CompressedTensorsW4A16Nvfp4MoE",
    "suffixes": ("weight_packed", "weight_scale", "weight_global_scale"),
    "global_is_divisor": True,
}

CASES = {
    "INT4, groups of 32": _int4(512, 256, 32),
    "INT4, groups of 128": _int4(384, 512, 128),
    "INT4, whole rows": _int4(256, 256, 0),
    "INT4 of Triton": _int4(512, 256, 32, maker="CompressedTensorsWNA16TritonMoE", backend="triton"),
    "GPTQ, groups of 128": _gptq(512, 768, 128, torch.float16),
    "GPTQ, groups of 32, bf16 scales": _gptq(256, 256, 32, torch.bfloat16),
    "FP8 per block": _fp8("fp8", 512, 256),
    "FP8 per channel": Case(
        ExpertEncoding("FP8_PERCHANNEL", 1, 512, 256), _FP8_ROWS, "CompressedTensorsW8A8Fp8MoE"
    ),
    "FP8 per channel of w8a8_fp8": Case(
        ExpertEncoding("FP8_PERCHANNEL", 1, 256, 384), _w8a8, "W8A8FP8MoEMethod"
    ),
    "MXFP8": _fp8("mxfp8", 512, 256, backend="cutlass", capability="10.0"),
    "MXFP4": Case(
        ExpertEncoding("MXFP4", 1, 512, 256),
        _mxfp4,
        "Mxfp4MarlinMoEMethod",
        ("weight", "weight_scale_inv", ""),
        backend="marlin",
    ),
    "MXFP4, padded": Case(
        ExpertEncoding("MXFP4", 1, 256, 576),
        _mxfp4,
        "Mxfp4MarlinMoEMethod",
        ("weight", "weight_scale_inv", ""),
        backend="marlin",
    ),
    "NVFP4 of ModelOpt": _nvfp4(512, 256, _modelopt, **_MODELOPT),
    "NVFP4 of ModelOpt, other sizes": _nvfp4(256, 384, _modelopt, **_MODELOPT),
    "NVFP4, weights only": _nvfp4(
        512, 256, _compressed("nvfp4-pack-quantized", _NVFP4_WEIGHTS, None), **_COMPRESSED_NVFP4
    ),
}
