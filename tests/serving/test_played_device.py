"""A CPU that plays the device gives a token nearly the result that the CPU's own experts give it: else
answers would depend on which experts are on the device, and on who filled the prefix cache.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from api_support import random_experts

from kt_kernel import KTMoEWrapper
from kt_kernel.integrations.sglang.cpu_fixes import PLAYS_DEVICE, moe_forward_skipping

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, TOKENS = 8, 3, 256, 128, 40
CONFIG = SimpleNamespace(
    gemm1_alpha=None, gemm1_clamp_limit=None, swiglu_limit=None, gate_up_interleaved=False
)


@pytest.fixture(scope="module")
def call() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    return torch.randn(TOKENS, HIDDEN, generator=generator), ids, weights


def of_cpu(call) -> torch.Tensor:
    wrapper = KTMoEWrapper(
        layer_idx=0,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        cpuinfer_threads=1,
        threadpool_count=1,
        weight_path="played",
        chunked_prefill_size=64,
        method="BF16",
        activations="bf16",
    )
    wrapper.load_weights_from_tensors(*random_experts(7, EXPERTS, HIDDEN, INTERMEDIATE))
    return wrapper.forward(*call)


def of_device(call, rows: slice = slice(None), **kind: bool) -> torch.Tensor:
    gate, up, down = (matrix.float() for matrix in random_experts(7, EXPERTS, HIDDEN, INTERMEDIATE))
    layer = SimpleNamespace(w13_weight=torch.cat([gate, up], dim=1), w2_weight=down, **kind)
    hidden, ids, weights = (part[rows] for part in call)
    if not kind:  # one without an expert: stock code would need a whole layer of SGLang
        ids = torch.cat([ids, torch.full((len(ids), 1), -1)], dim=1)
        weights = torch.cat([weights, torch.zeros(len(weights), 1)], dim=1)
    return moe_forward_skipping(None, layer, hidden, (weights, ids, None), CONFIG)


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Normalised mean squared."""
    return float((one - other).double().square().sum() / other.double().square().sum())


def test_both_round_alike(call):
    expected = of_cpu(call)
    assert error(of_device(call, **{PLAYS_DEVICE: True}), expected) < 1e-8
    assert error(of_device(call), expected) > 1e-6, "without the same rounding"


def test_a_row_has_the_same_bits_whatever_is_beside_it(call):
    together = of_device(call, **{PLAYS_DEVICE: True})
    alone = [of_device(call, slice(row, row + 1), **{PLAYS_DEVICE: True}) for row in range(TOKENS)]
    assert torch.equal(together, torch.cat(alone))
