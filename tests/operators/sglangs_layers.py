"""SGLang's own torch code beside our operators, in a process of its own: prints what differs as JSON.

{case: share of results that are more than a rounding of SGLang's away}
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from native_and_twin import UNIT, native, numbers
from sglang.srt.layers import layernorm
from sglang.srt.layers.activation import GeluAndMul, SiluAndMul
from sglang.srt.layers.moe import topk
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb

EPS = 1e-6
TOKENS = 64


def differing(mine: torch.Tensor, sglangs: torch.Tensor, units: float = 1.01) -> float:
    assert mine.shape == sglangs.shape and mine.dtype == sglangs.dtype
    wide, wanted = mine.double(), sglangs.double()
    allowed = UNIT[mine.dtype] * units * (wanted.abs() + 1e-2 * wanted.abs().max())
    return float(((wide - wanted).abs() > allowed).double().mean())


def norms(dtype: torch.dtype) -> dict[str, float]:
    x, residual = numbers(TOKENS, 256, dtype=dtype, seed=1), numbers(TOKENS, 256, dtype=dtype, seed=2)
    weight = torch.nn.Parameter(numbers(256, dtype=dtype, seed=3), requires_grad=False)
    layer = SimpleNamespace(
        weight=weight, bias=None, variance_epsilon=EPS, eps=EPS, hidden_size=256, variance_size_override=None
    )
    layer.override_orig_dtype, layer.fp32_residual, layer.cast_x_before_out_mul = None, False, False
    layer.dtype, layer.elementwise_affine, layer.use_bias = dtype, True, False
    layer._norm = lambda x: layernorm.Gemma3RMSNorm._norm(layer, x)
    result = {
        "rmsnorm_cpu": differing(
            native("rmsnorm_cpu")(x, weight, EPS), layernorm.RMSNorm.forward_native(layer, x)
        ),
        "layernorm_cpu": differing(
            native("layernorm_cpu")(x, weight, None, EPS), layernorm.LayerNorm.forward_native(layer, x)
        ),
        "gemma_rmsnorm_cpu": differing(
            native("gemma_rmsnorm_cpu")(x, weight, EPS), layernorm.GemmaRMSNorm.forward_native(layer, x)
        ),
        "gemma3_rmsnorm_cpu": differing(
            native("gemma3_rmsnorm_cpu")(x, weight, EPS), layernorm.Gemma3RMSNorm.forward_native(layer, x)
        ),
    }
    for name, norm in (
        ("fused_add_rmsnorm_cpu", layernorm.RMSNorm),
        ("gemma_fused_add_rmsnorm_cpu", layernorm.GemmaRMSNorm),
    ):
        normed, total = norm.forward_native(layer, x.clone(), residual.clone())
        mine, mine_total = x.clone(), residual.clone()
        native(name)(mine, mine_total, weight, EPS)
        assert torch.equal(total, mine_total)
        result[name] = differing(mine, normed)
    return result


def rotation(dtype: torch.dtype) -> dict[str, float]:
    """SGLang's code rounds each product to the tensors' type: in fp32 that is none."""
    result = {}
    cache, positions = numbers(99, 32, dtype=torch.float32, seed=1), torch.arange(TOKENS)
    for is_neox in (True, False):
        q, k = (
            numbers(TOKENS, 4 * 64, dtype=torch.float32, seed=2),
            numbers(TOKENS, 64, dtype=torch.float32, seed=3),
        )
        layer = SimpleNamespace(head_size=64, rotary_dim=32, cos_sin_cache=cache, is_neox_style=is_neox)
        layer._apply_rotary_emb_wrapped = apply_rotary_emb
        expected = RotaryEmbedding.forward_native(layer, positions, q, k)
        mine = native("rotary_embedding_cpu")(positions, q, k, 64, cache, is_neox)
        result[f"rotary_embedding_cpu {is_neox}"] = max(map(differing, mine, expected))
    return result


def activations(dtype: torch.dtype) -> dict[str, float]:
    """SGLang's code rounds before the product, too: up to two units in all. torch's erf loses fp32 digits
    far below zero (ours does not: test_gates.py).
    """
    erf = 8 if dtype == torch.float32 else 2
    x = numbers(TOKENS, 512, dtype=dtype, seed=4, scale=2)
    return {
        "silu_and_mul_cpu": differing(
            native("silu_and_mul_cpu")(x), SiluAndMul.forward_native(SimpleNamespace(), x), 2
        ),
        "gelu_and_mul_cpu": differing(
            native("gelu_and_mul_cpu")(x),
            GeluAndMul.forward_native(SimpleNamespace(approximate="none"), x),
            erf,
        ),
        "gelu_tanh_and_mul_cpu": differing(
            native("gelu_tanh_and_mul_cpu")(x),
            GeluAndMul.forward_native(SimpleNamespace(approximate="tanh"), x),
            2,
        ),
    }


def by_expert(choice: tuple, experts: int) -> torch.Tensor:
    """[tokens, experts] of weights: SGLang's choices come in any order."""
    weights, ids = choice
    return torch.zeros(weights.shape[0], experts).scatter(1, ids.long(), weights.float())


def routers(_: torch.dtype) -> dict[str, float]:
    hidden, logits = torch.zeros(TOKENS, 8), numbers(TOKENS, 128, dtype=torch.float32, seed=5)
    bias = numbers(128, dtype=torch.float32, seed=6, scale=0.1)
    result = {}
    for scoring in ("softmax", "sigmoid"):
        for correction in (None, bias):
            mine = native(f"topk_{scoring}_cpu")(hidden, logits, 8, True, correction)
            expected = topk.fused_topk_torch_native(hidden, logits, 8, True, correction, scoring)
            result[f"topk_{scoring}_cpu {correction is None}"] = differing(
                by_expert(mine, 128), by_expert(expected, 128)
            )
    groups = {"topk": 8, "renormalize": True, "num_expert_group": 8, "topk_group": 4}
    given = {"hidden_states": hidden, "gating_output": logits}
    mine = native("grouped_topk_cpu")(hidden, logits, *groups.values(), 0, None, None)
    expected = topk.grouped_topk_gpu(**given, **groups)
    result["grouped_topk_cpu"] = differing(by_expert(mine, 128), by_expert(expected, 128))
    mine = native("biased_grouped_topk_cpu")(hidden, logits, bias, *groups.values(), 0, 2.5, None)
    expected = topk.biased_grouped_topk_impl(
        **given,
        **groups,
        correction_bias=bias,
        routed_scaling_factor=2.5,
        apply_routed_scaling_factor_on_output=True,
    )
    result["biased_grouped_topk_cpu"] = differing(by_expert(mine, 128), by_expert(expected, 128))
    return result


def main() -> None:
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        for family in (norms, rotation, activations, routers):
            result |= {f"{name} {dtype}": share for name, share in family(dtype).items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
