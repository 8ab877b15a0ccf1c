"""A patched model straight from its checkpoint: expert weights never pass through transformers.

    config.json ──> the model on the meta device ──> experts modules taken out ──> other tensors loaded
                                                                                          │
                     experts, read and packed by our own loader from the mapped files ──> patch

At no time does the model hold a parameter for an expert, on any device but meta.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from torch import nn

from kt_kernel.checkpoint.reader import open_checkpoint
from kt_kernel.errors import CheckpointError, CheckpointPathError, ConfigurationError
from kt_kernel.gguf.model import open_gguf
from kt_kernel.gguf_model import describe, find_gguf
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.integrations.transformers.blocks import UnloadedExperts, find_experts, replace_module
from kt_kernel.integrations.transformers.dense import dense_state_dict, gguf_state_dict
from kt_kernel.integrations.transformers.patching import patch


def from_pretrained(
    path: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **expert_options: Any,
) -> transformers.PreTrainedModel:
    """The causal language model at `path`, a local directory or GGUF file, with its experts in the hybrid
    engine.

    Everything but the experts is loaded to `device` in `dtype` (default: what config.json says; of a GGUF
    file, bfloat16), decoded if it is quantised. `expert_options` are those of `patch`; `weight_path` is
    `path` unless given. Raises a KTError in one sentence if the model or its files cannot be used.
    """
    path = os.fspath(path)
    check_path(path)
    _check_device(torch.device(device))
    expert_options = {"weight_path": path, **expert_options}
    # What is wrong ends here, not after minutes.
    ExpertOptions(**expert_options).with_method().check_slots_filled_by_copies()
    return patch(without_experts(path, dtype).to(device), **expert_options)


def check_path(path: str) -> None:
    """Raises CheckpointPathError unless there is a directory or a GGUF file."""
    if not os.path.isdir(path) and find_gguf(path) is None:
        raise CheckpointPathError(
            f"there is no directory '{path}'; give the local directory of a downloaded checkpoint, or a "
            ".gguf file."
        )


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"device is '{device}', but torch {torch.__version__} finds no CUDA device here; give "
            "device='cpu'."
        )


def without_experts(path: str, dtype: torch.dtype | None) -> transformers.PreTrainedModel:
    """The model with all weights but those of its experts, on the CPU."""
    file = find_gguf(path)
    directory = path if file is None else os.fspath(describe(file).directory)
    config = _config(directory)
    dtype = dtype or config.dtype or torch.bfloat16
    model_class = _model_class(config)
    if file is None:
        tensors = dense_state_dict(open_checkpoint(path))
    else:
        tensors = gguf_state_dict(open_gguf(file), dtype)
    model, report = _expertless(model_class).from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, in one sentence
    )
    model.__class__ = model_class
    _check_complete(path, model_class.__name__, report)
    if os.path.exists(os.path.join(directory, transformers.utils.GENERATION_CONFIG_NAME)):
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    model.name_or_path = model.config.name_or_path = path
    return model


def _check_complete(path: str, model: str, report: dict[str, Any]) -> None:
    """Nothing may be left at the random values that transformers gives what it did not find."""
    advice = "take the weights and the config.json from the same model."
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"tensor '{name}' of '{path}' has shape {list(stored)}, but the model ({model}) has "
            f"{list(expected)}; {advice}"
        )
    missing = report["missing_keys"]
    if missing:
        raise CheckpointError(
            f"tensor '{min(missing)}' of the model ({model}) is not in '{path}' ({len(missing)} are "
            f"missing); {advice}"
        )


def _config(path: str) -> transformers.PreTrainedConfig:
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationError(
            f"the config.json of '{path}' is not one that transformers {transformers.__version__} reads "
            f"({reason}); download the checkpoint again, or use a newer transformers."
        ) from error
    if hasattr(config, "quantization_config"):
        # transformers would look for kernels; what is quantised outside the experts is decoded instead.
        del config.quantization_config
    return config


def _model_class(config: transformers.PreTrainedConfig) -> type[transformers.PreTrainedModel]:
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise ConfigurationError(
            f"the model type {config.model_type!r} has no causal language model in transformers "
            f"{transformers.__version__}; give a text model with experts."
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _expertless(model_class: type[transformers.PreTrainedModel]) -> type[transformers.PreTrainedModel]:
    """A subclass whose experts are taken out as soon as the model is built on the meta device.

    It has the name of the original, by which transformers finds the renamings of a family's tensors.
    """

    def build(self: nn.Module, config: Any, *arguments: Any, **options: Any) -> None:
        model_class.__init__(self, config, *arguments, **options)
        for block in find_experts(self):
            weights = self.get_submodule(block.path).parameters()
            assert all(weight.is_meta for weight in weights), "transformers allocated expert weights"
            replace_module(self, block.path, UnloadedExperts(block))

    return type(
        model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__}
    )
