"""Risk: latent attention takes a fused operator that does not compute what the model does, or, for a fresh
prompt, a method that depends on the other requests of its batch.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from kt_kernel.integrations.sglang import cpu_fixes


def attention(**rotary: bool) -> SimpleNamespace:
    return SimpleNamespace(rotary_emb=SimpleNamespace(**rotary) if rotary else None)


def packs(layer: SimpleNamespace) -> None:
    """Stock code: the absorbed weights get a method that packs them."""
    layer.quant_method = "packs"


@pytest.mark.parametrize(
    ("layer", "fused"),
    [
        (attention(is_neox_style=False), True),
        (attention(is_neox_style=True), False),
        (attention(), False),
    ],
)
def test_only_pairs_side_by_side_are_fused(layer, fused):
    cpu_fixes.fuse_projections(packs, layer)
    assert hasattr(layer, "quant_method") == fused


def test_layers_that_stock_code_does_not_fuse_stay_so():
    layer = attention(is_neox_style=True)
    cpu_fixes.fuse_projections(lambda layer: None, layer)
    assert not hasattr(layer, "quant_method")


@pytest.mark.parametrize("backend", ["torch_native", "intel_amx"])
def test_a_prompt_is_computed_in_absorbed_form_whatever_is_cached(backend, monkeypatch):
    handlers = SimpleNamespace(_dispatch_mla_subtype="absorbed")
    monkeypatch.setitem(sys.modules, "sglang.srt.models.deepseek_common.attention_backend_handler", handlers)
    registry = SimpleNamespace(_handlers={"triton": "either"})

    def stock(registry: SimpleNamespace, name: str) -> str:
        return registry._handlers.get(name, registry._handlers["triton"])

    assert cpu_fixes.attention_handler(stock, registry, backend) == "absorbed"
    assert cpu_fixes.attention_handler(stock, registry, "flashinfer") == "either"
