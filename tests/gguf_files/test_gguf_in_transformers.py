"""A model of transformers out of a GGUF file says what the published model says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from gguf_published import USUAL, with_rounded_experts, write_published
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kt_kernel.integrations.transformers import from_pretrained

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))

import tiny_models

# Families of tests/serving/tiny_models.py -> architecture of the file.
FAMILIES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "mixtral": "llama",
    "glm4_moe": "glm4moe",
    "deepseek_v3": "deepseek2",
    "minimax_m2": "minimax-m2",
}


# Mean of log-probabilities over the vocabulary, with the experts' inputs rounded to int8: 0.02 to 0.07 here.
# RoPE's rows in the wrong order give 0.94, unnormalised routing weights 2.0, groups of experts ignored 1.4.
MOST_DIFFERENCE = 0.15


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_published_models(family, tmp_path, monkeypatch):
    """The file's numbers are the reference's, so only the rounding of the experts' inputs remains."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = tiny_models.build(family, tmp_path / "checkpoint")
    config = AutoConfig.from_pretrained(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    file = write_published(FAMILIES[family], config, tensors, tmp_path / "model.gguf")
    save_file(
        with_rounded_experts(tensors, USUAL.expert_kind), checkpoint / "model.safetensors", {"format": "pt"}
    )
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model = from_pretrained(file, dtype=torch.float32, cpuinfer=1)
    ids = torch.randint(0, tiny_models.VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m(ids).logits.log_softmax(-1) for m in (model, reference))
    model.kt.close()
    difference = (ours - theirs).abs().mean()
    assert 0 < difference < MOST_DIFFERENCE, difference
