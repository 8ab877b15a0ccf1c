"""A model path that is a GGUF file: SGLang gets its description, and the weights as a stream out of the file.

Before SGLang looks at its options, the path becomes that of a directory with config.json and the tokenizer
(kt_kernel/gguf_model), so that everything but the loading of weights is as for any checkpoint. SGLang's own
way with such files needs a GPU, and knows few architectures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch

from kt_kernel.gguf.model import open_gguf
from kt_kernel.gguf_model import describe, find_gguf
from kt_kernel.gguf_model.dense import DenseWeights
from kt_kernel.integrations.sglang.flags import KTFlags
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE
from kt_kernel.integrations.sglang.stored_weight import StoredWeight

logger = logging.getLogger(__name__)

_GGUF = "gguf"


def serve_description(arguments: MutableMapping[str, Any]) -> None:
    """Change SGLang's arguments (those of ServerArgs) where the model is a GGUF file and CPU experts are
    asked for: the experts are then read from the same file, unless --kt-weight-path says otherwise.

    Raises a KTError in one sentence if the file cannot be served.
    """
    path = arguments.get("model_path")
    file = find_gguf(path) if path and _cpu_experts_are_asked_for(arguments) else None
    if file is None:
        return
    description = describe(file)
    logger.info("%s is described in %s", file, description.directory)
    arguments["model_path"] = str(description.directory)
    for field, value in (("kt_weight_path", str(file)), ("served_model_name", description.name)):
        if arguments.get(field) is None:
            arguments[field] = value
    for field, value in (("load_format", "auto"), ("quantization", None)):
        if arguments.get(field) == _GGUF:
            arguments[field] = value


def _cpu_experts_are_asked_for(arguments: MutableMapping[str, Any]) -> bool:
    return bool(KTFlags.read(arguments).given()) or arguments.get("kt_method") is not None


# (dense weights, a tensor's name, dtype) -> the tensor that SGLang's loaders get
Read = Callable[[DenseWeights, str, torch.dtype], torch.Tensor]


def decoded(dense: DenseWeights, name: str, dtype: torch.dtype) -> torch.Tensor:
    """In memory of its own."""
    return dense.read(name, dtype)


def stored(dense: DenseWeights, name: str, dtype: torch.dtype) -> torch.Tensor:
    """As it is, where our kernels can compute with it."""
    matrix = dense.stored(name)
    return dense.read(name, dtype) if matrix is None else StoredWeight([matrix], dtype)


def weights(file: Path, source: Any, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of SGLang's model, a `DefaultModelLoader.Source`: all but the experts on the CPU."""
    from sglang.srt.runtime_context import get_server_args

    dtype = source.model_config.dtype
    logger.info(
        "the layers outside the experts are %s from %s",
        "taken as they are" if read is stored else f"decoded to {str(dtype).removeprefix('torch.')}",
        file,
    )
    dense = DenseWeights(open_gguf(file))
    yield from ((source.prefix + name, read(dense, name, dtype)) for name in dense.tensors)
    settings = getattr(get_server_args(), SETTINGS_ATTRIBUTE, None)
    if settings is None or not settings.device_experts:
        return
    for layer in settings.layout.moe_layers:
        mask = settings.device_mask(layer, settings.layout.num_experts)
        on_device = mask.nonzero().flatten().tolist()
        for name, tensor in dense.decoded_experts(layer, on_device, dtype):
            yield source.prefix + name, tensor
