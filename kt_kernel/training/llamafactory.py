"""LLaMA-Factory with our experts: `python -m kt_kernel.training.llamafactory train.yaml`.

The YAML is LLaMA-Factory's own, with a block `kt_kernel` of options of `kt_kernel.training.load`. Three
names that its loader has imported are given other meanings in this process; nothing of it is changed on disk.

    llamafactory.model.loader.AutoModelForCausalLM    -> kt_kernel.training.load
    llamafactory.model.adapter.LoraConfig             -> with LoRA on the experts
    llamafactory.model.adapter.PeftModel              -> kt_kernel.training.load_adapter
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml

import kt_kernel.training as training
from kt_kernel.errors import ConfigurationError, FeatureUnavailableError, KTError
from kt_kernel.integrations.options import ExpertOptions

OPTIONS = "kt_kernel"
_TUNERS = ("lora", "full")  # of finetuning_type


# Settings of LLaMA-Factory that our loading does not follow -> the values that ask for nothing.
_NOT_FOLLOWED = {
    "train_from_scratch": (None, False),
    "model_revision": (None, "main"),
    "adapter_folder": (None, ""),
    "quantization_bit": (None,),
    "use_unsloth": (None, False),
    "use_kt": (None, False),
    # What it writes into the model's configuration, or looks for beside our loader.
    "moe_aux_loss_coef": (None, 0),
    "rope_scaling": (None,),
    "shift_attn": (None, False),
    "flash_attn": (None, "auto", "sdpa"),
    "mixture_of_depths": (None, False),
}
_DECIDED_ELSEWHERE = {"train_experts": "finetuning_type", "dtype": "bf16, fp16 or pure_bf16"}


def main(arguments: list[str]) -> int:
    """Train as the YAML says; the status of the process. What is wrong with it is said in one sentence."""
    try:
        train(arguments)
    except KTError as error:
        sys.stderr.write(f"kt_kernel.training.llamafactory: {error}\n")
        return 1
    return 0


def train(arguments: list[str]) -> None:
    """Raises a KTError if the YAML cannot be used."""
    if len(arguments) != 1:
        raise ConfigurationError(f"got {len(arguments)} arguments, expected one, LLaMA-Factory's YAML file.")
    settings = _mapping(_contents(arguments[0]), f"'{arguments[0]}'")
    options = _mapping(settings.pop(OPTIONS, None) or {}, OPTIONS)
    _check(settings, options)
    plug_in(options, settings.get("finetuning_type", "lora"))
    importlib.import_module("llamafactory.train.tuner").run_exp(settings)


def _contents(file: str) -> Any:
    try:
        return yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"'{file}' cannot be read: {reason}; give LLaMA-Factory's YAML file."
        ) from None


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{name} holds {type(value).__name__}, expected names with values.")
    return value


def _check(settings: dict[str, Any], options: dict[str, Any]) -> None:
    for name, nothing in _NOT_FOLLOWED.items():
        if settings.get(name) not in nothing:
            said = "set" if settings[name] is True else repr(settings[name])
            raise FeatureUnavailableError(
                f"{name} is {said}, which is not available with experts of kt-kernel; leave it out."
            )
    for name, where in _DECIDED_ELSEWHERE.items():
        if name in options:
            raise ConfigurationError(
                f"{name} is given under {OPTIONS}, but LLaMA-Factory decides it; set {where} instead."
            )
    known = {
        *inspect.signature(training.load).parameters,
        *(f.name for f in dataclasses.fields(ExpertOptions)),
    }
    unknown = options.keys() - known
    if unknown:
        raise ConfigurationError(
            f"{OPTIONS} has the unknown option {min(unknown, key=str)!r}; give those of "
            "kt_kernel.training.load."
        )


def plug_in(options: dict[str, Any], tuner: str = "lora") -> None:
    """From now on LLaMA-Factory loads causal language models with our experts.

    `options`: of `kt_kernel.training.load`. `tuner`: its finetuning_type. Raises FeatureUnavailableError for
    others than lora and full.
    """
    if tuner not in _TUNERS:
        raise FeatureUnavailableError(
            f"finetuning_type is {tuner!r}, but experts are trained as {' or '.join(_TUNERS)}; use "
            "one of these."
        )
    loader: Any = importlib.import_module("llamafactory.model.loader")
    adapter: Any = importlib.import_module("llamafactory.model.adapter")
    loader.AutoModelForCausalLM = _Models({"train_experts": tuner, **options})
    adapter.LoraConfig = _expert_lora
    adapter.PeftModel = _Adapters


class _Models:
    """Stands where AutoModelForCausalLM stood."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def from_pretrained(
        self, pretrained_model_name_or_path: str | os.PathLike, **options: Any
    ) -> transformers.PreTrainedModel:
        """`options`: what LLaMA-Factory gives transformers, of which the dtype is taken."""
        dtype = options.get("torch_dtype", options.get("dtype"))
        return training.load(
            transformers.AutoModelForCausalLM,
            pretrained_model_name_or_path,
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            **self._options,
        )


class _Adapters:
    """Stands where PeftModel stood."""

    @staticmethod
    def from_pretrained(
        model: torch.nn.Module,
        path: str | os.PathLike,
        is_trainable: bool = False,  # noqa: FBT001, FBT002
        **options: Any,
    ) -> peft.PeftModel:
        return training.load_adapter(model, path, mode="training" if is_trainable else "inference")


def _expert_lora(**options: Any) -> peft.LoraConfig:
    return training.lora_config(peft.LoraConfig(**options), experts=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
