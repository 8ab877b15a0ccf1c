"""Risk: one of the ways to compute the device's experts leaves out a token, or differs from the CPU's."""

from __future__ import annotations

import pytest
import torch
from api_support import TOP_K, loaded_wrapper, nmse, random_call, random_experts, reference

from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

EXPERTS, HIDDEN, INTERMEDIATE = 8, 72, 40
WAYS = ("_add_gathered", "_add_every_slot", "_add_grouped")


def _filled(dtype: torch.dtype, **changes) -> tuple[TorchDeviceExperts, tuple[torch.Tensor, ...]]:
    experts = random_experts(1, EXPERTS, HIDDEN, INTERMEDIATE)
    room = TorchDeviceExperts(EXPERTS, HIDDEN, INTERMEDIATE, dtype, "cpu", **changes)
    room.w13.copy_(torch.cat(experts[:2], dim=1))
    room.w2.copy_(experts[2])
    return room, experts


def _only(way: str, room: TorchDeviceExperts, *call: torch.Tensor) -> torch.Tensor:
    output = torch.zeros(call[0].shape)
    getattr(room, way)(output, call[0].to(room.w13.dtype), *call[1:])
    return output


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_every_way_gives_the_sum_of_the_experts(way, tokens, ids_dtype):
    room, experts = _filled(torch.float32)
    hidden, ids, weights = random_call(tokens, tokens, torch.float32)
    hidden = hidden.bfloat16().float()  # what the reference rounds to
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = -1
    output = _only(way, room, hidden, ids.to(ids_dtype), weights)
    assert nmse(output, reference(experts, hidden, ids, weights)) < 1e-10


@pytest.mark.parametrize("way", WAYS)
def test_no_slot_at_all_gives_zero_whatever_the_weights_are(way):
    room, _ = _filled(torch.float32)
    hidden, ids, weights = random_call(1, 5, torch.float32)
    room.w2.fill_(float("nan"))
    assert not _only(way, room, hidden, torch.full_like(ids, -1), weights).any()


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_stays_in_its_token(way):
    room, _ = _filled(torch.float32)
    hidden, ids, weights = random_call(1, 6, torch.float32)
    hidden[3, 5] = float("nan")
    undefined = _only(way, room, hidden, ids, weights).isnan().any(dim=1)
    assert undefined.tolist() == [row == 3 for row in range(6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_is_like_the_hidden_states(dtype):
    room, experts = _filled(torch.bfloat16)
    hidden, ids, weights = random_call(1, 4, dtype)
    before = hidden.clone(), ids.clone(), weights.clone()
    output = room.compute(hidden, ids, weights)
    assert output.dtype is dtype and output.shape == hidden.shape
    assert nmse(output, reference(experts, hidden, ids, weights)) < 1e-4
    assert all(torch.equal(now, then) for now, then in zip((hidden, ids, weights), before, strict=True))


def test_no_tokens_and_no_slots():
    room, _ = _filled(torch.float32)
    hidden, ids, weights = random_call(1, 0)
    assert room.compute(hidden, ids, weights).shape == (0, HIDDEN)
    nothing = TorchDeviceExperts(0, HIDDEN, INTERMEDIATE, torch.float32, "cpu")
    hidden, ids, weights = random_call(1, 3)
    assert not nothing.compute(hidden, torch.full_like(ids, -1), weights).any()


@pytest.mark.parametrize(("limit", "alpha"), [(0.0, 0.0), (0.4, 0.0), (0.4, 1.7), (0.0, 1.7)])
def test_gates_are_those_of_the_cpu(limit, alpha):
    room, experts = _filled(torch.float32, swiglu_limit=limit, swiglu_alpha=alpha)
    wrapper = loaded_wrapper(experts, swiglu_limit=limit, swiglu_alpha=alpha)
    call = random_call(2, 9)
    assert nmse(room.compute(*call).float(), wrapper.forward(*call).double()) < 3e-5


def test_copied_slots_are_equal():
    source, _ = _filled(torch.float32)
    target = TorchDeviceExperts(2, HIDDEN, INTERMEDIATE, torch.float32, "cpu")
    target.copy_slot(1, source, 5)
    assert torch.equal(target.w13[1], source.w13[5]) and torch.equal(target.w2[1], source.w2[5])
    assert not target.w13[0].any()


def test_bytes_of_a_slot():
    room, _ = _filled(torch.bfloat16)
    assert room.bytes_per_expert * EXPERTS == 2 * (room.w13.numel() + room.w2.numel())
    assert room.capacity == EXPERTS and TOP_K <= EXPERTS
