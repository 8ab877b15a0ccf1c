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
