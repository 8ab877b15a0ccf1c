"""What an adapter's folder holds, read without PEFT: its tensors, those of experts apart from the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kt_kernel.adapters.layout import is_expert_tensor
from kt_kernel.errors import CheckpointError, CheckpointPathError

CONFIGURATION = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ORIGINAL_EXPERTS = "fused_expert_lora.safetensors"
EXPERTS = "experts"  # the last name of the path of every module of experts
PREFIX = "base_model.model."

Experts = dict[str, dict[str, torch.Tensor]]
"""Path of a module of experts -> its tensors by their names under it."""

LORA_KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_EXPERT_KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(.+?\.{EXPERTS})\.(.+)")
_ORIGINAL_KEY = re.compile(r"layers\.(\d+)\.experts\.(gate|up|down)_lora_([ab])")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layer_of(path: str) -> int:
    """The number of the layer to which the module at `path` belongs; raises CheckpointError without one."""
    found = _LAYER.search(path)
    if found is None:
        raise CheckpointError(f"'{path}' of the adapter belongs to no layer; take an adapter of this model.")
    return int(found[1])


def read_adapter(folder: Path, paths: Mapping[int, str]) -> tuple[Experts, dict[str, torch.Tensor]]:
    """(the experts' tensors, all others under their names in the file)

    `paths`: layer -> path of its experts, for the original's files, which name layers only. Raises
    CheckpointPathError or CheckpointError if there is no adapter, or none of this model.
    """
    if not (folder / CONFIGURATION).exists():
        raise CheckpointPathError(
            f"there is no {CONFIGURATION} in '{folder}'; give the folder of an adapter."
        )
    if not any((folder / name).exists() for name in (WEIGHTS, ORIGINAL_EXPERTS)):
        raise CheckpointPathError(
            f"there is neither {WEIGHTS} nor {ORIGINAL_EXPERTS} in '{folder}'; give the folder of an adapter."
        )
    experts: Experts = {}
    rest = {}
    for key, tensor in _read(folder / WEIGHTS).items():
        match = _EXPERT_KEY.fullmatch(key)
        if match is not None and is_expert_tensor(match[2]):
            experts.setdefault(match[1], {})[match[2]] = tensor
        else:
            rest[key] = tensor
    for key, stacked in _read(folder / ORIGINAL_EXPERTS).items():
        path, projection, which = _original(key, paths)
        for expert, matrix in enumerate(stacked):
            name = f"{expert}.{projection}_proj.lora_{which}.weight"
            experts.setdefault(path, {})[name] = matrix
    return experts, rest


def _original(key: str, paths: Mapping[int, str]) -> tuple[str, str, str]:
    """layers.{L}.experts.{gate,up,down}_lora_{a,b}, A [E, r, in], B [E, out, r]: path, projection, A or B."""
    match = _ORIGINAL_KEY.fullmatch(key)
    if match is None or int(match[1]) not in paths:
        known = ", ".join(map(str, sorted(paths))) or "none"
        raise CheckpointError(
            f"tensor '{key}' of {ORIGINAL_EXPERTS} belongs to no layer of experts of this model (layers "
            f"{known}); take the adapter's own model."
        )
    return paths[int(match[1])], match[2], match[3].upper()


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}); copy the adapter again.") from error
