"""Graphs do not disturb each other: what a forward pass saves belongs to its own graph, and goes with it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from training_layers import Sizes, random_layer

from kt_kernel.adapters.backend import Call, Gradients, Needs
from kt_kernel.training.function import run_experts
from kt_kernel.training.reference import ReferenceBackend

SIZES = Sizes(tokens=6, top_k=2, experts=4, hidden=8, intermediate=6, rank=2)


class Watched(ReferenceBackend):
    """Remembers what was asked for, and whether what it saved is alive."""

    def __init__(self, weights):
        super().__init__(weights)
        self.needs: list[Needs] = []
        self.saved: list[weakref.ref] = []
        self.fails = False

    def forward(self, call: Call, needs: Needs):
        out, saved = super().forward(call, needs)
        self.needs.append(needs)
        self.saved += [weakref.ref(tensor.untyped_storage()) for tensor in saved]
        return out, saved

    def backward(self, call, saved, dout, needs) -> Gradients:
        if self.fails:
            raise RuntimeError("the kernel failed")
        return super().backward(call, saved, dout, needs)

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.saved)


@pytest.fixture
def layer():
    layer = random_layer(SIZES)
    for tensor in (layer.x, *layer.lora.tensors):
        tensor.requires_grad_()
    return layer


def run(backend, layer, x=None):
    return run_experts(backend, layer.x if x is None else x, layer.ids, layer.routing, layer.lora)


def gradients(layer):
    found = [tensor.grad.clone() for tensor in (layer.x, *layer.lora.tensors)]
    for tensor in (layer.x, *layer.lora.tensors):
        tensor.grad = None
    return found


def test_two_forward_passes_before_a_backward_pass(layer):
    backend = ReferenceBackend(layer.weights)
    other = layer.x.detach() * -0.5 + 1
    run(backend, layer, other).square().sum().backward()
    run(backend, layer).square().sum().backward()
    apart = gradients(layer)
    first, second = run(backend, layer, other), run(backend, layer)
    second.square().sum().backward()
    first.square().sum().backward()
    for together, alone in zip(gradients(layer), apart, strict=True):
        torch.testing.assert_close(together, alone)


def test_activations_go_with_the_graph(layer):
    backend = Watched(layer.weights)
    out = run(backend, layer)
    assert backend.alive == len(backend.saved) > 0
    out.sum().backward()
    assert backend.alive == 0
    out = run(backend, layer)
    del out
    assert backend.alive == 0


def test_nothing_is_saved_where_nothing_asks_for_gradients(layer):
    backend = Watched(layer.weights)
    with torch.no_grad():
        run(backend, layer)
    run_experts(backend, layer.x.detach(), layer.ids, layer.routing)
    assert backend.needs == [Needs(x=False, weights=False, lora=False)] * 2 and not backend.saved
    run_experts(backend, layer.x, layer.ids, layer.routing)
    assert backend.needs[-1] == Needs(x=True, weights=False, lora=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_saves_nothing_and_changes_nothing(layer, reentrant):
    backend = Watched(layer.weights)
    run(backend, layer).square().sum().backward()
    plain = gradients(layer)
    backend.saved.clear()
    out = checkpoint(lambda x: run(backend, layer, x), layer.x, use_reentrant=reentrant)
    assert backend.alive == 0
    out.square().sum().backward()
    for found, expected in zip(gradients(layer), plain, strict=True):
        assert torch.equal(found, expected)
    assert backend.alive == 0


def test_a_failed_backward_pass_leaves_nothing_behind(layer):
    backend = Watched(layer.weights)
    run(backend, layer).square().sum().backward()
    right = gradients(layer)
    backend.fails = True
    with pytest.raises(RuntimeError, match="the kernel failed"):
        run(backend, layer).square().sum().backward()
    backend.fails = False
    assert backend.alive == 0 and layer.x.grad is None
    run(backend, layer).square().sum().backward()
    for found, expected in zip(gradients(layer), right, strict=True):
        assert torch.equal(found, expected)


def test_an_input_changed_before_the_backward_pass_is_noticed(layer):
    out = run(ReferenceBackend(layer.weights), layer)
    with torch.no_grad():
        layer.lora.down_b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_autocast_does_not_reach_the_backend(layer):
    layer.x = layer.x.detach().float().requires_grad_()
    backend = ReferenceBackend(layer.weights)
    run(backend, layer).square().sum().backward()
    plain = gradients(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(backend, layer).square().sum().backward()
    for found, expected in zip(gradients(layer), plain, strict=True):
        assert torch.equal(found, expected)
