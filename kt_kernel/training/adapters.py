"""Adapters on disk: PEFT's folders, and those of the original with `fused_expert_lora.safetensors`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kt_kernel.errors import CheckpointError, CheckpointPathError
from kt_kernel.training.adapter_layout import is_expert_tensor, stack
from kt_kernel.training.experts import TrainableExperts
from kt_kernel.training.lora import LoraExperts
from kt_kernel.training.peft_config import EXPERTS, lora_config

WEIGHTS = "adapter_model.safetensors"
ORIGINAL_EXPERTS = "fused_expert_lora.safetensors"
_PREFIX = "base_model.model."

_ORIGINAL_KEY = re.compile(r"layers\.(\d+)\.experts\.(gate|up|down)_lora_([ab])")
_LAYER_OF_EXPERTS = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_LORA_KEY = re.compile(rf"(?:{re.escape(_PREFIX)})?(.+)\.lora_(?:embedding_)?[AB](?:\.weight)?")
_EXPERT_KEY = re.compile(rf"(?:{re.escape(_PREFIX)})?(.+?\.{EXPERTS})\.(.+)")


def load_adapter(
    model: nn.Module, path: str | os.PathLike, *, adapter_name: str = "default", trainable: bool = False
) -> PeftModel:
    """`model` of `kt_kernel.training.load` with the adapter in the folder `path`.

    Reads PEFT's files with LoRA of experts in either layout (adapter_layout.py), and the original's. Modules
    get LoRA as the file has it. `trainable`: to go on training, with the dropout of its configuration.

    Raises CheckpointPathError or CheckpointError if there is no such adapter, or it is one of another model.
    """
    folder = Path(path)
    experts, rest = _split(read_tensors(folder, model))
    config = LoraConfig.from_pretrained(os.fspath(folder))
    config.inference_mode = not trainable
    config.target_modules, config.target_parameters = _targets(model, rest), None
    config.rank_pattern = _without_experts(config.rank_pattern)
    config.alpha_pattern = _without_experts(config.alpha_pattern)
    peft_model = get_peft_model(model, lora_config(config, experts=bool(experts)), adapter_name=adapter_name)
    _fill_experts(peft_model, adapter_name, experts)
    result = set_peft_model_state_dict(peft_model, rest, adapter_name=adapter_name)
    _check_complete(folder, result)
    return peft_model if trainable else peft_model.eval()


def layer_of_experts(path: str) -> int:
    """The number of the layer to which the module at `path` belongs."""
    found = _LAYER_OF_EXPERTS.search(path)
    assert found is not None, path  # load() has refused a model where it is not so
    return int(found[1])


def read_tensors(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of the adapter, under PEFT's names. Raises as `load_adapter` does."""
    if not (folder / "adapter_config.json").exists():
        raise CheckpointPathError(
            f"there is no adapter_config.json in '{folder}'; give the folder of an adapter."
        )
    tensors: dict[str, torch.Tensor] = {}
    if (folder / WEIGHTS).exists():
        tensors |= _read(folder / WEIGHTS)
    if (folder / ORIGINAL_EXPERTS).exists():
        tensors |= original_experts(_read(folder / ORIGINAL_EXPERTS), model)
    if not tensors:
        raise CheckpointPathError(
            f"there is neither {WEIGHTS} nor {ORIGINAL_EXPERTS} in '{folder}'; give the folder of an adapter."
        )
    return tensors


def original_experts(tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """`fused_expert_lora.safetensors` under the names that PEFT gives the LoRA of single experts.

    Its keys are layers.{L}.experts.{gate,up,down}_lora_{a,b}, A [E, r, in] and B [E, out, r].
    """
    paths = {
        layer_of_experts(name): name
        for name, module in model.named_modules()
        if isinstance(module, TrainableExperts)
    }
    named = {}
    for key, stacked in tensors.items():
        match = _ORIGINAL_KEY.fullmatch(key)
        if match is None or int(match[1]) not in paths:
            known = ", ".join(map(str, sorted(paths))) or "none"
            raise CheckpointError(
                f"tensor '{key}' of {ORIGINAL_EXPERTS} belongs to no layer of experts of this model (layers "
                f"{known}); take the adapter's own model."
            )
        for expert, matrix in enumerate(stacked):
            path = f"{_PREFIX}{paths[int(match[1])]}.{expert}.{match[2]}_proj"
            named[f"{path}.lora_{match[3].upper()}.weight"] = matrix
    return named


def _split(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """(path of a module of experts -> its tensors by their names under it, all other tensors)"""
    experts: dict[str, dict[str, torch.Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        match = _EXPERT_KEY.fullmatch(key)
        if match is not None and is_expert_tensor(match[2]):
            experts.setdefault(match[1], {})[match[2]] = tensor
        else:
            rest[key] = tensor
    return experts, rest


def _targets(model: nn.Module, rest: Mapping[str, torch.Tensor]) -> set[str]:
    """The modules that have LoRA: by their last names, where these mean no others."""
    paths = {match[1] for key in rest if (match := _LORA_KEY.fullmatch(key))}
    names = {path.rpartition(".")[2] for path in paths}
    meant = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    return names if meant == paths else paths


@torch.no_grad()
def _fill_experts(
    model: PeftModel, adapter_name: str, experts: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    layers = {
        name.removeprefix(_PREFIX): module
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
    """Ranks and alphas of the fused layout, which are doubled for gate and up together, left out."""
    return {
        name: value
        for name, value in (pattern or {}).items()
        if not name.endswith(("gate_up_proj", "down_proj"))
    }


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}); copy the adapter again.") from error


def _check_complete(folder: Path, result: Any) -> None:
    filled = f".{EXPERTS}.lora_"
    missing = [key for key in result.missing_keys if ".lora_" in key and filled not in key]
    if missing or result.unexpected_keys:
        wrong = f"'{missing[0]}' is missing" if missing else f"'{result.unexpected_keys[0]}' has no place"
        raise CheckpointError(
            f"the adapter in '{folder}' does not fit the model: {wrong}; take the adapter's own model."
        )
