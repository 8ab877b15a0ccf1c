"""Quantised checkpoints on machines without a GPU: the tensors that SGLang's unquantised model loads.

SGLang 0.5.23's kernels for quantised linear layers need a GPU (or AMX). Here SGLang builds the model without
quantisation, and the stream of checkpoint tensors that it loads is changed on its way: a quantised layer's
tensors become one `weight`. Its numbers are decoded to the model's dtype, or only when somebody looks at
them, where layers are kept as they are stored (kept_layers.py). Experts of ours are left out of the stream,
so SGLang never holds them; experts that live on the device are decoded.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kt_kernel.errors import CheckpointError
from kt_kernel.formats.dense_formats import (
    NOT_NEEDED,
    REFUSED,
    DenseFormat,
    Parts,
    is_part,
    matching_format,
)
from kt_kernel.formats.dense_matrix import checkpoint_matrix, decode_parts
from kt_kernel.gguf_model import described_file
from kt_kernel.integrations.sglang import model_file
from kt_kernel.integrations.sglang.served_adapter import with_adapter
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE, KTSettings
from kt_kernel.integrations.sglang.startup_failure import reported_stream
from kt_kernel.integrations.sglang.stored_weight import StoredWeight

logger = logging.getLogger(__name__)

# Values of quant_method in config.json whose layers dense_formats.py decodes. The others stay SGLang's.
DECODED_METHODS = ("fp8", "mxfp8", "compressed-tensors", "gptq", "modelopt", "modelopt_fp4", "modelopt_fp8")

_PLAN_ATTRIBUTE = "_kt_decoding"
_KEEPS_ATTRIBUTE = "_kt_keeps_dense_layers"
_EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?experts\.(\d+)\.")

NamedTensors = Iterable[tuple[str, torch.Tensor]]


# (key of quantization_config, values that can be decoded, the quant_methods that have it)
_REQUIRED = (
    ("bits", (4,), ("gptq",)),
    ("sym", (True,), ("gptq",)),
    ("desc_act", (False,), ("gptq",)),
    ("weight_block_size", (None, [128, 128]), ("fp8",)),
    ("weight_block_size", (None, [1, 32]), ("mxfp8",)),
)


@dataclass(frozen=True)
class DecodingPlan:
    """`config`: the checkpoint's quantization_config; `settings`: which experts to leave out, None = none."""

    config: dict[str, Any]
    settings: KTSettings | None = None

    @property
    def quant_method(self) -> str:
        return _quant_method(self.config)

    def leaves_out(self, name: str) -> bool:
        found = _EXPERT.search(name)
        if self.settings is None or found is None:
            return False
        layer, expert = map(int, found.groups())
        layout = self.settings.layout
        # Layers beyond the model's own belong to a draft model.
        if layer not in layout.moe_layers or expert >= layout.num_experts:
            return False
        return not bool(self.settings.device_mask(layer, layout.num_experts)[expert])


def _quant_method(config: dict[str, Any] | None) -> str:
    return str((config or {}).get("quant_method", "")).lower()


def check_model(model: Any) -> None:
    """Raise CheckpointError if the quantisation of `model`, a ModelConfig, is one that cannot be decoded."""
    plan = getattr(model, _PLAN_ATTRIBUTE, None)
    if plan is None:
        return
    for key, allowed, methods in _REQUIRED:
        seen = plan.config.get(key, allowed[0])
        if plan.quant_method in methods and seen not in allowed:
            raise CheckpointError(
                f"the model {model.model_path} is quantised with {key}={json.dumps(seen)}, expected "
                f"{key}={json.dumps(allowed[-1])}; take a checkpoint quantised that way."
            )


_KT_IS_ON = contextvars.ContextVar("_KT_IS_ON", default=False)


def model_config(original: Callable, server_args: Any, *arguments: Any, **options: Any) -> Any:
    """Around `ModelConfig.from_server_args`: with CPU experts, quantised checkpoints are to be decoded."""
    from sglang.srt.arg_groups.overrides import resolving_view

    token = _KT_IS_ON.set(resolving_view(server_args).kt_weight_path is not None)
    try:
        config = original(server_args, *arguments, **options)
    finally:
        _KT_IS_ON.reset(token)
    plan = getattr(config, _PLAN_ATTRIBUTE, None)
    if plan is not None and not config.is_draft_model:
        settings = getattr(server_args, SETTINGS_ATTRIBUTE, None)
        setattr(config, _PLAN_ATTRIBUTE, replace(plan, settings=settings))
    return config


