"""A whole model out of its file is the model the file was made from: every tensor, and its configuration."""

from __future__ import annotations

import functools
import json
import re
import time
from pathlib import Path

import gguf
import gguf_published
import pytest
import torch
from gguf_published import USUAL, FileStyle, random_model, with_rounded_experts, write_published
from gguf_writing import Type, write
from transformers import AutoConfig

from kt_kernel.demo.gguf_source import find_source
from kt_kernel.errors import CheckpointError, FeatureUnavailableError
from kt_kernel.gguf.model import open_gguf
from kt_kernel.gguf_model import describe, described_file, find_gguf
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


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt_oss"])
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
    for tensor, values in with_rounded_experts(expected, USUAL.expert_kind).items():
        assert torch.equal(found[tensor], values.bfloat16()), tensor


def test_experts_with_biases_are_not_put_on_a_device(file):
    with pytest.raises(FeatureUnavailableError, match="have biases, and such experts of a GGUF file"):
        dict(DenseWeights(open_gguf(file("gpt_oss"))).decoded_experts(2, [0], torch.bfloat16))


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


# ---- files that differ ----------------------------------------------------------------------------


def config_of(file: Path) -> dict:
    return json.loads((describe(file).directory / "config.json").read_text())


def test_both_ways_to_store_latent_attention_are_the_same_weights(file):
    """Older files hold kv_b_proj whole, newer ones its halves; some hold both."""
    halves = DenseWeights(open_gguf(file("deepseek_v3")))
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    expected = halves.read(name, torch.bfloat16)
    joined = DenseWeights(open_gguf(file("deepseek_v3", FileStyle(kv_b="joined"))))
    assert len(halves.tensors[name].parts) == 2
    assert len(joined.tensors[name].parts) == 1
    assert torch.equal(joined.read(name, torch.bfloat16), expected)


def test_older_files_of_latent_attention_are_described_alike(file):
    """From before the metadata told the lengths of keys and values apart, and knew groups of experts."""
    newer = config_of(file("deepseek_v3"))
    older = config_of(
        file(
            "deepseek_v3",
            FileStyle(kv_b="joined"),
            **{
                "deepseek2.attention.head_count_kv": 4,
                "deepseek2.attention.key_length": 40,
                "deepseek2.attention.value_length": 20,
                "deepseek2.attention.key_length_mla": None,
                "deepseek2.attention.value_length_mla": None,
                "deepseek2.expert_gating_func": None,
            },
        )
    )
    assert older == newer


def test_experts_biases_keep_the_bits_that_bfloat16_lacks(source, tmp_path):
    """Their order decides which experts a token has."""
    model, tensors = source("deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    biases = 7 + torch.arange(8) / 1024
    path = write_published("deepseek2", model.config, tensors | {name: biases}, tmp_path / "bias.gguf")
    assert torch.equal(DenseWeights(open_gguf(path)).read(name, torch.bfloat16), biases)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.F16, Type.F32])
def test_dense_weights_are_decoded_to_the_type_asked_for(kind, file):
    path = file("qwen2moe", FileStyle(kind=kind))
    (stored,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, kind).copy())
    weights = DenseWeights(open_gguf(path))
    for dtype in (torch.float32, torch.bfloat16):
        found = weights.read("model.layers.1.self_attn.q_proj.weight", dtype)
        assert torch.equal(found.float(), expected.to(dtype).float())


@pytest.mark.parametrize("experts", ["stacked", "single", "fused"])
def test_experts_are_found_however_they_are_stored(experts, source, file):
    """Old files have a tensor for each, some new ones gate and up in one."""
    _, published = source("mixtral")
    path = file("mixtral", FileStyle(experts=experts))
    assert config_of(path)["intermediate_size"] == 32
    weights = DenseWeights(open_gguf(path))
    assert not any(".experts." in name for name in weights.tensors)
    found = dict(weights.decoded_experts(1, [3], torch.bfloat16))
    assert len(found) == 3
    expected = with_rounded_experts({name: published[name] for name in found}, USUAL.expert_kind)
    assert all(torch.equal(found[name], values.bfloat16()) for name, values in expected.items())


def test_a_tied_head_is_said_in_the_configuration_and_handed_out(source, tmp_path):
    model, tensors = source("qwen3moe")
    tied = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    path = write_published("qwen3moe", model.config, tied, tmp_path / "tied.gguf")
    assert config_of(path)["tie_word_embeddings"] is True
    weights = DenseWeights(open_gguf(path))
    head = weights.read("lm_head.weight", torch.bfloat16)
    assert torch.equal(head, tied["model.embed_tokens.weight"].bfloat16())


def test_layers_for_speculative_decoding_are_left_out(source, tmp_path):
    """Files of GLM-4.5 count them as layers, behind the others."""
    model, tensors = source("glm4moe")
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 4})
    last = {
        name.replace(".layers.2.", ".layers.3."): tensor
        for name, tensor in tensors.items()
        if ".layers.2." in name
    }
    path = write_published(
        *("glm4moe", config, tensors | last, tmp_path / "nextn.gguf"),
        **{"glm4moe.nextn_predict_layers": 1},
    )
    assert config_of(path)["num_hidden_layers"] == 3
    assert not any(".layers.3." in name for name in DenseWeights(open_gguf(path)).tensors)


