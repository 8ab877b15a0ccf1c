"""TRL's trainers take a model with experts of ours as any other model with an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import lora, trainable
from transformers import AutoTokenizer

datasets = pytest.importorskip("datasets", reason="TRL reads its data with it, and it is not installed")
trl = pytest.importorskip("trl", reason="TRL is not installed")

COMMON = {
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_length": 64,
}


def losses(made, folder: Path) -> list[float]:
    made.train()
    found = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    made.save_model(str(folder / "adapter"))
    assert any("experts" in name for name in _tensors(folder / "adapter"))
    return found


def _tensors(folder: Path) -> list[str]:
    from safetensors.torch import load_file

    return list(load_file(folder / "adapter_model.safetensors"))


def test_supervised_fine_tuning(tiny, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"it is {i}"},
            ]
        }
        for i in range(8)
    ]
    made = trl.SFTTrainer(
        trainable(tiny(), lora()),
        args=trl.SFTConfig(str(tmp_path), **COMMON),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny()),
    )
    found = losses(made, tmp_path)
    assert found[-1] < 0.9 * found[0]


def test_preferences_against_the_model_without_its_adapter(tiny, tmp_path):
    """The reference is the same model with its adapter off: both run before the backward pass."""
    rows = [{"prompt": f"say {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(8)]
    made = trl.DPOTrainer(
        trainable(tiny(), lora()),
        args=trl.DPOConfig(str(tmp_path), **COMMON),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny()),
    )
    found = losses(made, tmp_path)
    assert found[0] == pytest.approx(0.6931, abs=0.01)  # ln 2: the adapter does nothing yet
    assert found[-1] < 0.6 * found[0]
