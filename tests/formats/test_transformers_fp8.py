"""transformers' block-quantised FP8 and its reading of DeepSeek-V4's 4-bit experts, against ours."""

from types import SimpleNamespace

import pytest
import torch
from observe import assert_same_numbers, observed
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

HIDDEN, INTERMEDIATE, EXPERTS = 384, 256, 2


def _quantizer(**options) -> SimpleNamespace:
    return SimpleNamespace(quantization_config=FineGrainedFP8Config(**options))


def _decoded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] as transformers computes it."""
    return Fp8Dequantize(_quantizer())._dequantize_one(weight, scale, output_dtype=torch.float32)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("scale_dtype", [None, torch.bfloat16])
def test_block_quantised_checkpoint(tmp_path, scale_fmt, scale_dtype):
    torch.manual_seed(1)
    quantizer = _quantizer(scale_fmt=scale_fmt)
    tensors = []
    for _ in range(EXPERTS):
        matrix = torch.randn(HIDDEN, INTERMEDIATE)
        matrix[:128] *= 30  # so that the blocks' scales differ
        quantised = Fp8Quantize(quantizer).convert({"down_proj.weight": matrix})
        scale = quantised["down_proj.weight_scale_inv"]
        tensors.append(
            {
                "weight": quantised["down_proj.weight"],
                "weight_scale_inv": scale.to(scale_dtype or scale.dtype),
            }
        )
    ours = observed(
        tmp_path / "model",
        "FP8",
        tensors,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        config={"quantization_config": quantizer.quantization_config.to_dict()},
    )
    for actual, parts in zip(ours, tensors, strict=True):
        assert_same_numbers(actual, _decoded(parts["weight"], parts["weight_scale_inv"].float()))


def test_four_bit_experts_of_deepseek_v4(tmp_path):
    """int8 pairs of E2M1 codes and float8_e8m0fnu scales, which transformers unpacks while loading."""
    torch.manual_seed(2)
    tensors = [
        {
            "weight": torch.randint(-128, 128, (HIDDEN, INTERMEDIATE // 2), dtype=torch.int8),
            "scale": torch.randint(110, 135, (HIDDEN, INTERMEDIATE // 32), dtype=torch.uint8).view(
                torch.float8_e8m0fnu
            ),
        }
        for _ in range(EXPERTS)
    ]
    ours = observed(tmp_path / "model", "MXFP4", tensors, hidden=HIDDEN, intermediate=INTERMEDIATE)
    for actual, parts in zip(ours, tensors, strict=True):
        assert_same_numbers(actual, _decoded(parts["weight"], parts["scale"]))
