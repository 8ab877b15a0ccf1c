"""The reference's gradients are right: against finite differences, and against torch's own autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_layers import Layer, Sizes, autograd_experts, random_layer

from kt_kernel.adapters.backend import Call, Dropout, ExpertLora, Needs
from kt_kernel.swiglu import Swiglu
from kt_kernel.training.function import run_experts
from kt_kernel.training.reference import ReferenceBackend

# Sizes are odd on purpose: no tile of any kernel divides them.
BASE = Sizes(tokens=5, top_k=2, experts=4, hidden=7, intermediate=5, rank=3)


def wanted(layer: Layer) -> list[torch.Tensor]:
    return [layer.x, layer.routing, *layer.lora.tensors]


def require_gradients(layer: Layer) -> Layer:
    for tensor in wanted(layer):
        tensor.requires_grad_()
    return layer


def check(
    layer: Layer, swiglu: Swiglu | None = None, dropout: Dropout | None = None, fast: bool = True
) -> None:
    """`fast`: along random directions instead of every element by itself."""
    backend = ReferenceBackend(layer.weights, swiglu)

    def experts(x, routing, *lora):
        return run_experts(backend, x, layer.ids, routing, ExpertLora(*lora, scale=layer.lora.scale), dropout)

    require_gradients(layer)
    assert torch.autograd.gradcheck(experts, wanted(layer), fast_mode=fast)


@pytest.mark.parametrize(
    "sizes",
    [
        replace(BASE, tokens=1),
        replace(BASE, top_k=1, rank=1),
        replace(BASE, top_k=4),
        replace(BASE, experts=9, top_k=8, tokens=3),
        replace(BASE, experts=16, tokens=2),  # most experts have no row
        replace(BASE, rank=8),
        replace(BASE, rank=64, tokens=2, experts=2),
        replace(BASE, experts=1, top_k=1),
    ],
    ids=lambda sizes: "-".join(map(str, vars(sizes).values())),
)
def test_gradients_are_those_of_finite_differences(sizes):
    check(random_layer(sizes))


@pytest.mark.parametrize(
    "ids",
    [
        [[2, 2], [2, 2], [2, 2], [2, 2], [2, 2]],  # all rows to one expert, twice in each token
        [[0, 0], [1, 0], [3, 3], [1, 1], [0, 3]],
        [[-1, 2], [-1, -1], [0, 4], [3, 100], [1, 2]],  # skipped: masked, and outside
    ],
)
def test_gradients_for_duplicate_and_skipped_ids(ids):
    layer = random_layer(BASE)
    layer.ids = torch.tensor(ids)
    check(layer)


@pytest.mark.parametrize("swiglu", [Swiglu(0.4), Swiglu(0.4, 1.702), Swiglu(0.0, 1.3)])
def test_gradients_with_clamped_activations(swiglu):
    check(random_layer(BASE, seed=1), swiglu)


def test_gradients_with_dropout():
    generator = torch.Generator().manual_seed(3)
    pairs = BASE.tokens * BASE.top_k
    masks = [torch.rand(pairs, n, generator=generator) > 0.3 for n in (7, 7, 5)]
    check(random_layer(BASE), dropout=Dropout(*masks, factor=1 / 0.7))


@pytest.mark.parametrize("swiglu", [None, Swiglu(0.4), Swiglu(0.4, 1.702)])
def test_reference_is_what_autograd_says(swiglu):
    layer = require_gradients(random_layer(replace(BASE, tokens=6), seed=2))
    dout = torch.randn(layer.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours = run_experts(ReferenceBackend(layer.weights, swiglu), layer.x, layer.ids, layer.routing, layer.lora)
    theirs = autograd_experts(layer, swiglu)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, wanted(layer), dout),
        torch.autograd.grad(theirs, wanted(layer), dout),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_a_value_at_the_limit_itself_has_its_gradient():
    """As torch.clamp: the limit is part of the range."""
    gate = torch.tensor([0.5, 0.5, 0.75], dtype=torch.float64, requires_grad=True)
    up = torch.tensor([0.5, -0.5, 0.75], dtype=torch.float64, requires_grad=True)
    clamped = torch.nn.functional.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)
    expected = torch.autograd.grad(clamped.sum(), (gate, up))
    found = Swiglu(0.5).backward(torch.ones(3, dtype=torch.float64), gate.detach(), up.detach())
    torch.testing.assert_close(found, expected)
    assert found[0][2] == 0 and found[1][2] == 0 and found[1][1] != 0


def test_gradients_of_the_base_are_those_of_autograd():
    layer = random_layer(BASE)
    matrices = (layer.weights.gate, layer.weights.up, layer.weights.down)
    for matrix in matrices:
        matrix.requires_grad_()
    dout = torch.randn_like(layer.x)
    expected = torch.autograd.grad(autograd_experts(layer), matrices, dout)
    call, needs = Call(layer.x, layer.ids, layer.routing, layer.lora), Needs(False, False, False, base=True)
    with torch.no_grad():
        backend = ReferenceBackend(layer.weights)
        found = backend.backward(call, backend.forward(call, needs)[1], dout, needs)
    torch.testing.assert_close(found.base, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_agree_with_float64(dtype):
    exact = require_gradients(random_layer(replace(BASE, tokens=9, hidden=32, intermediate=24)))
    narrow = random_layer(replace(BASE, tokens=9, hidden=32, intermediate=24))
    narrow.x = narrow.x.to(dtype)
    narrow.routing = narrow.routing.float()
    narrow.lora = ExpertLora(*(t.float() for t in narrow.lora.tensors), scale=narrow.lora.scale)
    require_gradients(narrow)
    grads = []
    for layer in (exact, narrow):
        out = run_experts(ReferenceBackend(layer.weights), layer.x, layer.ids, layer.routing, layer.lora)
        assert out.dtype is layer.x.dtype
        grads.append(torch.autograd.grad(out.double().square().sum(), wanted(layer)))
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    for mine, right, tensor in zip(grads[1], grads[0], wanted(narrow), strict=True):
        assert mine.dtype is tensor.dtype
        assert (mine.double() - right).norm() <= limit * right.norm()


def test_each_element_of_each_gradient():
    check(random_layer(replace(BASE, tokens=3, experts=2, top_k=2, rank=2)), fast=False)
