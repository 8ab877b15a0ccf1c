"""A device's own slots are used only if they compute what decoded ones do."""

from __future__ import annotations

import logging

import pytest
import torch

from kt_kernel.formats.decoding import decode_expert
from kt_kernel.formats.expert_image import ExpertEncoding
from kt_kernel.hybrid.slot_check import SLOTS, difference, sample_expert, sample_tokens
from kt_kernel.hybrid.torch_experts import TorchDeviceExperts

HIDDEN, INTERMEDIATE = 512, 384
ENCODINGS = {
    "BF16": ExpertEncoding("BF16", 1, HIDDEN, INTERMEDIATE),
    "FP8": ExpertEncoding("FP8", 1, HIDDEN, INTERMEDIATE),
    "FP8_PERCHANNEL": ExpertEncoding("FP8_PERCHANNEL", 1, HIDDEN, INTERMEDIATE),
    "MXFP8": ExpertEncoding("MXFP8", 1, HIDDEN, INTERMEDIATE),
    "MXFP4": ExpertEncoding("MXFP4", 1, HIDDEN, INTERMEDIATE),
    "NVFP4": ExpertEncoding("NVFP4", 1, HIDDEN, INTERMEDIATE),
    "RAWINT4": ExpertEncoding("RAWINT4", 1, HIDDEN, INTERMEDIATE, 32, torch.bfloat16),
    "RAWINT4, whole rows": ExpertEncoding("RAWINT4", 1, HIDDEN, INTERMEDIATE, 0, torch.float16),
    "GPTQ_INT4": ExpertEncoding("GPTQ_INT4", 1, HIDDEN, INTERMEDIATE, 64, torch.float16),
}


class Misplacing(TorchDeviceExperts):
    """Stores an expert after `change` has been at its tensors."""

    def __init__(self, encoding, change):
        super().__init__(SLOTS, HIDDEN, INTERMEDIATE, torch.bfloat16, "cpu", encoding)
        self._change = change

    def store(self, slot, tensors):
        slot, tensors = self._change(slot, tensors)
        return super().store(slot, tensors)


def slots_of(encoding, change=lambda slot, tensors: (slot, tensors)):
    return Misplacing(encoding, change)


def reversed_part(field):
    def change(slot, tensors):
        octets = getattr(tensors, field).contiguous().reshape(-1)
        raw = octets.view(torch.uint8).view(-1, octets.element_size()).flip(0).reshape(-1)
        part = raw.view(octets.dtype).view(getattr(tensors, field).shape)
        return slot, tensors._replace(**{field: part})

    return change


@pytest.fixture
def tokens():
    return sample_tokens(HIDDEN, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("name", ENCODINGS)
def test_made_up_experts_keep_the_length_of_their_tokens(name):
    encoding = ENCODINGS[name]
    for part, spec in zip(
        sample_expert(encoding, 0), (encoding.w13_weight, encoding.w13_scale), strict=False
    ):
        assert part is None or (part.shape, part.dtype) == (spec.shape, spec.dtype)
    w13, w2 = decode_expert(sample_expert(encoding, 0), encoding, torch.float32)
    for matrix in (w13, w2):
        assert matrix.isfinite().all()
        assert 0.3 < float(matrix.square().sum(1).mean()) < 4


@pytest.mark.parametrize("name", ENCODINGS)
def test_equal_slots_do_not_differ_and_misplaced_parts_do(name, tokens):
    encoding = ENCODINGS[name]
    assert difference(slots_of(encoding), slots_of(encoding), encoding, tokens) == 0
    fields = [field for field, part in sample_expert(encoding, 0)._asdict().items() if part is not None]
    for field in fields:
        if field != "global_scales":
            wrong = slots_of(encoding, reversed_part(field))
            assert difference(wrong, slots_of(encoding), encoding, tokens) > 0.03, field


def test_an_expert_in_the_wrong_slot_is_seen(tokens):
    encoding = ENCODINGS["FP8"]
    swapped = slots_of(encoding, lambda slot, tensors: (1 - slot, tensors))
    assert difference(swapped, slots_of(encoding), encoding, tokens) > 0.1


def test_results_that_are_no_numbers_differ_without_end(tokens):
    encoding = ENCODINGS["BF16"]
    broken = slots_of(
        encoding, lambda slot, tensors: (slot, tensors._replace(w2_weight=tensors.w2_weight * torch.nan))
    )
    assert difference(broken, slots_of(encoding), encoding, tokens) == float("inf")


def trial(name):
    from kt_kernel.integrations.sglang.device_check import Trial

    return Trial(name, ENCODINGS["RAWINT4"], torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_native_format_that_fails_is_given_up_with_one_warning(caplog, fault):
    from kt_kernel.integrations.sglang.device_check import is_right

    encoding = ENCODINGS["RAWINT4"]

    def native(count):
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        return slots_of(encoding, reversed_part("w13_scale"))

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not is_right(trial(f"one that {fault}"), native, lambda count: slots_of(encoding))
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert ("no kernel image is available" if fault == "raises" else "NMSE of") in said


def test_a_native_format_that_is_right_is_used_and_tried_once(caplog):
    from kt_kernel.integrations.sglang.device_check import is_right

    encoding, made = ENCODINGS["RAWINT4"], []

    def native(count):
        made.append(count)
        return slots_of(encoding)

    for _ in range(3):
        assert is_right(trial("a right one"), native, lambda count: slots_of(encoding))
    assert made == [SLOTS] and not caplog.records


def test_where_there_is_no_native_format_nothing_is_said(caplog):
    from kt_kernel.integrations.sglang.device_check import is_right

    encoding = ENCODINGS["RAWINT4"]
    assert not is_right(trial("none"), lambda count: None, lambda count: slots_of(encoding))
    assert not caplog.records
