"""Risk: code written against the published layer interface gets other numbers, or silently those of another
call."""

from __future__ import annotations

import pytest
import torch
from training_layers import Layer, Sizes, random_layer

from kt_kernel import KTMoEWrapper
from kt_kernel.adapters.backend import Call, ExpertLora, Needs
from kt_kernel.errors import CallOrderError, ConfigurationError, FeatureUnavailableError, InputError
from kt_kernel.training.reference import ReferenceBackend, StackedWeights
from kt_kernel.training.weights import PackedWeights

SIZES = Sizes(tokens=12, top_k=2, experts=4, hidden=96, intermediate=70, rank=3)
SCALE = 2.0  # alpha / rank
ALL = Needs(x=True, weights=True, lora=True)


def made(depth: int = 1, **options) -> KTMoEWrapper:
    settings = {"method": "AMXBF16_SFT", "lora_rank": SIZES.rank, "lora_alpha": SCALE * SIZES.rank, **options}
    return KTMoEWrapper(
        0,
        SIZES.experts,
        SIZES.top_k,
        SIZES.hidden,
        SIZES.intermediate,
        cpuinfer_threads=2,
        threadpool_count=1,
        chunked_prefill_size=64,
        mode="sft",
        max_cache_depth=depth,
        **settings,
    )


@pytest.fixture
def case() -> Layer:
    layer = random_layer(SIZES, torch.bfloat16)
    layer.lora = ExpertLora(*(t.float() for t in layer.lora.tensors), scale=SCALE)
    layer.routing = layer.routing.float()
    return layer


def loaded(case: Layer, lora=None, **options):
    """(the layer, its six gradients)"""
    layer = made(**options)
    layer.load_weights_from_tensors(case.weights.gate, case.weights.up, case.weights.down)
    tensors = case.lora.tensors if lora is None else lora
    gradients = [torch.zeros_like(t) for t in tensors]
    layer.init_lora_weights(*tensors, *gradients)
    return layer, gradients


def expected(case: Layer, x: torch.Tensor, dout: torch.Tensor, lora: ExpertLora | None = None, weights=None):
    """`weights`: other than those of the case."""
    own = StackedWeights(case.weights.gate.float(), case.weights.up.float(), case.weights.down.float())
    reference = ReferenceBackend(weights or own)
    call = Call(x.float(), case.ids, case.routing, lora or case.lora)
    out, kept = reference.forward(call, ALL)
    found = reference.backward(call, kept, dout.float(), ALL)
    return out, found.x, found.weights, *found.lora


def close(found, wanted, tolerance: float = 0.01) -> bool:
    return all(
        float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())
        for a, b in zip(found, wanted, strict=True)
    )


def random_rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZES.tokens, SIZES.hidden, generator=generator).bfloat16()


