"""Risk: the kernels are called with another meaning, memory or lifetime than autograd's.

What they compute is tests/kernels/test_training.py's; here it is compared once with the reference in torch.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_layers import Layer, Sizes, random_layer

from kt_kernel.adapters.backend import Call, Dropout, ExpertLora, Needs
from kt_kernel.adapters.kernel_backend import KernelBackend
from kt_kernel.errors import CallOrderError, InputError
from kt_kernel.moe import KTMoEWrapper
from kt_kernel.training.function import run_experts
from kt_kernel.training.reference import ReferenceBackend, StackedWeights

SIZES = Sizes(tokens=40, top_k=2, experts=4, hidden=96, intermediate=70, rank=3)
ALL = Needs(x=True, weights=True, lora=True)


def empty_layer(**options) -> KTMoEWrapper:
    return KTMoEWrapper(
        0,
        SIZES.experts,
        SIZES.top_k,
        SIZES.hidden,
        SIZES.intermediate,
        cpuinfer_threads=2,
        threadpool_count=1,
        chunked_prefill_size=64,
        method="BF16",
        **options,
    )


def loaded(layer: Layer, **options) -> KTMoEWrapper:
    wrapper = empty_layer(**options)
    weights = layer.weights
    wrapper.load_weights_from_tensors(weights.gate, weights.up, weights.down)
    return wrapper


@pytest.fixture(scope="module")
def layer() -> Layer:
    layer = random_layer(SIZES, torch.bfloat16)
    layer.lora = ExpertLora(*(t.float() for t in layer.lora.tensors), scale=layer.lora.scale)
    layer.routing = layer.routing.float()
    return layer


@pytest.fixture(scope="module")
def backend(layer) -> KernelBackend:
    return KernelBackend(loaded(layer))


def call_of(layer: Layer) -> Call:
    return Call(layer.x, layer.ids, layer.routing, layer.lora)


def errors(found, expected) -> list[float]:
    return [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(found, expected, strict=True)
    ]


def inputs_of(layer: Layer) -> list[torch.Tensor]:
    return [t.clone().requires_grad_() for t in (layer.x, layer.routing, *layer.lora.tensors)]


def gradients(
    backend, layer: Layer, inputs: list[torch.Tensor], dout: torch.Tensor, dropout: Dropout | None = None
) -> list[torch.Tensor]:
    x, routing, *lora = inputs
    out = run_experts(backend, x, layer.ids, routing, ExpertLora(*lora, scale=layer.lora.scale), dropout)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def reference_of(layer: Layer) -> ReferenceBackend:
    weights = layer.weights
    return ReferenceBackend(StackedWeights(weights.gate.float(), weights.up.float(), weights.down.float()))


def random_dropout() -> Dropout:
    """A different mask for every pair and matrix, of which two thirds are kept."""
    generator = torch.Generator().manual_seed(2)
    widths = (SIZES.hidden, SIZES.hidden, SIZES.intermediate)
    masks = [torch.rand(SIZES.tokens * SIZES.top_k, width, generator=generator) < 2 / 3 for width in widths]
    return Dropout(*masks, factor=1.5)


@pytest.mark.parametrize("dropout", (None, random_dropout()), ids=("", "dropout"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_equals_the_reference_through_autograd(layer, backend, dtype, dropout):
    layer = replace(layer, x=layer.x.to(dtype))
    dout = torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = gradients(backend, layer, inputs_of(layer), dout, dropout)
    expected = gradients(reference_of(layer), layer, inputs_of(layer), dout, dropout)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert max(errors(found, expected)) <= 0.01


def test_gradients_of_the_base_equal_those_of_the_reference(layer, backend):
    call, needs = call_of(layer), Needs(x=False, weights=False, lora=False, base=True)
    dout = torch.ones_like(layer.x)
    found, expected = (
        b.backward(call, b.forward(call, needs)[1], dout, needs) for b in (backend, reference_of(layer))
    )
    assert found.x is None and found.lora is None
    assert max(errors(found.base, expected.base)) <= 0.01


def test_calls_that_live_at_once_keep_their_own_numbers(layer, backend):
    other = random_layer(SIZES, torch.bfloat16, seed=5)
    dout = torch.ones_like(layer.x)
    first, second = call_of(layer), replace(call_of(layer), x=other.x, ids=other.ids)
    alone = [backend.backward(c, backend.forward(c, ALL)[1], dout, ALL) for c in (first, second)]
    saved = [backend.forward(c, ALL)[1] for c in (first, second)]
    for call, kept, expected in reversed(list(zip((first, second), saved, alone, strict=True))):
        found = backend.backward(call, kept, dout, ALL)
        for a, b in zip(
            (found.x, found.weights, *found.lora), (expected.x, expected.weights, *expected.lora), strict=True
        ):
            assert torch.equal(a, b)


def test_views_and_ids_of_no_expert_are_understood(layer, backend):
    ids = layer.ids.clone()
    ids[::3, 0] = SIZES.experts  # as transformers marks experts of other ranks
    plain = replace(call_of(layer), ids=ids.masked_fill(ids == SIZES.experts, -1))
    x = torch.cat([torch.zeros(1, dtype=layer.x.dtype), layer.x.flatten()])[1:].view_as(layer.x)
    strange = replace(plain, x=x, ids=ids, weights=layer.routing.T.contiguous().T)
    outputs = [backend.forward(call, ALL)[0] for call in (plain, strange)]
    assert torch.equal(*outputs)


def test_a_rank_whose_tokens_all_went_elsewhere_has_gradients_of_zero(layer, backend):
    call = replace(call_of(layer), ids=torch.full_like(layer.ids, -1))
    output, saved = backend.forward(call, ALL)
    assert not output.any()
    found = backend.backward(call, saved, torch.ones_like(layer.x), ALL)
    assert not any(gradient.any() for gradient in (found.x, found.weights, *found.lora))


def test_nothing_is_saved_for_nothing(layer, backend):
    output, saved = backend.forward(call_of(layer), Needs(x=False, weights=False, lora=False))
    assert saved == ()
    assert torch.equal(output, backend.forward(call_of(layer), ALL)[0])


def test_saved_memory_is_what_the_page_says(layer, backend):
    _, (gate, up, projected) = backend.forward(call_of(layer), ALL)
    pairs = SIZES.tokens * SIZES.top_k
    assert gate.shape == up.shape == (pairs, 96) and gate.dtype is torch.bfloat16
    assert projected.shape == (3, pairs, SIZES.rank)


def test_clamping_layers_save_float32(layer):
    clamping = KernelBackend(loaded(layer, swiglu_limit=1.0))
    _, (gate, _, _) = clamping.forward(call_of(layer), ALL)
    assert gate.dtype is torch.float32


def test_wrong_calls_are_sentences(layer, backend):
    call = call_of(layer)
    mask = torch.ones(SIZES.tokens * SIZES.top_k, SIZES.hidden, dtype=torch.bool)
    wrong = {
        r"\[T, 96\]": replace(call, x=call.x[:, :8]),
        "torch.float16, expected bfloat16": replace(call, x=call.x.half()),
        "weights are torch.bfloat16": replace(call, weights=call.weights.bfloat16()),
        r"expected \[40, k\] both": replace(call, ids=call.ids[:8]),
        "a LoRA tensor is": replace(call, lora=replace(call.lora, up_b=call.lora.up_b.double())),
        "at most 64 per call": Call(*(torch.cat([t, t]) for t in (call.x, call.ids, call.weights))),
    }
    for sentence, bad in wrong.items():
        with pytest.raises(InputError, match=sentence):
            backend.forward(bad, ALL)
    with pytest.raises(InputError, match=r"a mask of dropout is .*\[80, 70\]"):
        backend.forward(replace(call, dropout=Dropout(mask, mask, mask, 2.0)), ALL)
    with pytest.raises(InputError, match="the output's gradient"):
        backend.backward(call, backend.forward(call, ALL)[1], call.x.float(), ALL)
    with pytest.raises(CallOrderError, match="call load_weights first"):
        KernelBackend(empty_layer())
