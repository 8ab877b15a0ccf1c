"""A whole model out of its file is the model the file was made from: every tensor, and its configuration."""

from __future__ import annotations

import functools
from pathlib import Path

import gguf_published
import pytest
import torch
from gguf_published import USUAL, FileStyle, random_model, write_published
from transformers import AutoConfig

from kt_kernel.gguf.model import open_gguf
from kt_kernel.gguf_model import describe
from kt_kernel.gguf_model.dense import DenseWeights

MODELS = sorted(gguf_published.MODELS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """name -> the model of transformers and its published tensors."""
    root = tmp_path_factory.mktemp("published")

    @functools.cache
    def build(name: str):
        model = random_model(name)
        return model, gguf_published.published_tensors(model, root / name)

    return build


@pytest.fixture
def file(source, tmp_path):
    """Name and what differs -> the file."""

    def build(name: str, style: FileStyle = USUAL, **metadata: object) -> Path:
        model, tensors = source(name)
        architecture = gguf_published.MODELS[name].architecture
        return write_published(
            architecture, model.config, tensors, tmp_path / f"{name}.gguf", style, **metadata
        )

    return build


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_comes_back_under_its_published_name(name, source, file):
    """Bit by bit, from BF16 and F32."""
    _, published = source(name)
    weights = DenseWeights(open_gguf(file(name)))
    found = dict(weights.decoded(torch.bfloat16))
    expected = {name: tensor for name, tensor in published.items() if ".experts." not in name}
    assert sorted(found) == sorted(expected)
    for tensor, values in expected.items():
        assert found[tensor].is_contiguous(), tensor
        assert found[tensor].shape == values.shape, tensor
        assert torch.equal(found[tensor].float(), values.float()), tensor


@pytest.mark.parametrize("name", MODELS)
def test_experts_for_a_device_come_back_under_their_published_names(name, source, file):
    _, published = source(name)
    weights = DenseWeights(open_gguf(file(name)))
    found = dict(weights.decoded_experts(2, [0, 5], torch.bfloat16))
    expected = {
        tensor: values
        for tensor, values in published.items()
        if ".layers.2." in tensor and (".experts.0." in tensor or ".experts.5." in tensor)
    }
    assert len(expected) == 6
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[tensor], values) for tensor, values in expected.items())


# Set when a checkpoint is saved, or of training only: without a meaning for a served model.
_OF_NO_MEANING = {
    *("transformers_version", "_name_or_path", "initializer_range", "use_cache", "output_router_logits"),
    *("router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "attention_dropout"),
    *("pretraining_tp", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_is_the_models(name, source, file):
    model, _ = source(name)
    described = AutoConfig.from_pretrained(describe(file(name)).directory).to_dict()
    expected = model.config.to_dict()
    assert described["architectures"] == [type(model).__name__]
    differing = {
        key: (described.get(key), value)
        for key, value in expected.items()
        if key not in _OF_NO_MEANING | {"architectures"} and described.get(key) != value
    }
    assert differing == {}
