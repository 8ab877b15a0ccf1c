"""Other people's loops: transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from training_runs import batches, lora, parameters, trainable
from transformers import Trainer, TrainingArguments

DATA = batches(4, rows=2)
EXAMPLES = [{"input_ids": row, "labels": row} for batch in DATA for row in batch]


def trainer(path: Path, output: Path, **options: object) -> Trainer:
    arguments = TrainingArguments(
        str(output),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 4,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    return Trainer(trainable(path, lora(lora_dropout=0.0)), arguments, train_dataset=EXAMPLES)


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_trainer_learns_saves_and_resumes_to_the_bit(tiny, tmp_path):
    whole = trainer(tiny(), tmp_path / "whole")
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    again = trainer(tiny(), tmp_path / "again", max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again)[-4:] == losses(whole)[-4:]
    for a, b in zip(parameters(whole.model), parameters(again.model), strict=True):
        assert torch.equal(a, b)


def test_trainer_with_checkpointing_and_autocast(tiny, tmp_path):
    made = trainer(tiny(), tmp_path, gradient_checkpointing=True, bf16=True, gradient_accumulation_steps=2)
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    assert all(parameter.dtype is torch.float32 for parameter in parameters(made.model))
