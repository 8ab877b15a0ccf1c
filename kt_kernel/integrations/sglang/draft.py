"""The experts of a draft model (speculative decoding): placed as the model's own where the weight path has
them, else they are SGLang's, on the device, and the log says how many bytes that is.

A draft model that is one more decoder layer of the checkpoint (MTP, "NextN") becomes a hybrid model of its
own, with one layer: its steps alternate with the model's, so neither may see the other's order of layers.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

from kt_kernel.checkpoint.sources import open_experts
from kt_kernel.errors import ConfigurationError
from kt_kernel.hybrid.layout import ExpertLayout, expert_layout
from kt_kernel.hybrid.options import ON_CPU
from kt_kernel.integrations.sglang.settings import KTSettings

logger = logging.getLogger(__name__)

# Speculation without a second model.
_WITHOUT_DRAFT_MODEL = (None, "NGRAM", "UNO")

# SGLang 0.5.23 builds the draft model of these as decoder layer 0, from the layer behind the last one.
_NEXT_LAYER_DRAFTS = (
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmMoeDsaForCausalLM",
    "Qwen3NextForCausalLM",
)


def with_draft(settings: KTSettings, options: Any, model: Any) -> KTSettings:
    """The settings, with those of the draft model if its experts are placed as the model's own.

    `options`: SGLang's; `model`: its ModelConfig. Raises ConfigurationError for a draft model with experts
    whose size cannot be told.
    """
    algorithm = options.speculative_algorithm
    if algorithm is None or algorithm.upper() in _WITHOUT_DRAFT_MODEL:
        return settings
    path = options.speculative_draft_model_path or options.model_path
    same = os.path.realpath(path) == os.path.realpath(options.model_path)
    layer = settings.layout.num_layers
    if same and model.hf_config.architectures[0] in _NEXT_LAYER_DRAFTS:
        method = open_experts(settings.options.weight_path).draft_method(layer)
        if method is not None:
            draft = draft_settings(settings, method)
            logger.info(
                "the draft model's layer %d: %d of its %d experts on the device, as many as other layers "
                "have on average; the others on the CPU (method %s)",
                layer,
                draft.device_experts,
                draft.layout.num_experts,
                method,
            )
            return replace(settings, draft=draft)
    _say_how_many_bytes(path, options, settings.layout if same else None)
    return settings


def draft_settings(settings: KTSettings, method: str) -> KTSettings:
    """One layer behind the model's last one, with as many experts on the device as the others on average.

    Nothing is deferred, streamed or moved: what a single layer could gain is not worth slots of its own.
    """
    layout = settings.layout
    layer = layout.num_layers
    options = replace(
        settings.options,
        method=method,
        num_gpu_experts=settings.device_experts // len(layout.moe_layers),
        gpu_experts_ratio=None,
        expert_placement_strategy="uniform",
        init_expert_location=None,
        max_deferred_experts_per_token=0,
        gpu_prefill_token_threshold=0,
        enable_dynamic_expert_update=False,
        expert_update_interval=0,
        miss_policy=ON_CPU,
    )
    return replace(
        settings,
        options=options,
        layout=ExpertLayout(layer + 1, layout.num_experts, (layer,)),
        records=False,
        for_draft_model=True,
    )


def _say_how_many_bytes(path: str, options: Any, layout: ExpertLayout | None) -> None:
    """`layout`: the model's, where the draft model is in the same checkpoint."""
    if layout is None and not _has_experts(path, options):
        return
    if not os.path.isdir(path):
        raise ConfigurationError(
            f"the draft model {path} has experts, which would all be on the device, and how many bytes they "
            "are cannot be told before it is downloaded; give --speculative-draft-model-path a directory."
        )
    experts = open_experts(path)
    size = experts.expert_bytes()
    if layout is not None:
        size -= sum(of for layer, of in experts.layer_bytes().items() if layer < layout.num_layers)
    if size:
        logger.warning(
            "the experts of the draft model %s are not placed by the --kt flags: all of them are on the "
            "device, %.1f MB",
            path,
            size / 1e6,
        )


def _has_experts(path: str, options: Any) -> bool:
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(path, trust_remote_code=options.trust_remote_code)
    try:
        expert_layout(config)
    except ConfigurationError:
        return False
    return True
