"""Memory: what a forward pass keeps is what doc/training.md says, and steps leave nothing behind."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from training_runs import adamw, batches, parameters, train, trainable

from kt_kernel.adapters.backend import ExpertLora
from kt_kernel.training.function import run_experts
from kt_kernel.training.lora import LoraExperts

TOKENS, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE, RANK = 48, 2, 8, 64, 32, 4


@pytest.fixture(scope="module")
def layer(tiny) -> LoraExperts:
    model = trainable(tiny())
    return model.base_model.model.model.layers[1].mlp.experts


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices
    return torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_(), ids, torch.rand(TOKENS, TOP_K)


def kept(run, parameters_: list[torch.Tensor]) -> int:
    """Bytes of the tensors that the graph of `run` keeps, without the parameters."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for parameter in parameters_:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_forward_pass_keeps_what_the_formula_says(layer, dtype, width):
    lora: ExpertLora = layer.expert_lora("default")
    x, ids, weights = inputs(dtype)
    found = kept(lambda: run_experts(layer.base_layer.backend, x, ids, weights, lora), list(lora.tensors))
    pairs = TOKENS * TOP_K
    # x; gate and up of each pair; the three products with A, float32; ids and weights
    expected = width * TOKENS * HIDDEN + 2 * width * pairs * INTERMEDIATE + 12 * pairs * RANK + 12 * pairs
    assert found == expected


def test_parameters_are_the_matrices_of_the_lora_in_float32(layer):
    per_expert = RANK * (3 * HIDDEN + 3 * INTERMEDIATE)
    assert sum(p.nbytes for p in layer.parameters()) == 4 * EXPERTS * per_expert


def test_steps_leave_no_memory_behind(tiny):
    model = trainable(tiny())
    optimizer = adamw(model, lr=1e-4)
    assert parameters(model)
    data = batches(1)
    train(model, data * 20, optimizer)  # allocators and threads have what they want
    before = psutil.Process().memory_info().rss
    train(model, data * 150, optimizer)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 8 << 20
