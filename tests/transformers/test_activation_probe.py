"""Risk: experts whose activation is another one than the kernels' are computed all the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kt_kernel.integrations.transformers.activations import swiglu_of
from kt_kernel.swiglu import Swiglu

LIMIT = 7.0


def _module(gate_limit: float, up_limit: float, **attributes: float) -> SimpleNamespace:
    """silu(gate) * up, of values clamped by limits that no attribute need tell."""

    def apply(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=1)
        gate, up = gate.clamp(max=gate_limit), up.clamp(-up_limit, up_limit)
        return torch.nn.functional.silu(gate) * up

    return SimpleNamespace(_apply_gate=apply, **attributes)


def test_what_is_not_clamped_is_the_plain_one():
    assert swiglu_of(_module(float("inf"), float("inf"))) == Swiglu()


@pytest.mark.parametrize(("gate", "up"), [(LIMIT, float("inf")), (float("inf"), LIMIT), (LIMIT, LIMIT)])
def test_a_clamp_that_no_attribute_tells_is_seen(gate, up):
    assert swiglu_of(_module(gate, up)) is None


@pytest.mark.parametrize(("gate", "up"), [(LIMIT, float("inf")), (float("inf"), LIMIT)])
def test_half_a_clamp_is_not_the_whole(gate, up):
    assert swiglu_of(_module(gate, up, limit=LIMIT)) is None


def test_a_clamp_of_what_is_far_below_zero_is_seen():
    def apply(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up.clamp(min=-LIMIT)

    assert swiglu_of(SimpleNamespace(_apply_gate=apply)) is None
