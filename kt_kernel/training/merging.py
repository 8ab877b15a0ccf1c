"""`merge`: a checkpoint with an adapter added to its weights, for software that knows no adapters.

A layer at a time, so it needs memory for one layer of experts in bfloat16 besides the model. The result is
unquantised, whatever the base is: each weight is the base's decoded value plus the adapter's, rounded once.
Layers for drafts, which are no part of the model in transformers, are left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file

from kt_kernel.adapters.backend import ExpertLora, WeightSource
from kt_kernel.adapters.files import layer_of
from kt_kernel.adapters.layout import PROJECTIONS
from kt_kernel.adapters.limits import BESIDE_LORA, VARIANTS, first_set
from kt_kernel.adapters.merged import merged_matrix
from kt_kernel.checkpoint.families import ExpertNames, expert_layers
from kt_kernel.checkpoint.reader import Checkpoint, open_checkpoint
from kt_kernel.errors import CheckpointError, ConfigurationError, FeatureUnavailableError
from kt_kernel.integrations.transformers.dense import DecodedTensor, LazyTensor, dense_state_dict
from kt_kernel.training.experts import TrainableExperts
from kt_kernel.training.lora import LoraExperts

_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 4 << 30
# Beside config.json, which loses its own: that of ModelOpt, and those of GPTQ and AWQ.
_OF_QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_DRAFT_MODELS = ("mtp.", "model.mtp.")
_LAYER = re.compile(r"(.*?layers\.\d+\.)")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".index.json")


def merge(model: PeftModel, output: str | os.PathLike) -> Path:
    """Write the checkpoint that `model`, of `load` with its adapter, was loaded from, with the adapter in it.

    `output` is a new or empty directory. Raises ConfigurationError if it is not, FeatureUnavailableError if
    the checkpoint's experts are stored in a way that is not written, CheckpointError if a module of the
    adapter has no weight of its name.
    """
    folder, base = Path(output), model.get_base_model().name_or_path
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"'{folder}' is not empty; give the name of a new directory.")
    _check_whole(model)
    checkpoint = open_checkpoint(base)
    places = _places(checkpoint)
    layers = dict(_expert_layers(model))
    drafts = _drafts(base for index, (base, _) in places.items() if index not in layers)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _Shards(folder)
    for name, tensor in _dense(model, checkpoint):
        if not name.startswith(drafts):
            shards.add(name, tensor)
    shards.end()
    for index, (source, loras) in layers.items():
        for tensor_name, tensor in _experts(source, loras, *places[index]):
            shards.add(tensor_name, tensor)
        shards.end()
    shards.write_index()
    _copy_the_rest(Path(base), folder)
    return folder


def _check_whole(model: PeftModel) -> None:
    """Raises FeatureUnavailableError for what an adapter may train beside the LoRA that is added here."""
    for adapter in model.active_adapters:
        name = first_set(model.peft_config[adapter], (*BESIDE_LORA, *VARIANTS))
        if name is not None:
            raise FeatureUnavailableError(
                f"the adapter has {name}, which is not merged; serve it beside its base instead."
            )


def _expert_layers(model: PeftModel) -> Iterator[tuple[int, tuple[WeightSource, list[ExpertLora]]]]:
    """Layer -> its experts' weights, and the LoRA of active adapters: none without LoRA of experts."""
    for name, module in model.named_modules():
        if isinstance(module, LoraExperts):
            active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
            loras = [module.expert_lora(adapter) for adapter in active]
            yield layer_of(name), (module.base_layer.weights, loras)
        elif isinstance(module, TrainableExperts) and not name.endswith(".base_layer"):
            yield layer_of(name), (module.weights, [])


def _drafts(bases: Iterable[str]) -> tuple[str, ...]:
    """How names of draft layers begin, which the model does not have: they are left out as a whole."""
    found = (_LAYER.match(base) for base in bases)
    return (*_DRAFT_MODELS, *(match[1] for match in found if match))


class _Shards:
    """Collects tensors into files, each written as soon as it is full."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._places: dict[str, str] = {}
        self._files = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= _SHARD_BYTES:
            self.end()

    def end(self) -> None:
        if self._tensors:
            self._files += 1
            file = f"model-{self._files:05d}.safetensors"
            save_file(self._tensors, self._folder / file, {"format": "pt"})
            self._places |= dict.fromkeys(self._tensors, file)
            self._tensors, self._bytes = {}, 0

    def write_index(self) -> None:
        index = {"metadata": {}, "weight_map": dict(sorted(self._places.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _places(checkpoint: Checkpoint) -> dict[int, tuple[str, ExpertNames]]:
    """Layer -> under which path its experts are stored, one by one, and what their projections are called."""
    places = {}
    for index, where in expert_layers(checkpoint).items():
        if not isinstance(where.names, ExpertNames):
            raise FeatureUnavailableError(
                f"the experts under '{where.base}' of '{checkpoint.path}' are not stored one by one, and "
                "such checkpoints are not merged; serve the adapter beside its base instead."
            )
        places[index] = (where.base, where.names)
    return places


def _dense(model: PeftModel, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything beside the experts, under the checkpoint's names."""
    deltas = {
        f"{name.removeprefix('base_model.model.')}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, LoraExperts)
    }
    stored: dict[str, LazyTensor] = dense_state_dict(checkpoint)
    unknown = deltas.keys() - stored.keys()
    if unknown:
        raise CheckpointError(
            f"the adapter changes '{min(unknown)}', which '{checkpoint.path}' does not have under that name; "
            "serve the adapter beside its base instead."
        )
    for name, lazy in stored.items():
        tensor = lazy[...]
        if name in deltas:
            active = [adapter for adapter in model.active_adapters if adapter in deltas[name].lora_A]
            delta = sum(deltas[name].get_delta_weight(adapter).detach().float().cpu() for adapter in active)
            tensor = (tensor.float() + delta).to(_stored_as(tensor))
        yield name, tensor.to(torch.bfloat16) if isinstance(lazy, DecodedTensor) else tensor


def _experts(
    source: WeightSource, loras: list[ExpertLora], base: str, names: ExpertNames
) -> Iterator[tuple[str, torch.Tensor]]:
    for e in range(source.num_experts):
        matrices = source.expert(e)
        for projection in PROJECTIONS:
            merged = getattr(matrices, projection)
            for lora in loras:
                merged = merged_matrix(merged, lora, e, projection)
            yield f"{base}.{e}.{getattr(names, projection)}.weight", merged.to(torch.bfloat16)


def _stored_as(tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype in (torch.float32, torch.float16) else torch.bfloat16


def _copy_the_rest(base: Path, folder: Path) -> None:
    """Tokenizer, template and configuration; the last without what it says of quantisation."""
    for file in base.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _OF_QUANTISATION:
            shutil.copyfile(file, folder / file.name)
    config = json.loads((base / "config.json").read_text())
    for said in (config, config.get("text_config") or {}):
        said.pop("quantization_config", None)
        if "num_nextn_predict_layers" in said:
            said["num_nextn_predict_layers"] = 0  # see _drafts
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
