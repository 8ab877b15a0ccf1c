"""What cannot be patched is refused in one sentence, and the model stays as it was."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from patched import load
from safetensors.torch import load_file, save_file

import kt_kernel
from kt_kernel.errors import (
    CallOrderError,
    CheckpointError,
    CheckpointPathError,
    ConfigurationError,
    FeatureUnavailableError,
    InputError,
    KTError,
)
from kt_kernel.integrations.transformers import ExpertOptions, loading
from kt_kernel.integrations.transformers.experts import HybridExperts

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def on_meta(class_name: str, config_name: str, **special: object) -> torch.nn.Module:
    config = getattr(transformers, config_name)(**{**_SMALL, **special})
    with torch.device("meta"):
        return getattr(transformers, class_name)(config)


@pytest.mark.parametrize(
    ("class_name", "config_name", "special", "sentence"),
    [
        ("LlamaForCausalLM", "LlamaConfig", {}, "no layer with routed experts"),
        (
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            {"num_experts": 4, "moe_intermediate_size": 16, "hidden_act": "gelu"},
            "computes something else between its projections",
        ),
    ],
)
def test_models_that_compute_something_else_are_refused(class_name, config_name, special, sentence):
    model = on_meta(class_name, config_name, **special)
    with pytest.raises(KTError, match=sentence) as raised:
        kt_kernel.patch(model, weight_path="anywhere")
    assert "\n" not in str(raised.value)


def test_dense_weights_must_be_loaded(tiny_checkpoint):
    config = transformers.AutoConfig.from_pretrained(tiny_checkpoint("qwen3_moe"))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigurationError, match="are on meta, expected one device"):
        kt_kernel.patch(model, weight_path=tiny_checkpoint("qwen3_moe"))


def test_second_patch_is_refused(tiny_checkpoint):
    path = tiny_checkpoint("qwen3_moe")
    model = load(path)
    with pytest.raises(CallOrderError, match="patched already"):
        kt_kernel.patch(model, weight_path=path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_gpu_experts": 17}, "num_gpu_experts is 17, but a layer of this model has 16"),
        ({"num_gpu_experts": -1}, "num_gpu_experts is -1"),
        ({"gpu_experts_ratio": 1.5}, "gpu_experts_ratio is 1.5, expected a number from 0 to 1"),
        ({"activations": "int8"}, "activations is int8, but method BF16 has no kernels"),
        ({"activations": "fp4"}, "activations is 'fp4', expected one of auto, bf16, int8"),
        ({"init_expert_location": "counts.pt"}, "counts.pt is read by .* but the strategy is uniform"),
        ({"numa_nodes": [63]}, "numa_nodes names node 63, but this process may use the nodes"),
        ({"expert_placement_strategy": "frequency"}, "needs counts of an earlier run"),
        (
            {"expert_placement_strategy": "frequency", "init_expert_location": "no/such.pt"},
            "do not exist",
        ),
        ({"expert_placement_strategy": "best"}, "placement strategy 'best' is unknown"),
        ({"gpu_prefill_token_threshold": -1}, "gpu_prefill_token_threshold is -1"),
        ({"expert_update_interval": 4}, "expert_update_interval is 4 without enable_dynamic"),
        ({"enable_dynamic_expert_update": True}, "without an occasion to move experts"),
        ({"miss_policy": "some"}, "miss policy 'some' is unknown"),
        ({"method": "FP8"}, "method is FP8, but .* holds BF16 experts"),
        ({"method": "INT3"}, "INT3"),
        ({"threadpool_count": 3, "cpuinfer": 1}, "threadpool_count is 3"),
    ],
)
def test_impossible_options_are_one_sentence_and_leave_the_model_alone(options, sentence, tiny_checkpoint):
    path = tiny_checkpoint("qwen3_moe")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    before = set(model.state_dict())
    with pytest.raises(KTError, match=sentence) as raised:
        kt_kernel.patch(model, weight_path=path, **options)
    assert "\n" not in str(raised.value)
    assert set(model.state_dict()) == before
    assert not hasattr(model, "kt")


def test_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="gpu_experts"):
        ExpertOptions(weight_path="x", gpu_experts=3)


def test_missing_directory_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointPathError, match="there is no directory"):
        load(tmp_path / "nothing")


def test_directory_without_a_model_is_one_sentence(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointPathError, match=r"holds no \.safetensors file"):
        load(tmp_path)
    shutil.copy(tiny_checkpoint("qwen3_moe") / "model.safetensors", tmp_path)
    with pytest.raises(ConfigurationError, match=r"config\.json of") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def copy_without(source: Path, target: Path, *left_out: str) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    assert len(kept) == len(tensors) - len(left_out)
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def test_missing_dense_tensor_is_not_made_up(tiny_checkpoint, tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    path = copy_without(tiny_checkpoint("qwen3_moe"), tmp_path / "copy", name)
    with pytest.raises(CheckpointError, match=f"tensor '{name}'"):
        load(path)


def test_dense_tensor_of_another_shape_is_not_made_up(tiny_checkpoint, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    with pytest.raises(CheckpointError, match=r"has shape \[512, 256\], but the model .* has \[500, 256\]"):
        load(path)


@pytest.mark.parametrize(
    "options", [{"method": "FP8"}, {"weight_path": "no/such/place"}, {"gpu_experts_ratio": 2.0}]
)
def test_wrong_options_are_found_before_anything_is_loaded(options, tiny_checkpoint, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("loading had begun")

    monkeypatch.setattr(loading, "without_experts", fail)
    with pytest.raises(KTError):
        load(tiny_checkpoint("qwen3_moe"), **options)


def test_missing_expert_tensor_is_named(tiny_checkpoint, tmp_path):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    path = copy_without(tiny_checkpoint("qwen3_moe"), tmp_path / "copy", name)
    with pytest.raises(CheckpointError, match=name):
        load(path)


def test_layer_that_cannot_be_decoded_is_named(tiny_checkpoint, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)  # its scales are not there
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer 'model\.layers\.0\.self_attn\.q_proj' is quantised"):
        load(path)


def test_experts_of_another_model_are_refused(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="from the same model"):
        load(tiny_checkpoint("qwen3_moe"), weight_path=tiny_checkpoint("mixtral"))


def test_gradients_are_refused_instead_of_being_wrong(tiny_checkpoint):
    model = load(tiny_checkpoint("qwen3_moe"))
    embeddings = model.get_input_embeddings()(torch.arange(5)[None]).requires_grad_()
    with pytest.raises(InputError, match="gradients were asked for"):
        model(inputs_embeds=embeddings)


def test_gradients_of_router_weights_alone_are_refused_too(tiny_checkpoint):
    model = load(tiny_checkpoint("qwen3_moe"))
    experts = next(module for module in model.modules() if isinstance(module, HybridExperts))
    hidden = torch.zeros(2, model.config.hidden_size)
    ids = torch.zeros(2, model.config.num_experts_per_tok, dtype=torch.int64)
    with pytest.raises(InputError, match="gradients were asked for"):
        experts(hidden, ids, torch.ones(ids.shape).requires_grad_())


def test_loading_an_unloaded_placeholder_is_impossible_to_miss(tiny_checkpoint):
    model = loading.without_experts(str(tiny_checkpoint("qwen3_moe")), torch.float32)
    with pytest.raises(NotImplementedError):
        model(torch.arange(5)[None])


def test_models_with_other_experts_say_which(tiny_checkpoint):
    with pytest.raises(FeatureUnavailableError, match=r"model\.layers\.0\.mlp\.experts"):
        kt_kernel.patch(on_meta("Qwen3MoeForCausalLM", "Qwen3MoeConfig", hidden_act="gelu"), weight_path="x")


def test_weights_must_be_named(tiny_reference):
    with pytest.raises(
        ConfigurationError, match=r"weight_path is not given, .*patch\(model, weight_path="
    ) as raised:
        kt_kernel.patch(tiny_reference("qwen3_moe"))
    assert "\n" not in str(raised.value)


def test_saving_a_patched_model_is_refused_because_its_experts_would_be_missing(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint("qwen3_moe")
    with pytest.raises(FeatureUnavailableError, match="cannot be saved") as raised:
        load(path).save_pretrained(tmp_path)
    assert str(path) in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_ends_before_anything_is_loaded(tiny_checkpoint):
    with pytest.raises(ConfigurationError, match="finds no CUDA device here; give device='cpu'"):
        loading.from_pretrained(tiny_checkpoint("qwen3_moe"), device="cuda")


def test_first_example_of_the_documentation_runs(tiny_checkpoint):
    """On the device that this machine has."""
    page = Path(__file__).resolve().parents[2] / "doc/transformers.md"
    example = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    path = tiny_checkpoint("qwen3_moe")
    program = example.replace("/models/Qwen3-30B-A3B", str(path))
    assert program != example
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is") and "'device_experts': [" in done.stdout


@pytest.mark.parametrize(
    "option", [{"num_gpu_experts": 3}, {"gpu_prefill_token_threshold": 64}, {"miss_policy": "auto"}]
)
def test_experts_with_biases_stay_on_the_cpu(tiny_checkpoint, option):
    """On a device they would be computed without them."""
    path = tiny_checkpoint("gpt_oss")
    with pytest.raises(
        FeatureUnavailableError, match="have biases, and such experts are not copied to a device"
    ):
        load(path, **option)


def test_another_order_of_gate_and_up_is_refused(tmp_path):
    """The privacy filter has gpt-oss's names, which tell rows in turn, and gate's rows first."""
    config = transformers.OpenAIPrivacyFilterConfig(
        **_SMALL, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0
    )
    model = transformers.OpenAIPrivacyFilterModel(config)
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    experts = {name: getattr(model.layers[0].mlp.experts, name).data.bfloat16() for name in names}
    named = {f"model.layers.0.mlp.experts.{name}": tensor for name, tensor in experts.items()}
    save_file(named, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the model has gate's rows before up's, but") as raised:
        kt_kernel.patch(model, weight_path=tmp_path)
    assert "\n" not in str(raised.value) and "rows of gate and up in turn" in str(raised.value)