def test_answers_end_at_every_marker_and_are_sampled_as_the_makers_say(file):
    description = describe(file("qwen3moe", **{"general.sampling.temp": 0.6, "general.sampling.top_k": 20}))
    said = json.loads((description.directory / "generation_config.json").read_text())
    tokens = gguf_published.TOKENIZER["tokenizer.ggml.tokens"]
    assert said["eos_token_id"] == [tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")]
    assert (said["temperature"], said["top_k"], said["do_sample"]) == (0.6, 20, True)
    assert description.name == "Tiny Model"


# ---- in the cache ---------------------------------------------------------------------------------


def test_a_description_is_small_and_made_once(file, tmp_path):
    path = file("mixtral")
    first = describe(path)
    made = {entry.name: entry.stat().st_mtime_ns for entry in first.directory.iterdir()}
    assert describe(path) == first
    assert {entry.name: entry.stat().st_mtime_ns for entry in first.directory.iterdir()} == made
    assert sum(entry.stat().st_size for entry in first.directory.iterdir()) < 100_000
    assert described_file(first.directory) == path
    assert described_file(tmp_path) is None


def test_a_file_that_changed_is_described_anew(file, tmp_path):
    path = file("mixtral")
    before = describe(path)
    time.sleep(0.01)  # the file system's clock ticks at its own pace
    file("mixtral", **{"llama.context_length": 77})
    after = describe(path)
    assert after.directory != before.directory
    assert config_of(path)["max_position_embeddings"] == 77


def test_only_a_model_in_gguf_is_found(file, tmp_path):
    path = file("mixtral")
    assert find_gguf(path) == path
    assert find_gguf(tmp_path) == tmp_path
    assert find_gguf(tmp_path / "absent.gguf") is None
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) is None  # a checkpoint with a GGUF file beside it


# ---- errors ---------------------------------------------------------------------------------------

_SMALL = {"general.name": "small"}


@pytest.mark.parametrize(
    ("architecture", "error", "sentence"),
    [
        ("gemma3", CheckpointError, "of the architecture 'gemma3', which cannot be served from a GGUF file"),
    ],
)
def test_an_architecture_that_is_not_in_the_table_is_refused(architecture, error, sentence, tmp_path):
    with pytest.raises(error, match=sentence):
        describe(write(tmp_path / "other.gguf", architecture, _SMALL, []))


def test_a_dense_model_is_refused():
    with pytest.raises(CheckpointError, match="has no experts in it: kt-kernel serves mixture-of-experts"):
        describe(find_source().path)


@pytest.mark.parametrize(
    ("name", "metadata", "sentence"),
    [
        ("qwen3moe", {"qwen3moe.expert_count": 9}, "says it has 9 experts, but its tensors hold 8"),
        ("qwen3moe", {"qwen3moe.block_count": 4}, r"no experts in the layers \[3\]"),
        ("qwen3moe", {"qwen3moe.embedding_length": None}, "embedding_length = nothing, expected one integer"),
        ("qwen3moe", {"qwen3moe.attention.head_count": [4, 4, 4]}, "expected one integer"),
        ("qwen3moe", {"qwen3moe.attention.layer_norm_rms_epsilon": "x"}, "= 'x', expected a number"),
        (
            "qwen3moe",
            {"qwen3moe.rope.scaling.type": "longrope", "qwen3moe.rope.scaling.factor": 2.0},
            "scales its positions by 'longrope'",
        ),
    ],
)
def test_metadata_that_do_not_fit_are_named(name, metadata, sentence, file):
    with pytest.raises(CheckpointError, match=sentence) as raised:
        describe(file(name, **metadata))
    assert f"{name}.gguf" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("attn_v.weight", None), "no tensor 'blk.1.attn_v', which a model of the architecture qwen3moe"),
        (("attn_v.weight", "attn_w.weight"), "a tensor 'blk.1.attn_w.weight', which is no part of a model"),
        (("attn_v.weight", "attn_v.scale"), "a tensor 'blk.1.attn_v.scale', which is no part of a model"),
    ],
)
def test_tensors_that_are_missing_or_unknown_are_named(change, sentence, source, tmp_path, monkeypatch):
    """Before anything is loaded: SGLang would leave what is missing at random values."""
    old, new = (tail and f"blk.1.{tail}" for tail in change)
    stored = gguf_published._tensors

    def changed(*arguments):
        for name, values in stored(*arguments):
            if name != old or new:
                yield (new if name == old else name), values

    monkeypatch.setattr(gguf_published, "_tensors", changed)
    model, tensors = source("qwen3moe")
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        describe(write_published("qwen3moe", model.config, tensors, tmp_path / "changed.gguf"))
