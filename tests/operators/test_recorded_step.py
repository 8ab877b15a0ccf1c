"""A recorded step must do what its Python does, with the inputs of now; and say no where it could not."""

from __future__ import annotations

import pytest
import torch

from kt_kernel import operators
from kt_kernel.engine import get_engine
from kt_kernel.operators import recorded_step
from kt_kernel.operators.recorded_step import RecordedStep, record

TOKENS, WIDTH = 3, 64


class Model:
    """Two of our linear layers with operators of torch around and between them; inputs in fixed memory."""

    def __init__(self) -> None:
        operators.install(get_engine(2))
        torch.manual_seed(20261130)
        self.weights = [torch.randn(WIDTH, WIDTH).to(torch.bfloat16) for _ in range(2)]
        self.packed = [torch.ops.sgl_kernel.convert_weight_packed(weight) for weight in self.weights]
        self.input = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16)

    def linear(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        return torch.ops.sgl_kernel.weight_packed_linear(x, self.packed[layer], None, True)

    def step(self) -> dict[str, torch.Tensor]:
        hidden = self.linear(self.input, 0)
        left, right = hidden.chunk(2, dim=-1)  # views
        mixed = torch.cat((right, left), dim=-1)
        mixed.mul_(0.125)
        return {"sum": self.linear(mixed, 1) + self.input, "view": mixed[1:]}

    def fill(self, seed: int) -> None:
        self.input.copy_(torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def model() -> Model:
    return Model()


def recorded(function) -> RecordedStep:
    _, step = record(function)
    assert isinstance(step, RecordedStep), step
    return step


def test_replays_compute_with_the_inputs_of_now(model):
    model.fill(0)
    step = recorded(model.step)
    for seed in (1, 2, 1):
        model.fill(seed)
        expected = model.step()
        replayed = step.replay()
        assert all(torch.equal(replayed[name], expected[name]) for name in expected)
        assert replayed["sum"].abs().sum() > 0


def test_recording_changes_no_result(model):
    model.fill(3)
    output, _ = record(model.step)
    expected = model.step()
    assert all(torch.equal(output[name], expected[name]) for name in expected)


def test_native_calls_side_by_side_need_no_python(model):
    step = recorded(lambda: model.linear(model.linear(model.input, 0), 1))
    assert step.calls_from_python == 0
    assert recorded(model.step).calls_from_python == 3  # cat, mul_, add


def test_the_memory_of_a_recording_outlives_its_tensors(model):
    model.fill(4)
    step = recorded(lambda: model.linear(model.linear(model.input, 0), 1))
    scribbles = [torch.full((TOKENS, WIDTH), 7.0, dtype=torch.bfloat16) for _ in range(200)]
    expected = model.linear(model.linear(model.input, 0), 1)
    assert torch.equal(step.replay(), expected)
    assert all((scribble == 7).all() for scribble in scribbles)


def test_the_same_step_has_the_same_signature(model):
    first, second = recorded(model.step), recorded(model.step)
    assert first.signature == second.signature


def test_memory_made_for_each_step_outside_is_noticed(model):
    def step() -> torch.Tensor:
        return model.linear(outside, 0)

    outside = model.input.clone()
    first = recorded(step)
    outside = model.input.clone()
    assert first.signature != recorded(step).signature


def test_a_number_that_changes_is_noticed(model):
    steps = [recorded(lambda factor=factor: model.linear(model.input, 0) * factor) for factor in (2.0, 3.0)]
    assert steps[0].signature != steps[1].signature


@pytest.mark.parametrize(
    "function",
    [lambda m: m.input.sum().item(), lambda m: m.input.nonzero(), lambda m: torch.rand(3)],
    ids=["item", "nonzero", "random"],
)
def test_what_depends_on_data_or_chance_is_refused(model, function):
    _, step = record(lambda: function(model))
    assert isinstance(step, str) and "depend" in step


def test_code_that_torch_does_not_see_can_refuse(model):
    def step() -> torch.Tensor:
        recorded_step.refuse("a call past torch")
        return model.input

    assert record(step)[1] == "a call past torch"
    recorded_step.refuse("outside of a recording")  # nothing happens
    recorded(model.step)


def test_an_error_leaves_no_recording_open(model):
    def step() -> None:
        model.linear(model.input, 0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record(step)
    recorded(model.step)
