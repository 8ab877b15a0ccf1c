"""Training does what dense transformers with a LoRA for each expert does, however it is cut up."""

from __future__ import annotations

import pytest
import torch
from dense_twin import dense_twin
from training_families import FAMILIES
from training_runs import adamw, batches, lora, parameters, train, trainable


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_dense_transformers(tiny, family):
    model = trainable(tiny(family), backend="reference")
    twin = dense_twin(tiny(family), model, lora(), torch.float32)
    data = batches(5) * 10
    ours, theirs = train(model, data), train(twin, data)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-3
    assert ours[-1] < 0.5 * ours[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_dense_transformers_in_bfloat16(tiny, family):
    """With small steps: the router of a random model in bfloat16 turns the last bit into another expert."""
    model = trainable(tiny(family), dtype=torch.bfloat16)
    twin = dense_twin(tiny(family), model, lora(), torch.bfloat16)
    data = batches(5, rows=8, length=16) * 10
    ours, theirs = (train(each, data, adamw(each, lr=5e-4)) for each in (model, twin))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 2e-2
    assert sum(ours[-5:]) < sum(ours[:5])
    assert all(parameter.dtype is torch.float32 for parameter in parameters(model))


@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_losses_of_quantised_experts_are_those_of_the_same_weights_in_float32(tiny, experts):
    """The kernels round activations and gradients to int8 for them; the reference rounds nothing."""
    data = batches(5, rows=8, length=16) * 4
    models = (trainable(tiny(), experts=experts, backend=backend) for backend in ("kernels", "reference"))
    ours, exact = (train(model, data, adamw(model, lr=5e-4)) for model in models)
    assert max(abs(a - b) for a, b in zip(ours, exact, strict=True)) <= 2e-2
    assert sum(ours[-5:]) < sum(ours[:5])


def test_four_parts_of_a_batch_are_the_batch(tiny):
    data = batches(10, rows=4)
    whole, parts = (train(trainable(tiny(), backend="reference"), data, accumulate=n) for n in (1, 4))
    assert whole == pytest.approx(parts, abs=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny, reentrant):
    data = batches(10)
    plain = train(trainable(tiny()), data)
    model = trainable(tiny())
    model.enable_input_require_grads()  # as Trainer does for models with adapters
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert train(model, data) == plain


def test_gradients_in_evaluation_mode(tiny):
    model = trainable(tiny())
    ids = batches(1)[0]
    found = []
    for mode in (model.train, model.eval):
        mode()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([parameter.grad.clone() for parameter in parameters(model)])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_follows_torchs_seed_and_rests_in_evaluation_mode(tiny):
    model = trainable(tiny(), lora(lora_dropout=0.5, init_lora_weights=False))
    ids = batches(1)[0]

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(input_ids=ids, labels=ids).loss.item()

    first, again, other = loss(1), loss(1), loss(2)
    assert first == again != other
    model.eval()
    assert loss(1) == loss(2)


def test_dropout_is_the_same_when_a_checkpoint_runs_again(tiny):
    data = batches(5)

    def run(checkpointing: bool) -> list[float]:
        torch.manual_seed(3)
        model = trainable(tiny(), lora(lora_dropout=0.3))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return train(model, data)

    assert run(True) == run(False)


def test_ten_steps_and_ten_more_are_twenty(tiny, tmp_path):
    data = batches(20)
    model = trainable(tiny())
    straight = train(model, data)

    first = trainable(tiny())
    optimizer = adamw(first)
    losses = train(first, data[:10], optimizer)
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    second = trainable(tiny())
    second.load_adapter(str(tmp_path), "default", is_trainable=True)
    optimizer = adamw(second)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    losses += train(second, data[10:], optimizer)
    assert losses == straight
    for a, b in zip(parameters(model), parameters(second), strict=True):
        assert torch.equal(a, b)


def test_small_steps_are_not_lost_to_rounding(tiny):
    """Weights in bfloat16 would not move: a step of 1e-5 is below half of their last place."""
    model = trainable(tiny(), lora(init_lora_weights=False), dtype=torch.bfloat16)
    experts = [p for name, p in model.named_parameters() if "experts.lora_" in name]
    before = [p.detach().clone() for p in experts]
    optimizer = torch.optim.SGD(parameters(model), lr=0.0)
    for ids in batches(3):
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p in experts:
                p.sub_(1e-5 * p.grad.sign())
        optimizer.zero_grad()
    moved = [not torch.equal(a, b) for a, b in zip(before, experts, strict=True)]
    assert all(moved)


def test_two_models_of_different_width_in_one_process(tiny):
    narrow, wide = tiny(), tiny(hidden_size=128, moe_intermediate_size=64)
    data = batches(6)
    apart = [train(trainable(path), data) for path in (narrow, wide)]
    models = [trainable(path) for path in (narrow, wide)]
    optimizers = [adamw(model) for model in models]
    together = [[], []]
    for ids in data:
        for losses, model, optimizer in zip(together, models, optimizers, strict=True):
            losses += train(model, [ids], optimizer)
    assert together == apart


def test_two_losses_before_one_backward_pass(tiny):
    model = trainable(tiny(), lora(init_lora_weights=False))
    first, second = batches(2)

    def gradients(run) -> list[torch.Tensor]:
        run()
        found = [parameter.grad.clone() for parameter in parameters(model)]
        model.zero_grad()
        return found

    def together() -> None:
        (model(input_ids=first, labels=first).loss + model(input_ids=second, labels=second).loss).backward()

    def apart() -> None:
        for ids in (first, second):
            model(input_ids=ids, labels=ids).loss.backward()

    for a, b in zip(gradients(together), gradients(apart), strict=True):
        torch.testing.assert_close(a, b)


def test_router_loss_is_there(tiny):
    model = trainable(tiny(output_router_logits=True, router_aux_loss_coef=0.5))
    out = model(input_ids=(ids := batches(1)[0]), labels=ids)
    assert out.aux_loss is not None and out.aux_loss.item() > 0