def test_equals_the_reference(case):
    layer, gradients = loaded(case)
    dout = random_rows(1)
    out = layer.forward(case.x, case.ids, case.routing)
    dx, dweights = layer.backward(dout)
    assert (out.dtype, dx.dtype, dweights.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert close((out, dx, dweights, *gradients), expected(case, case.x, dout))


def test_gradients_add_up_and_are_scaled_until_they_are_released(case):
    layer, gradients = loaded(case)
    wanted = expected(case, case.x, random_rows(1))[3:]
    for scale in (1.0, 0.5):
        layer.forward(case.x, case.ids, case.routing)
        layer.backward(random_rows(1), optimizer_grad_scale=scale)
    assert close(gradients, [1.5 * t for t in wanted])
    layer.release_authoritative_optimizer_grads()
    assert not any(t.any() for t in gradients)


def test_two_forward_passes_before_backward_keep_their_own_numbers(case):
    layer, _ = loaded(case, depth=2)
    inputs, douts = (random_rows(2), random_rows(3)), (random_rows(4), random_rows(5))
    kept = []
    for x in inputs:
        layer.forward(x, case.ids, case.routing)
        kept.append(layer.last_saved)
    with pytest.raises(CallOrderError, match="say which with saved="):
        layer.backward(douts[0])
    found = [layer.backward(dout, saved=saved) for dout, saved in zip(douts, kept, strict=True)]
    for x, dout, gradients_of_inputs in zip(inputs, douts, found, strict=True):
        assert close(gradients_of_inputs, expected(case, x, dout)[1:3])
    with pytest.raises(CallOrderError, match="had its backward pass"):
        layer.backward(douts[0], saved=kept[0])


def test_a_forgotten_forward_pass_is_not_taken_for_a_later_one(case):
    layer, _ = loaded(case)
    layer.forward(random_rows(2), case.ids, case.routing)
    first = layer.last_saved
    layer.forward(random_rows(3), case.ids, case.routing)
    with pytest.raises(CallOrderError, match="2 forward passes"):
        layer.backward(random_rows(4))
    with pytest.raises(CallOrderError, match="max_cache_depth"):
        layer.backward(random_rows(4), saved=first)
    layer.discard_saved()
    with pytest.raises(CallOrderError, match="no forward pass waits"):
        layer.backward(random_rows(4))


def test_what_changes_before_backward_does_not_change_the_gradients(case):
    """A step of a fused optimiser writes parameters without moving their version counters."""
    wanted = expected(case, case.x, random_rows(1))[1:]
    tensors = [torch.nn.Parameter(t.clone()) for t in case.lora.tensors]
    layer, gradients = loaded(case, tensors)
    x = case.x.clone()
    layer.forward(x, case.ids, case.routing)
    x.zero_()
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    torch.optim.AdamW(tensors, lr=1.0, fused=True).step()
    assert not torch.equal(tensors[0], case.lora.gate_a)
    assert close((*layer.backward(random_rows(1)), *gradients), wanted)


def test_other_weights_or_another_lora_forget_what_waits(case):
    layer, gradients = loaded(case)
    for change in (
        lambda: layer.load_weights_from_tensors(case.weights.gate, case.weights.up, case.weights.down),
        lambda: layer.init_lora_weights(*case.lora.tensors, *gradients),
    ):
        layer.forward(case.x, case.ids, case.routing)
        change()
        with pytest.raises(CallOrderError, match="no forward pass waits"):
            layer.backward(random_rows(1))


def test_a_step_of_an_optimiser_is_seen_without_being_told(case):
    tensors = [torch.nn.Parameter(t.bfloat16()) for t in case.lora.tensors]
    layer, _ = loaded(case, tensors)
    layer.forward(case.x, case.ids, case.routing, save_for_backward=False)
    for tensor in tensors:
        tensor.data.mul_(3)
    found = layer.forward(case.x, case.ids, case.routing, save_for_backward=False)
    lora = ExpertLora.of([t.detach().float() for t in tensors], SCALE)
    assert close([found], expected(case, case.x, random_rows(1), lora)[:1])
    assert layer.last_saved is None


def test_halves_and_evaluation(case):
    layer, _ = loaded(case, lora_dropout=0.5)
    layer.submit_forward(case.x, case.ids, case.routing)
    with pytest.raises(CallOrderError, match="on its way"):
        layer.submit_forward(case.x, case.ids, case.routing)
    with pytest.raises(CallOrderError, match="a call of forward is on its way, expected one of backward"):
        layer.sync_backward()
    dropped = layer.sync_forward()
    layer.submit_backward_async(random_rows(1))
    layer.sync_backward()
    layer.eval().submit_forward_inference(case.x, case.ids, case.routing)
    wanted = expected(case, case.x, random_rows(1))[:1]
    assert close([layer.sync_forward_inference()], wanted)
    assert not close([dropped], wanted)


def test_methods_without_a_trained_lora_and_of_other_formats(case):
    layer, gradients = loaded(case, method="INT8_SFT_SkipLoRA")
    assert layer.wrapper.method == "AMXINT8"
    layer.forward(case.x, case.ids, case.routing)
    dx, dweights = layer.backward(random_rows(1))
    assert not any(t.any() for t in gradients)
    decoded = PackedWeights(layer.wrapper)
    assert close((dx, dweights), expected(case, case.x, random_rows(1), weights=decoded)[1:3])


def test_what_cannot_be_is_refused(case):
    with pytest.raises(FeatureUnavailableError, match="on the device"):
        made(num_gpu_experts=1)
    with pytest.raises(FeatureUnavailableError, match="full_weight_grad"):
        made(full_weight_grad=True)
    with pytest.raises(FeatureUnavailableError, match="deferred"):
        made(max_deferred_experts_per_token=1)
    with pytest.raises(FeatureUnavailableError, match="call load_weights"):
        made().load_mxfp4_weights()
    with pytest.raises(ConfigurationError, match="lora_rank is 0"):
        made(lora_rank=0)
    with pytest.raises(CallOrderError, match="load_weights first"):
        made().forward(case.x, case.ids, case.routing)
    with pytest.raises(InputError, match="grad_up_lora_b is"):
        tensors = list(case.lora.tensors)
        made().init_lora_weights(*tensors, *tensors[:3], tensors[0], *tensors[4:])
