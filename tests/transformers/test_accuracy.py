"""bench/accuracy.py measures the product's kernels inside a model that is otherwise untouched."""

from __future__ import annotations

import accuracy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kt_kernel.bench.measure import kernels


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> accuracy.Measured:
    """A model of two layers whose widths have to be padded, and 48 random tokens."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).bfloat16().float().eval()
    monkeypatch.setattr(accuracy, "load_dense_model", lambda dtype: model.to(dtype))
    monkeypatch.setattr(accuracy, "windows", lambda tokens: torch.randint(64, (2, tokens // 2)))
    return accuracy.Measured(48, threads=1)


def test_experts_compute_what_the_mlps_did(measured):
    size, losses = measured.bytes_per_weight(accuracy.Format("BF16")), measured.losses_with("bf16")
    above, error = accuracy.per_cent_above(losses, measured.reference)
    assert size == 2 and len(losses) == 2 * 23
    assert abs(above) < 0.5 and 0 < error < 0.5


def test_a_line_is_about_its_own_format(measured):
    plain, coarse = (
        measured.line(accuracy.Format(*form)).split(" | ") for form in (("BF16",), ("RAWINT4", 128))
    )
    assert plain[0] == "| `BF16`" and coarse[0] == "| `RAWINT4`, groups of 128"
    assert float(coarse[1]) == pytest.approx((4 + 16 / 128) / 8, abs=1e-3)
    assert plain[2] != coarse[2] and plain[4] == "-"
    assert (coarse[4] != "-") == ("int8" in kernels("RAWINT4"))


def test_the_text_is_long_enough_and_has_no_paragraph_twice():
    paragraphs = accuracy.prose().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))
    assert sum(len(paragraph.split()) for paragraph in paragraphs) > 4096
