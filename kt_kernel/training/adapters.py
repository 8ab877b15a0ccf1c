"""Adapters on disk: PEFT's folders, and those of the original with `fused_expert_lora.safetensors`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from kt_kernel.adapters.files import EXPERTS, LORA_KEY, PREFIX, Experts, layer_of, read_adapter
from kt_kernel.adapters.layout import refuse_fused, stack
from kt_kernel.checkpoint.families import GateUpRows
from kt_kernel.errors import CheckpointError, ConfigurationError, KTError
from kt_kernel.training.experts import TrainableExperts
from kt_kernel.training.lora import LoraExperts
from kt_kernel.training.peft_config import lora_config

INFERENCE, TRAINING = "inference", "training"  # what an adapter is loaded for


def load_adapter(
    model: nn.Module, path: str | os.PathLike, *, adapter_name: str = "default", mode: str = INFERENCE
) -> PeftModel:
    """`model` of `kt_kernel.training.load` with the adapter in the folder `path`, as `adapter_name`.

    A model that has adapters already gets one more, which `set_adapter` chooses.

    Reads PEFT's files with LoRA of experts in either layout (kt_kernel/adapters/layout.py), and the
    original's. Modules get LoRA as the file has it. `mode`: "inference", or "training" to go on with it, with
    the dropout of its configuration.

    Raises ConfigurationError for another mode, CheckpointPathError or CheckpointError if there is no such
    adapter, or it is one of another model.
    """
    if mode not in (INFERENCE, TRAINING):
        raise ConfigurationError(f"mode is {mode!r}, expected {INFERENCE!r} or {TRAINING!r}.")
    folder = Path(path)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    paths = {
        layer_of(name): name.removesuffix(".base_layer")
        for name, module in base.named_modules()
        if isinstance(module, TrainableExperts)
    }
    experts, rest = read_adapter(folder, paths)
    config = LoraConfig.from_pretrained(os.fspath(folder))
    config.inference_mode = mode == INFERENCE
    config.target_modules, config.target_parameters = _targets(base, rest), None
    config.rank_pattern = _without_experts(config.rank_pattern)
    config.alpha_pattern = _without_experts(config.alpha_pattern)
    config = lora_config(config, experts=bool(experts))
    peft_model = _with_config(model, config, adapter_name)
    try:
        _fill_experts(peft_model, adapter_name, experts)
        result = set_peft_model_state_dict(peft_model, rest, adapter_name=adapter_name)
        _check_complete(folder, adapter_name, result)
    except KTError:
        if peft_model is model:  # it goes on with those it had
            peft_model.delete_adapter(adapter_name)
        raise
    return peft_model.eval() if mode == INFERENCE else peft_model


def _with_config(model: nn.Module, config: LoraConfig, adapter_name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=adapter_name)
    if adapter_name in model.peft_config:
        raise CheckpointError(
            f"the model has an adapter '{adapter_name}' already; give adapter_name another name."
        )
    model.add_adapter(adapter_name, config)
    return model


def _targets(model: nn.Module, rest: Mapping[str, torch.Tensor]) -> set[str]:
    """The modules that have LoRA: by their last names, where these mean no others."""
    paths = {match[1] for key in rest if (match := LORA_KEY.fullmatch(key))}
    names = {path.rpartition(".")[2] for path in paths}
    meant = {
        path
        for path, _ in model.named_modules()
        if path.rpartition(".")[2] in names and not path.endswith(".base_layer")
    }
    return names if meant == paths else paths


@torch.no_grad()
def _fill_experts(model: PeftModel, adapter_name: str, experts: Experts) -> None:
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraExperts)
    }
    missing = sorted(layers.keys() ^ experts.keys()) if experts else []
    if missing:
        raise CheckpointError(
            f"the adapter and the model do not both have experts at '{missing[0]}'; take the adapter's own."
        )
    for path, tensors in experts.items():
        layer = layers[path]
        where = f"the adapter's experts at '{path}'"
        if layer.base_layer.rows is GateUpRows.ALTERNATING:
            refuse_fused(tensors, where)
        stacked = stack(tensors, layer.base_layer.backend.num_experts, layer.r[adapter_name], where)
        for (projection, which), tensor in stacked.items():
            half = layer.lora_A if which == "A" else layer.lora_B
            parameter = getattr(half[adapter_name], projection)
            if parameter.shape != tensor.shape:
                raise CheckpointError(
                    f"{where}: lora_{which} of {projection} has shape {list(tensor.shape)}, expected "
                    f"{list(parameter.shape)}; take the adapter's own model."
                )
            parameter.copy_(tensor)


def _without_experts(pattern: Mapping[str, float] | None) -> dict:
    """Ranks and alphas of the fused layout, which are doubled for gate and up together, left out.

    PEFT writes them as `.*\\.gate_up_proj`; other layers' stay.
    """
    return {
        name: value
        for name, value in (pattern or {}).items()
        if not name.endswith("gate_up_proj") and f"{EXPERTS}." not in name.replace("\\", "")
    }


def _check_complete(folder: Path, adapter_name: str, result: Any) -> None:
    filled = f".{EXPERTS}.lora_"
    own = re.compile(rf"\.lora_(?:embedding_)?[AB]\.{re.escape(adapter_name)}(?:\.|$)")
    missing = [key for key in result.missing_keys if own.search(key) and filled not in key]
    if missing or result.unexpected_keys:
        wrong = f"'{missing[0]}' is missing" if missing else f"'{result.unexpected_keys[0]}' has no place"
        raise CheckpointError(
            f"the adapter in '{folder}' does not fit the model: {wrong}; take the adapter's own model."
        )
