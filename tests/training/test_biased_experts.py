"""Risk: experts with biases (gpt-oss: clamped, gate and up in turn) train as if they had none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from training_layers import Sizes, random_layer
from training_runs import batches, lora, trainable
from transformers import AutoModelForCausalLM

import kt_kernel.training as training
from kt_kernel.adapters.backend import ExpertLora
from kt_kernel.errors import CheckpointError, FeatureUnavailableError
from kt_kernel.swiglu import Swiglu
from kt_kernel.training.function import run_experts
from kt_kernel.training.reference import ReferenceBackend, StackedWeights

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


class BiasedWeights(StackedWeights):
    """Biases that matter: of the products' size."""

    def __init__(self, weights: StackedWeights) -> None:
        super().__init__(weights.gate, weights.up, weights.down)
        generator = torch.Generator().manual_seed(7)
        sizes = (self.intermediate_size, self.intermediate_size, self.hidden_size)
        self.biases = [
            torch.randn(self.num_experts, size, generator=generator, dtype=torch.float64) for size in sizes
        ]

    def expert(self, expert: int):
        gate, up, down = (bias[expert] for bias in self.biases)
        return replace(super().expert(expert), gate_bias=gate, up_bias=up, down_bias=down)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.build("gpt_oss", tmp_path_factory.mktemp("biased") / "model", **SMALL)


def test_gradients_of_the_reference_are_those_of_finite_differences():
    layer = random_layer(Sizes(tokens=5, top_k=2, experts=4, hidden=7, intermediate=5, rank=3))
    backend = ReferenceBackend(BiasedWeights(layer.weights), Swiglu(limit=1.5, alpha=1.7))

    def experts(x, routing, *matrices):
        return run_experts(backend, x, layer.ids, routing, ExpertLora(*matrices, scale=0.7))

    inputs = [layer.x, layer.routing, *layer.lora.tensors]
    assert torch.autograd.gradcheck(experts, [t.requires_grad_() for t in inputs], fast_mode=True)


@pytest.mark.parametrize(("backend", "tolerance"), [("reference", 1e-4), ("kernels", 0.02)])
def test_a_model_computes_and_its_attention_learns_as_in_transformers(path, backend, tolerance):
    ids = batches(1, rows=2, length=24)[0]
    found = []
    for model in (
        training.load(AutoModelForCausalLM, path, dtype=torch.float32, threads=2, backend=backend),
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
    ):
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        layer = model.model.layers[0]
        routers = [parameter.grad for parameter in layer.mlp.router.parameters()]
        found.append([output.logits.detach(), layer.self_attn.q_proj.weight.grad, *routers])
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


def test_kernels_give_the_lora_the_gradients_of_the_reference(path):
    ids = batches(1, rows=2, length=24)[0]
    found = []
    for backend in ("kernels", "reference"):
        model = trainable(path, lora(init_lora_weights=False), backend=backend)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for name, p in model.named_parameters() if "experts.lora_" in name])
    assert len(found[0]) == 12
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm()) <= 0.03 * float(theirs.norm())


def test_other_formats_of_them_are_refused(path):
    with pytest.raises(FeatureUnavailableError, match=r"have biases, .* give experts='as stored'"):
        training.load(AutoModelForCausalLM, path, experts="int8", threads=2)


def test_an_adapter_of_them_comes_back_and_one_of_gate_and_up_together_is_refused(path, tmp_path):
    """Their rows stand in turn in one matrix: its halves are neither gate's nor up's."""
    model = trainable(path, lora(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    base = training.load(AutoModelForCausalLM, path, dtype=torch.float32, threads=2)
    again = training.load_adapter(base, tmp_path)
    ids = batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: t for key, t in load_file(file).items() if ".experts." not in key}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts."
        for part, rows, columns in (("base_layer.", 64, 64), ("", 64, 32)):
            tensors[f"{prefix}{part}lora_A.weight"] = torch.zeros(8 * 4, columns)
            tensors[f"{prefix}{part}lora_B.weight"] = torch.zeros(rows, 4 * 8)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="rows in turn"):
        training.load_adapter(training.load(AutoModelForCausalLM, path, threads=2), tmp_path)
