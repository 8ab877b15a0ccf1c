"""The chunk size of a server that streams experts for long prompts, where the user left it open.

SGLang chooses by the memory of the device alone, 4096 tokens below 60 GB; each chunk would stream all
experts (kt_kernel/hybrid/prefill_plan.py). A longer chunk needs memory for its activations, which SGLang sets
aside by the share of memory that weights and KV cache may take.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from kt_kernel.checkpoint.sources import open_experts
from kt_kernel.errors import CheckpointPathError
from kt_kernel.formats.records import RECORDS
from kt_kernel.hybrid.prefill_plan import (
    STREAMED_LAYERS,
    PrefillMachine,
    PrefillMemory,
    PrefillModel,
    choose_chunk,
    slot_bytes,
)
from kt_kernel.integrations.sglang.cpu_defaults import kv_bytes_per_token
from kt_kernel.integrations.sglang.settings import KTSettings

logger = logging.getLogger(__name__)

_INTERMEDIATE_SIZES = ("moe_intermediate_size", "intermediate_size")
_MIB = 1 << 20
# What SGLang sets aside for each token of a chunk when it chooses --mem-fraction-static itself.
_STOCK_BYTES_PER_TOKEN = 1.5 * _MIB


@dataclass(frozen=True)
class OpenChoices:
    """What the user left to the server: looked at before SGLang chooses."""

    chunk: bool
    static_share: bool

    @classmethod
    def of(cls, options: Any) -> OpenChoices:
        return cls(options.chunked_prefill_size is None, options.mem_fraction_static is None)


def choose(settings: KTSettings, options: Any, model: Any, left_open: OpenChoices) -> dict[str, Any]:
    """The ServerArgs fields to set. `options`: SGLang's, with its own choices; `model`: its ModelConfig."""
    if not (left_open.chunk and settings.options.gpu_prefill_token_threshold):
        return {}
    from sglang.srt.utils.common import get_device_memory_capacity

    prefill = prefill_model(model, settings, options.tp_size)
    device_bytes = (get_device_memory_capacity(options.device) or 0) * _MIB
    set_aside = _set_aside(options, device_bytes)
    memory = PrefillMemory(
        total=device_bytes,
        slots=STREAMED_LAYERS * prefill.experts * prefill.slot_bytes,
        residents=settings.device_experts * prefill.slot_bytes,
        activations=math.inf if left_open.static_share else set_aside,
    )
    machine, stock = PrefillMachine(), options.chunked_prefill_size
    choice = choose_chunk(
        prefill,
        machine,
        memory,
        threshold=settings.options.gpu_prefill_token_threshold,
        stock=stock,
        context=model.context_len,
    )
    logger.info(
        "--chunked-prefill-size is not given: %d, because every chunk streams all experts: about %.0f "
        "tokens/s for a prompt of %d, %.0f with SGLang's %d (assuming %s)",
        choice.chunk,
        choice.tokens_per_second,
        choice.prompt,
        choice.stock,
        stock,
        machine,
    )
    chosen = {"chunked_prefill_size": choice.chunk}
    if left_open.static_share and choice.chunk > stock:
        needed = choice.chunk * prefill.activation_bytes_per_token
        chosen["mem_fraction_static"] = static_share(
            options.mem_fraction_static, device_bytes, set_aside, needed
        )
    return chosen


def static_share(share: float, device_bytes: float, set_aside: float, needed: float) -> float:
    """The share of memory for weights and KV cache, lowered if activations need more than `set_aside`."""
    return round(share - max(0.0, needed - set_aside) / device_bytes, 3)


def _set_aside(options: Any, device_bytes: float) -> float:
    """What SGLang leaves free for the activations of its own chunk size."""
    free = device_bytes * (1 - (options.mem_fraction_static or 0))
    return min(free, options.chunked_prefill_size * _STOCK_BYTES_PER_TOKEN)


def prefill_model(model: Any, settings: KTSettings, ranks: int) -> PrefillModel:
    """What the estimate needs of a model, for one of `ranks` devices."""
    config, layout = model.hf_text_config, settings.layout
    intermediate = next(size for name in _INTERMEDIATE_SIZES if (size := getattr(config, name, None)))
    plain = 3 * config.hidden_size * intermediate * 2
    if RECORDS[settings.options.method].encoding.is_bf16:  # copied as numbers, whatever the file holds
        expert_bytes = plain
    else:
        layer_bytes = open_experts(settings.options.weight_path).layer_bytes()
        expert_bytes = layer_bytes[layout.moe_layers[-1]] / layout.num_experts
    return PrefillModel(
        layers=layout.num_layers,
        moe_layers=len(layout.moe_layers),
        experts=layout.num_experts,
        top_k=config.num_experts_per_tok,
        hidden=config.hidden_size,
        intermediate=intermediate // ranks,
        heads=config.num_attention_heads // ranks or 1,
        head_dim=model.head_dim,
        expert_bytes=expert_bytes / ranks,
        slot_bytes=slot_bytes(settings.options.method, expert_bytes, plain) / ranks,
        kv_bytes=kv_bytes_per_token(model, ranks),
        other_bytes=_other_bytes(model.model_path) / ranks,
    )


def _other_bytes(model_path: str) -> int:
    """Of all that is no routed expert; 0 for a model that is still to be downloaded."""
    try:
        model = open_experts(model_path)
    except CheckpointPathError:
        return 0
    return model.stored_bytes() - model.expert_bytes()
