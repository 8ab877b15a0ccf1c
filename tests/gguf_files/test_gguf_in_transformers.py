"""A model of transformers out of a GGUF file says what the published model says."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from agreement import DECIDED_LOGIT_GAP, LEAST_AGREEMENT
from gguf_published import USUAL, with_rounded_experts, write_published
from safetensors.torch import load_file, save_file
from texts import ENGLISH
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kt_kernel.demo import load_dense_model
from kt_kernel.gguf_model import describe
from kt_kernel.integrations.transformers import from_pretrained

# Families of tests/serving/tiny_models.py -> architecture of the file; test_gguf_served.py has the others.
FAMILIES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "glm4_moe": "glm4moe",
    "minimax_m2": "minimax-m2",
    "gpt_oss": "gpt-oss",
}
# The file does not hold it: 7, as published.
CHANGES = {"gpt_oss": {"swiglu_limit": 7.0}}


# Mean of log-probabilities over the vocabulary, with the experts' inputs rounded to int8: 0.02 to 0.07 here.
# RoPE's rows in the wrong order give 0.94, unnormalised routing weights 2.0, groups of experts ignored 1.4.
MOST_DIFFERENCE = 0.15


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_published_models(family, tmp_path, monkeypatch):
    """The file's numbers are the reference's, so only the rounding of the experts' inputs remains."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = tiny_models.build(family, tmp_path / "checkpoint", **CHANGES.get(family, {}))
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


def test_a_file_of_a_real_model_says_what_its_dense_twin_says(demo_gguf, tmp_path, monkeypatch):
    """Weights and tokenizer out of a file whose blocks others quantised, on text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = from_pretrained(demo_gguf, dtype=torch.float32, cpuinfer=2)
    tokenizer = AutoTokenizer.from_pretrained(describe(demo_gguf).directory)
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids[:, :300]
    with torch.no_grad():
        ours, theirs = (m(ids).logits.log_softmax(-1) for m in (model, load_dense_model(torch.float32)))
    model.kt.close()
    best = theirs.topk(2).values
    decided = best[..., 0] - best[..., 1] > DECIDED_LOGIT_GAP
    assert decided.sum() > 200
    assert (ours.argmax(-1) == theirs.argmax(-1))[decided].float().mean() >= LEAST_AGREEMENT
    given = ids[:, 1:, None]
    difference = (ours - theirs)[:, :-1].gather(-1, given).abs().mean()
    assert 0 < difference < 0.05, difference
