"""Whatever the engine does meanwhile (whole layers on the device, experts that move, a pass given up), a
patched model says the same.
"""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from patched import NEW_TOKENS, PROMPT, agreement, generated, load, prompt_answer
from rich.console import Console

from kt_kernel.cli.reading import Reading
from kt_kernel.cli.top_view import view
from kt_kernel.integrations.transformers.experts import HybridExperts

FAMILY = "qwen3_moe"
DENSE_FIRST = "deepseek_v3"


@pytest.mark.parametrize("device_experts", [0, 5])
@pytest.mark.parametrize("family", [FAMILY, DENSE_FIRST])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_long_prompts_layer_by_layer_change_no_token(
    beyond, family, device_experts, tiny_checkpoint, tiny_reference
):
    model = load(
        tiny_checkpoint(family),
        num_gpu_experts=device_experts,
        gpu_prefill_token_threshold=len(PROMPT) + beyond,
    )
    result = agreement(model, tiny_reference(family))
    assert result.holds(), str(result)
    assert (model.kt.report()["prefill"]["chunks"] > 0) == (beyond <= 0)


@pytest.mark.parametrize("family", [FAMILY, DENSE_FIRST])
def test_moving_experts_while_generating_changes_no_token(family, tiny_checkpoint, tiny_reference):
    model = load(
        tiny_checkpoint(family),
        num_gpu_experts=4,
        enable_dynamic_expert_update=True,
        expert_update_interval=3,
    )
    result = agreement(model, tiny_reference(family))
    assert result.holds(), str(result)
    report = model.kt.report()
    assert report["experts_moved"] > 0
    assert report["device_experts"] <= 4 * len(report["layers"])


def test_updating_after_a_long_prompt_changes_no_token(tiny_checkpoint, tiny_reference):
    model = load(
        tiny_checkpoint(FAMILY),
        num_gpu_experts=4,
        enable_dynamic_expert_update=True,
        gpu_prefill_token_threshold=64,
    )
    for _ in range(2):  # the second turn starts from the experts that the first one left on the device
        result = agreement(model, tiny_reference(FAMILY))
        assert result.holds(), str(result)
    report = model.kt.report()
    assert report["experts_moved"] > 0
    assert report["device_experts"] == 4 * len(report["layers"])


def test_report_names_the_resident_experts(tiny_checkpoint):
    model = load(tiny_checkpoint(DENSE_FIRST), num_gpu_experts=2, expert_placement_strategy="uniform")
    prompt_answer(model)
    layers = model.kt.report()["layers"]
    assert [layer["layer"] for layer in layers] == [1, 2, 3]  # layer 0 is dense
    assert all(layer["device_experts"] == [0, 1] for layer in layers)
    assert all(layer["uses"] == 4 * len(PROMPT) for layer in layers)


def test_kt_top_can_show_the_report(tiny_checkpoint):
    model = load(tiny_checkpoint(DENSE_FIRST), num_gpu_experts=2)
    readings = []
    for time in (0.0, 1.0):
        readings.append(Reading("tiny", json.loads(json.dumps(model.kt.report())), time))
        prompt_answer(model)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(view(*readings))
    assert "6 of 48 on the device (12.5 %)" in shown.get()


def test_ratio_counts_the_experts_of_the_whole_model(tiny_checkpoint):
    model = load(
        tiny_checkpoint(DENSE_FIRST), gpu_experts_ratio=0.5, expert_placement_strategy="front-loading"
    )
    sizes = [len(layer["device_experts"]) for layer in model.kt.report()["layers"]]
    assert sizes == [16, 8, 0]


def test_deferred_experts_do_not_leak_into_the_next_pass(tiny_checkpoint):
    model = load(tiny_checkpoint(FAMILY), num_gpu_experts=3, max_deferred_experts_per_token=2)
    first = prompt_answer(model)
    assert model.kt.report()["deferred"] == 2
    assert prompt_answer(model) == first
    assert first != prompt_answer(load(tiny_checkpoint(FAMILY), num_gpu_experts=3))