def checkpoint_quantisation(original: Callable, config: Any) -> dict | None:
    """Around `ModelConfig._parse_quant_hf_config`: None, so that SGLang builds an unquantised model."""
    if hasattr(config, _PLAN_ATTRIBUTE):
        return None
    found = original(config)
    if not _KT_IS_ON.get() or _quant_method(found) not in DECODED_METHODS:
        return found
    setattr(config, _PLAN_ATTRIBUTE, DecodingPlan(found))
    config.quantization = None
    return None


def all_weights(original: Callable, loader: Any, model_config: Any, model: Any) -> NamedTensors:
    """Around `DefaultModelLoader._get_all_weights` on a CPU: decides whether dense layers stay as they are.

    They do where the checkpoint is quantised, our operators are on, and the model computes in 16 bits, on
    one rank.
    """
    from sglang.srt.runtime_context import get_server_args

    from kt_kernel.integrations.sglang.kept_layers import keep_layers
    from kt_kernel.integrations.sglang.packed_linear import packer

    settings = getattr(get_server_args(), SETTINGS_ATTRIBUTE, None)
    quantised = hasattr(model_config, _PLAN_ATTRIBUTE) or described_file(model_config.model_path) is not None
    plain = settings is not None and settings.adapter is None  # what is kept as stored takes no adapter in
    keeps = plain and quantised and hasattr(torch.ops.kt_kernel, "linear")
    setattr(loader, _KEEPS_ATTRIBUTE, keeps and keep_layers(model, model_config, packer(settings.options)))
    return original(loader, model_config, model)


def weights(original: Callable, loader: Any, source: Any, **options: Any) -> NamedTensors:
    """Around `DefaultModelLoader._get_weights_iterator`: the tensors of the unquantised model."""
    file, keeps = described_file(source.model_or_path), getattr(loader, _KEEPS_ATTRIBUTE, False)
    if file is not None:
        read = model_file.stored if keeps else model_file.decoded
        return reported_stream(with_adapter(model_file.weights(file, source, read)))
    stream = iter(original(loader, source, **options))
    plan = getattr(source.model_config, _PLAN_ATTRIBUTE, None)
    if plan is None:
        return reported_stream(with_adapter(stream))
    dtype = source.model_config.dtype
    logger.info(
        "the checkpoint is quantised (%s), and this machine has no GPU for SGLang's kernels: its dense "
        "layers are %s",
        plan.quant_method,
        "kept as they are" if keeps else f"decoded to {str(dtype).removeprefix('torch.')}",
    )
    finish = stored_weight if keeps else decoded_weight
    return reported_stream(with_adapter(decoded(stream, plan, dtype, finish)))


# (layer, format, its parts, dtype) -> the tensor that SGLang's loaders get
Finish = Callable[[str, DenseFormat, Parts, torch.dtype], torch.Tensor]


def decoded_weight(layer: str, row: DenseFormat, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """In memory of its own."""
    return decode_parts(layer, row, parts).to(dtype)


def stored_weight(layer: str, row: DenseFormat, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """As it is, where our kernels can compute with it, and it is not an expert's."""
    matrix = None if _EXPERT.search(f"{layer}.") else checkpoint_matrix(layer, row, parts)
    return decoded_weight(layer, row, parts, dtype) if matrix is None else StoredWeight([matrix], dtype)


def decoded(
    stream: NamedTensors, plan: DecodingPlan, dtype: torch.dtype, finish: Finish = decoded_weight
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gathers the parts of each quantised layer, which may arrive in any order, and passes on the rest."""
    gathered: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in stream:
        if plan.leaves_out(name):
            continue
        layer, _, part = name.rpartition(".")
        if part in REFUSED:
            raise CheckpointError(
                f"tensor '{name}' belongs to a layer with zero points or reordered inputs, which cannot be "
                "decoded; use a symmetric checkpoint without activation order."
            )
        if not is_part(part, tensor):
            yield name, tensor
        elif part not in NOT_NEEDED:
            gathered[layer][part] = tensor
            row = matching_format(gathered[layer])
            if row is not None:
                yield f"{layer}.weight", finish(layer, row, gathered.pop(layer), dtype)
    for layer, parts in gathered.items():
        held = ", ".join(
            f"{part} {str(tensor.dtype).removeprefix('torch.')}" for part, tensor in parts.items()
        )
        raise CheckpointError(
            f"layer '{layer}' is quantised in a way this version cannot decode: the checkpoint holds {held}; "
            "use a checkpoint in one of the formats of --kt-method."
        )
