"""Quantised checkpoints: experts in their own format, everything else decoded, as the model is meant."""

from __future__ import annotations

import json
import shutil

import pytest
from patched import agreement, load

from kt_kernel.checkpoint.reader import open_checkpoint
from kt_kernel.errors import CheckpointError
from kt_kernel.integrations.transformers.dense import dense_state_dict

# Each has dense layers that are quantised too, except kimi-k2-thinking.
LAYOUTS = ("deepseek-v3", "minimax-m2", "glm-4.7-fp8", "kimi-k2-thinking", "qwen3-gptq-int4", "qwen3-nvfp4")


@pytest.mark.parametrize("device_experts", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_and_logits_are_those_of_the_decoded_model(
    layout, device_experts, quantised_checkpoint, quantised_reference
):
    model = load(quantised_checkpoint(layout) / "served", num_gpu_experts=device_experts, activations="bf16")
    result = agreement(model, quantised_reference(layout))
    assert result.holds(), str(result)


# gpt-oss: MXFP4 of all experts at once, gate and up in turn, with biases.
ON_CPU = ("gpt-oss", "qwen3-fp8", "compressed-mxfp4", "compressed-nvfp4")


@pytest.mark.parametrize("layout", ON_CPU)
def test_layouts_that_no_server_is_started_for(layout, quantised_checkpoint, quantised_reference):
    model = load(quantised_checkpoint(layout) / "served", activations="bf16")
    result = agreement(model, quantised_reference(layout))
    assert result.holds(), str(result)


@pytest.mark.parametrize("layout", ["kimi-k2-thinking", "qwen3-nvfp4"])
def test_int8_activations_change_little(layout, quantised_checkpoint, quantised_reference):
    model = load(quantised_checkpoint(layout) / "served", activations="int8")
    result = agreement(model, quantised_reference(layout))
    assert result.holds_for_int8(), str(result)


def test_experts_may_come_from_another_directory(quantised_checkpoint, quantised_reference):
    path = quantised_checkpoint("deepseek-v4-experts")
    model = load(path / "served", weight_path=path / "experts", num_gpu_experts=3, activations="bf16")
    result = agreement(model, quantised_reference("deepseek-v4-experts"))
    assert result.holds(), str(result)


def test_dense_layers_with_reordered_inputs_are_refused(quantised_checkpoint, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(quantised_checkpoint("qwen3-gptq-int4") / "served", path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="desc_act=true"):
        dense_state_dict(open_checkpoint(path))