@pytest.mark.parametrize(
    "options", [{}, {"max_deferred_experts_per_token": 2}, {"gpu_prefill_token_threshold": 64}]
)
def test_a_pass_that_was_given_up_leaves_nothing_behind(options, tiny_checkpoint):
    model = load(tiny_checkpoint(FAMILY), num_gpu_experts=3, **options)
    expected = generated(model)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    stop = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        prompt_answer(model)
    stop.remove()
    assert generated(model) == expected


def test_padded_rows_of_a_batch_do_not_change_the_others(tiny_checkpoint, tiny_reference):
    model, reference = load(tiny_checkpoint(FAMILY), num_gpu_experts=3), tiny_reference(FAMILY)
    short, long = PROMPT[:50], PROMPT[:80]
    padding = len(long) - len(short)
    ids = torch.tensor([[model.config.pad_token_id] * padding + short, long])
    mask = torch.tensor([[0] * padding + [1] * len(short), [1] * len(long)])
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with torch.inference_mode():
        assert model.generate(ids, **settings).tolist() == reference.generate(ids, **settings).tolist()


def test_two_models_of_one_checkpoint_do_not_disturb_each_other(tiny_checkpoint):
    one = load(tiny_checkpoint(FAMILY), max_deferred_experts_per_token=1)
    expected = generated(one)
    other = load(tiny_checkpoint(FAMILY), num_gpu_experts=16)
    generated(other)
    assert generated(one) == expected


def test_every_forward_pass_is_one_step(tiny_checkpoint, monkeypatch):
    model = load(tiny_checkpoint(FAMILY))
    steps = []
    monkeypatch.setattr(model.kt, "begin_step", lambda requests: steps.append(len(steps)))
    generated(model)
    assert len(steps) == NEW_TOKENS
    with torch.inference_mode():
        model.model(torch.tensor([PROMPT[:3]]))  # without the head on top
    assert len(steps) == NEW_TOKENS + 1


def test_compiled_models_leave_the_experts_out_of_their_graphs(tiny_checkpoint):
    model = load(tiny_checkpoint(FAMILY), num_gpu_experts=3)
    ids = torch.tensor([PROMPT[:20]])
    with torch.inference_mode():
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(ids).logits, expected)


def test_printing_a_model_says_where_its_experts_are(tiny_checkpoint):
    model = load(tiny_checkpoint(FAMILY), num_gpu_experts=3)
    (text, *_) = {str(module) for module in model.modules() if isinstance(module, HybridExperts)}
    assert text == "HybridExperts(experts=16, on_device=3)"


def test_fetching_missed_experts_changes_no_token(tiny_checkpoint, tiny_reference, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where measured speeds are kept
    model = load(tiny_checkpoint(FAMILY), num_gpu_experts=4, miss_policy="auto")
    result = agreement(model, tiny_reference(FAMILY))
    assert result.holds(), str(result)
    assert model.kt.report()["miss_policy"] == "auto"


def test_most_used_experts_of_a_file_go_to_the_device(tiny_checkpoint, tmp_path):
    counts = torch.zeros(4, 16)
    counts[0, [3, 9]], counts[2, [1, 2, 15]] = torch.tensor([5.0, 4.0]), torch.tensor([9.0, 8.0, 7.0])
    torch.save({"logical_count": counts}, tmp_path / "counts.pt")
    model = load(
        tiny_checkpoint(FAMILY),
        gpu_experts_ratio=5 / 64,
        expert_placement_strategy="frequency",
        init_expert_location=tmp_path / "counts.pt",
    )
    resident = [layer["device_experts"] for layer in model.kt.report()["layers"]]
    assert resident == [[3, 9], [], [1, 2, 15], []]


def test_a_model_that_is_let_go_gives_its_memory_back(tiny_checkpoint):
    model = load(tiny_checkpoint(FAMILY), num_gpu_experts=4, gpu_prefill_token_threshold=64)
    generated(model)
    experts = weakref.ref(model.kt.layers[0].resident.w13)
    wrapper = weakref.ref(model.kt.layers[0].wrapper)
    model.kt.close()
    del model
    gc.collect()
    assert experts() is None
    assert wrapper() is None
