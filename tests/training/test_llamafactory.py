"""LLaMA-Factory's loader is given our models, and nothing that it asks of its own is dropped without a word.

LLaMA-Factory itself is not installed: modules of its names stand in for it.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model

from kt_kernel.training import llamafactory
from kt_kernel.training.full import FullExperts
from kt_kernel.training.lora import LoraExperts


@pytest.fixture
def stand_in(monkeypatch) -> SimpleNamespace:
    """`run` holds what a run was given, and does what `work` says with the modules of the loader."""
    loader, adapter = ModuleType("llamafactory.model.loader"), ModuleType("llamafactory.model.adapter")
    tuner = ModuleType("llamafactory.train.tuner")
    made = SimpleNamespace(loader=loader, adapter=adapter, settings=None, work=lambda: None)

    def run_exp(settings: dict) -> None:
        made.settings = settings
        made.work()

    tuner.run_exp = run_exp
    for name in ("llamafactory", "llamafactory.model", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (loader, adapter, tuner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def run(tmp_path, **settings: object) -> int:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return llamafactory.main([str(file)])


def test_its_loader_trains_a_lora_on_the_experts(tiny, tmp_path, stand_in):
    def work() -> None:
        model = stand_in.loader.AutoModelForCausalLM.from_pretrained(
            pretrained_model_name_or_path=str(tiny()), torch_dtype="auto", revision="main", token=None
        )
        config = stand_in.adapter.LoraConfig(r=2, target_modules=["q_proj"])
        trained = get_peft_model(model, config)
        assert any(isinstance(module, LoraExperts) for module in trained.modules())
        trained.save_pretrained(tmp_path / "adapter")
        again = stand_in.adapter.PeftModel.from_pretrained(
            stand_in.loader.AutoModelForCausalLM.from_pretrained(str(tiny())),
            str(tmp_path / "adapter"),
            is_trainable=True,
            subfolder=None,
        )
        assert isinstance(again, PeftModel)

    stand_in.work = work
    assert run(tmp_path, stage="sft", kt_kernel={"experts": "int8", "threads": 1}) == 0
    assert stand_in.settings == {"stage": "sft"}


def test_full_trains_the_weights_themselves(tiny, tmp_path, stand_in):
    def work() -> None:
        model = stand_in.loader.AutoModelForCausalLM.from_pretrained(str(tiny()), torch_dtype=torch.float32)
        assert any(isinstance(module, FullExperts) for module in model.modules())

    stand_in.work = work
    assert run(tmp_path, finetuning_type="full", kt_kernel={"threads": 1}) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"finetuning_type": "oft"}, "finetuning_type is 'oft'"),
        ({"train_from_scratch": True}, "train_from_scratch is set"),
        ({"kt_kernel": {"train_experts": "full"}}, "train_experts"),
        ({"kt_kernel": {"dtype": "float32"}}, "dtype"),
        ({"adapter_folder": "sub"}, "adapter_folder is 'sub'"),
        ({"model_revision": "v2"}, "model_revision is 'v2'"),
        ({"moe_aux_loss_coef": 0.001}, "moe_aux_loss_coef is 0.001"),
        ({"flash_attn": "fa2"}, "flash_attn is 'fa2'"),
        ({"kt_kernel": {"thread": 8}}, "unknown option 'thread'"),
        ({"kt_kernel": ["experts"]}, "kt_kernel holds list"),
    ],
)
def test_what_it_cannot_do_ends_in_a_sentence(tmp_path, stand_in, capsys, settings, said):
    assert run(tmp_path, **settings) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert stand_in.settings is None


@pytest.mark.parametrize("contents", [None, "", "[a", "- a"])
def test_a_file_that_is_no_settings_ends_in_a_sentence(tmp_path, stand_in, capsys, contents):
    file = tmp_path / "run.yaml"
    if contents is not None:
        file.write_text(contents)
    assert llamafactory.main([str(file)]) == 1
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1
    assert stand_in.settings is None
