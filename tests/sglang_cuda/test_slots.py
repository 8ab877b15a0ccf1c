"""Slots that are filled while serving hold what SGLang's own loading makes of the same experts."""

from __future__ import annotations

import pytest

# By compute capability; slot_checkpoints.py says what they are.
CASES = {"9.0": 14, "10.0": 1}


@pytest.mark.parametrize("capability", sorted(CASES))
def test_filled_slots_are_loaded_ones_bit_by_bit(on_cuda, capability: str):
    printed = on_cuda("inside_slots", "check_slots", capability, timeout=300)
    names = {line.partition(", rank ")[0] for line in printed.splitlines() if line.startswith("compared: ")}
    assert len(names) == CASES[capability], names


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_slots_are_native_only_where_the_trial_on_the_device_is_right(on_cuda, capability: str):
    assert on_cuda("inside_slot_choice", "check_choice", capability, timeout=300).endswith("chosen\n")


def test_the_doctor_brings_every_format_to_its_kernels(on_cuda):
    assert on_cuda("inside_format_checks", "check_formats", "9.0", timeout=300).endswith("reached\n")
