"""Risk: a LoRA on the experts of a layer that serves is computed otherwise than it would be in their
weights."""

from itertools import pairwise

import pytest
import torch
from api_support import nmse, random_call, random_experts, reference
from format_support import EXPERTS, METHODS, make_layer

from kt_kernel import KTMoEWrapper
from kt_kernel.adapters.attach import attach
from kt_kernel.adapters.backend import ExpertLora
from kt_kernel.calls.inputs import native_arguments
from kt_kernel.cpu_share import CpuShare
from kt_kernel.errors import CallOrderError, InputError

HIDDEN, INTERMEDIATE, RANK = 160, 96, 5
CASES = [
    *((method, "auto") for method in METHODS),
    *((method, "bf16") for method in ("RAWINT4", "NVFP4")),
]


def random_lora(seed: int = 3, rank: int = RANK) -> ExpertLora:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    e, r, h, i = EXPERTS, rank, HIDDEN, INTERMEDIATE
    a_of_gate, a_of_up, a_of_down = random(e, r, h), random(e, r, h), random(e, r, i)
    return ExpertLora(
        a_of_gate, random(e, i, r), a_of_up, random(e, i, r), a_of_down, random(e, h, r), scale=0.7
    )


def merged(experts, lora: ExpertLora) -> list[torch.Tensor]:
    """The same in float64 weights."""
    pairs = zip(experts, lora.tensors[::2], lora.tensors[1::2], strict=True)
    return [weight.double() + lora.scale * (b.double() @ a.double()) for weight, a, b in pairs]


def loaded(method: str = "BF16", lora: ExpertLora | None = None, **changes) -> KTMoEWrapper:
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE}
    layer = make_layer(method, **{**sizes, **changes})
    layer.load_weights_from_tensors(*random_experts(5, EXPERTS, HIDDEN, INTERMEDIATE))
    if lora is not None:
        attach(layer, lora)
    return layer


def call_of(tokens: int, dtype: torch.dtype = torch.bfloat16):
    return random_call(2, tokens, dtype, EXPERTS, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 33])
def test_is_what_merged_weights_compute(dtype, tokens):
    lora, experts = random_lora(), random_experts(5, EXPERTS, HIDDEN, INTERMEDIATE)
    hidden, ids, weights = call_of(tokens, torch.bfloat16)
    found = loaded(lora=lora).forward(hidden.to(dtype), ids, weights)
    expected = reference(merged(experts, lora), hidden, ids, weights)
    assert nmse(found, expected) <= 2e-5  # the output is bfloat16, too
    assert nmse(found, reference(experts, hidden, ids, weights)) > 0.1


@pytest.mark.parametrize(("method", "activations"), CASES)
def test_every_format_agrees_with_the_slow_twin(method, activations):
    layer = loaded(method, random_lora(), activations=activations)
    hidden, ids, weights = call_of(2)
    expected = torch.empty_like(hidden)
    layer.moe.forward_reference(*native_arguments(hidden, ids, weights, expected), 0)
    assert nmse(layer.forward(hidden, ids, weights), expected.double()) <= 5e-4


def test_the_slow_twin_is_what_merged_weights_compute():
    lora, experts = random_lora(), random_experts(5, EXPERTS, HIDDEN, INTERMEDIATE)
    hidden, ids, weights = call_of(3, torch.float32)
    found = torch.empty_like(hidden)
    layer = loaded(lora=lora)
    layer.moe.forward_reference(*native_arguments(hidden, ids, weights, found), 0)
    assert nmse(found, reference(merged(experts, lora), hidden, ids, weights)) <= 1e-12


@pytest.mark.parametrize("method", ["BF16", "RAWINT4"])
def test_a_token_does_not_depend_on_its_neighbours_or_on_threads(method):
    layer = loaded(method, random_lora())
    hidden, ids, weights = call_of(37)
    together = layer.forward(hidden, ids, weights)
    for token in (0, 17, 36):
        alone = layer.forward(*(tensor[token : token + 1].contiguous() for tensor in (hidden, ids, weights)))
        assert torch.equal(alone[0], together[token])
    other = loaded(method, random_lora(), cpuinfer_threads=3, threadpool_count=2)
    assert torch.equal(other.forward(hidden, ids, weights), together)


@pytest.mark.parametrize("method", ["BF16", "AMXINT8"])
def test_the_shares_of_ranks_add_up(method):
    call = call_of(9, torch.float32)
    parts = [
        loaded(method, random_lora(), share=CpuShare(begin, end, INTERMEDIATE))
        for begin, end in pairwise((0, 32, INTERMEDIATE))
    ]
    total = torch.stack([part.forward(*call) for part in parts]).sum(0)
    assert nmse(total, loaded(method, random_lora()).forward(*call).double()) <= 1e-5


def test_experts_of_the_device_are_skipped_with_their_lora():
    layer = loaded(lora=random_lora(), num_gpu_experts=EXPERTS - 1)
    hidden, ids, weights = call_of(5)
    assert not layer.forward(hidden, torch.zeros_like(ids), weights).any()
    assert layer.forward(hidden, torch.full_like(ids, EXPERTS - 1), weights).any()


def test_without_it_again_the_bits_are_those_of_the_base():
    layer, call = loaded(lora=random_lora(rank=8)), call_of(5)
    attach(layer, random_lora(4, rank=1))
    assert not torch.equal(layer.forward(*call), loaded().forward(*call))
    attach(layer, None)
    assert torch.equal(layer.forward(*call), loaded().forward(*call))


def test_what_does_not_fit_is_refused():
    with pytest.raises(CallOrderError, match="load_weights first"):
        attach(make_layer("BF16"), random_lora())
    lora = random_lora()
    wrong = ExpertLora(*lora.tensors[:5], lora.down_b[:, :-1], scale=1.0)
    with pytest.raises(InputError, match=r"expected\s+float32 \[6, 160, 5\]"):
        attach(loaded(), wrong)


def test_deferred_experts_have_it_too():
    """The next layer, which has none of the call's experts, adds what was deferred."""
    first, second = (
        loaded(lora=random_lora(), layer_idx=index, max_deferred_experts_per_token=2 - index)
        for index in range(2)
    )
    hidden, ids, weights = call_of(3, torch.float32)
    now = first.forward(hidden, ids, weights)
    later = second.forward(hidden, torch.full_like(ids, -1), weights)
    whole = loaded(lora=random_lora()).forward(hidden, ids, weights)
    assert later.any() and now.any()
    assert nmse(now + later, whole.double()) <= 1e-10
