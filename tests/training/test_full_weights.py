"""Experts that are trained whole do what the same parameters do in transformers, saved and resumed too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from training_layers import Sizes, autograd_experts, random_layer
from training_runs import adamw, batches, lora, train
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import kt_kernel.training as training
from kt_kernel.errors import CallOrderError, ConfigurationError, FeatureUnavailableError
from kt_kernel.training.full import FullExperts
from kt_kernel.training.function import Matrices, run_experts
from kt_kernel.training.reference import ReferenceBackend, StackedWeights


def whole(path: Path, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """A model of ours with every parameter trained."""
    options = {"experts": "bf16", "train_experts": "full", **options}
    return training.load(AutoModelForCausalLM, path, dtype=dtype, threads=2, **options).train()


def dense(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).train()


def experts_of(model: nn.Module) -> list[FullExperts]:
    return [module for module in model.modules() if isinstance(module, FullExperts)]


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    theirs = dict(other.named_parameters())
    assert len(theirs) == len(list(one.parameters()))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize(
    ("family", "dtype", "backend", "most"),
    [
        ("qwen3_moe", torch.float32, "reference", 1e-3),
        ("deepseek_v3", torch.float32, "reference", 1e-3),
        ("mixtral", torch.float32, "kernels", 2e-2),
        ("qwen3_moe", torch.bfloat16, "kernels", 2e-2),
    ],
)
def test_losses_are_those_of_dense_transformers(tiny, family, dtype, backend, most):
    models = (whole(tiny(family), dtype, backend=backend), dense(tiny(family), dtype))
    data = batches(5, rows=8, length=16) * 10
    ours, theirs = (train(each, data, adamw(each, lr=5e-4)) for each in models)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= most
    assert ours[-1] < 0.7 * ours[0]


@pytest.mark.parametrize("backend", ["reference", "kernels"])
def test_gradients_are_those_of_autograd(tiny, backend):
    """Of both parameters, of experts without a token (zero) and with many."""
    ours, theirs = whole(tiny(), backend=backend), dense(tiny())
    ids = batches(1, rows=1, length=6)[0]
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "experts" not in name:
            continue
        gradient, wanted = parameter.grad, expected[name].grad
        assert gradient.dtype is torch.float32
        assert torch.equal(gradient.flatten(1).any(1), wanted.flatten(1).any(1))
        difference = (gradient - wanted).norm() / wanted.norm()
        assert difference <= (1e-4 if backend == "reference" else 1e-2)


def test_gradcheck_of_the_matrices():
    layer = random_layer(Sizes(tokens=3, top_k=2, experts=3, hidden=4, intermediate=3, rank=1))
    gate_up = torch.cat((layer.weights.gate, layer.weights.up), 1).requires_grad_()
    down = layer.weights.down.clone().requires_grad_()

    def run(gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        layer.weights = StackedWeights(*gate_up.detach().chunk(2, 1), down.detach())
        backend = ReferenceBackend(layer.weights)
        return run_experts(
            backend, layer.x, layer.ids, layer.routing, layer.lora, None, Matrices(gate_up, down, int)
        )

    assert torch.autograd.gradcheck(run, (gate_up, down))
    torch.testing.assert_close(run(gate_up, down), autograd_experts(layer))


def test_weights_that_change_are_packed_anew_whoever_changes_them(tiny):
    model, ids = whole(tiny()), batches(1)[0]
    parameter = experts_of(model)[0].down_proj

    def in_place() -> None:
        parameter.mul_(3)

    def other_memory() -> None:
        parameter.data = parameter.data / 2

    def fused_step() -> None:
        """Which moves no version counter."""
        parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD([parameter], lr=0.1, fused=True).step()

    def from_a_file() -> None:
        model.load_state_dict(before)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        first = last = model(input_ids=ids).logits
        for change in (in_place, other_memory, fused_step):
            change()
            logits = model(input_ids=ids).logits
            assert not torch.equal(logits, last)
            last = logits
        from_a_file()
        assert torch.equal(model(input_ids=ids).logits, first)


def test_a_step_between_forward_and_backward_is_an_error(tiny):
    """Not silently the gradient of other weights."""
    model, ids = whole(tiny()), batches(1)[0]
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        experts_of(model)[0].down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_fused_step_and_another_forward_before_backward_are_an_error(tiny):
    """Fused optimisers move no version counter, so autograd does not notice."""
    model, ids = whole(tiny()), batches(1)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    train(model, [ids], optimizer)
    loss = model(input_ids=ids, labels=ids).loss
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model(input_ids=ids)
    with pytest.raises(CallOrderError, match="run it before the optimiser's step"):
        loss.backward()


def test_a_file_without_some_of_an_expert_is_not_taken_for_complete(tiny):
    model = whole(tiny())
    layer = experts_of(model)[0]
    path = "model.layers.0.mlp.experts"
    files = {f"{path}.7.gate_proj.weight": torch.ones(32, 64)}
    found = model.load_state_dict(files, strict=False)
    assert bool((layer.gate_up_proj[7, :32] == 1).all()) and not bool((layer.down_proj[7] == 1).any())
    assert f"{path}.7.up_proj.weight" in found.missing_keys
    assert f"{path}.0.down_proj.weight" in found.missing_keys
    with pytest.raises(RuntimeError, match=r"has shape \[2, 2\], expected \[32, 64\]"):
        model.load_state_dict({f"{path}.7.gate_proj.weight": torch.ones(2, 2)}, strict=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(tiny, reentrant):
    data = batches(5)
    plain = train(whole(tiny()), data)
    model = whole(tiny())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert train(model, data) == plain


def test_four_parts_of_a_batch_are_the_batch(tiny):
    data = batches(5, rows=4)
    losses = []
    for count in (1, 4):
        model = whole(tiny(), backend="reference")
        losses.append(train(model, data, adamw(model, lr=1e-3), accumulate=count))
    once, parts = losses
    assert once == pytest.approx(parts, abs=1e-4)


def test_masters_stay_where_and_what_they_are(tiny):
    model = whole(tiny()).to(torch.bfloat16)
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert {p.dtype for module in experts_of(model) for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "minimax_m2"])
def test_what_is_saved_is_transformers_own(tiny, tmp_path, family):
    model = whole(tiny(family))
    train(model, batches(2))
    model.save_pretrained(tmp_path)
    assert_same_parameters(model, dense(tmp_path))
    # Ours read bfloat16, as checkpoints of experts are stored.
    model.to(torch.bfloat16)
    for module in experts_of(model):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    assert_same_parameters(model, whole(tmp_path / "bf16", torch.bfloat16, experts="as stored"))


def test_trainer_resumes_to_the_bit(tiny, tmp_path):
    examples = [{"input_ids": row, "labels": row} for batch in batches(4) for row in batch]

    def run(folder: Path, resume: Path | None = None) -> tuple[Trainer, list[float]]:
        arguments = TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            max_steps=6,
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        made = Trainer(whole(tiny()), arguments, train_dataset=examples)
        made.train(resume_from_checkpoint=None if resume is None else str(resume))
        return made, [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    straight, losses = run(tmp_path / "a")
    resumed, more = run(tmp_path / "b", tmp_path / "a" / "checkpoint-3")
    assert losses[-1] < losses[0]
    assert more[-3:] == losses[-3:]
    assert_same_parameters(straight.model, resumed.model)


def test_refusals_say_what_to_do(tiny):
    with pytest.raises(ConfigurationError, match=r"train_experts is 'all', expected 'lora' or 'full'"):
        whole(tiny(), train_experts="all")
    with pytest.raises(ConfigurationError, match=r"in memory as AMXINT8.*give experts='bf16'"):
        whole(tiny(), experts="int8")
    with pytest.raises(FeatureUnavailableError, match=r"load it with train_experts='lora'"):
        from peft import get_peft_model

        get_peft_model(whole(tiny()), training.lora_config(lora(), experts=True))
