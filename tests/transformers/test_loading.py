"""Expert weights never pass through transformers: not read, not allocated, not initialised."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patched import load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import kt_kernel
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.integrations.transformers import loading
from kt_kernel.integrations.transformers.blocks import UnloadedExperts
from kt_kernel.integrations.transformers.experts import HybridExperts


class Allocations(TorchDispatchMode):
    """Elements of every result of a torch operation that is not on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.elements += [
            leaf.numel()
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta
        ]
        return result


@pytest.fixture
def names_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are copied out of the checkpoint."""
    names = []
    original = Checkpoint.view

    def view(self: Checkpoint, name: str) -> torch.Tensor:
        names.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "view", view)
    return names


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "minimax_m2"])
def test_transformers_reads_and_allocates_no_expert(family, tiny_checkpoint, names_read, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads' operations are not seen
    path = tiny_checkpoint(family)
    layer = _expert_elements_of_a_layer(path)
    names_read.clear()
    with Allocations() as allocations:
        model = loading.without_experts(str(path), torch.float32)
    assert names_read and not [name for name in names_read if ".experts." in name]
    assert 0 < max(allocations.elements) < layer
    unloaded = [module for module in model.modules() if isinstance(module, UnloadedExperts)]
    assert unloaded and not any(list(module.parameters()) for module in unloaded)
    assert not any(parameter.is_meta for parameter in model.parameters())


def _expert_elements_of_a_layer(path: Path) -> int:
    """Of gate_up_proj alone: more than any other tensor of these models has."""
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(loading._config(str(path)))
    blocks = loading.find_experts(reference)
    largest_dense = max(
        parameter.numel() for name, parameter in reference.named_parameters() if ".experts." not in name
    )
    block = blocks[0]
    elements = 2 * block.num_experts * block.intermediate_size * block.hidden_size
    assert elements > largest_dense
    return elements


def test_patched_model_has_no_expert_parameters(tiny_checkpoint):
    model = load(tiny_checkpoint("qwen3_moe"), num_gpu_experts=2)
    assert not [name for name, _ in model.named_parameters() if ".experts" in name]
    assert sum(isinstance(module, HybridExperts) for module in model.modules()) == 4
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "minimax_m2"])
def test_everything_but_the_experts_is_as_transformers_loads_it(family, tiny_checkpoint):
    path = tiny_checkpoint(family)
    plain = AutoModelForCausalLM.from_pretrained(path)
    model = kt_kernel.integrations.transformers.from_pretrained(path, cpuinfer=1, threadpool_count=1)
    assert type(model) is type(plain)
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert model.state_dict().keys() == {name for name in plain.state_dict() if ".experts." not in name}
    # Also those that no file holds, such as the frequencies of rotary embeddings.
    expected = dict(plain.named_parameters()) | dict(plain.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_dtype_is_the_checkpoints_unless_given(tiny_checkpoint):
    path = tiny_checkpoint("qwen3_moe")
    model = kt_kernel.integrations.transformers.from_pretrained(path, cpuinfer=1, threadpool_count=1)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert load(path).lm_head.weight.dtype == torch.float32


def test_a_loaded_model_can_be_patched_and_drops_its_experts(tiny_checkpoint):
    path = tiny_checkpoint("mixtral")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        before = sum(parameter.numel() for parameter in model.parameters())
        patched = kt_kernel.patch(model, weight_path=path, num_gpu_experts=8, cpuinfer=1, threadpool_count=1)
        assert patched is model
        assert sum(parameter.numel() for parameter in model.parameters()) < before
        assert torch.allclose(model(ids).logits, expected, atol=1e-3)


def test_importing_the_package_does_not_import_transformers():
    program = (
        "import sys, kt_kernel\n"
        "assert 'patch' in dir(kt_kernel)\n"
        "assert not {'transformers', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
