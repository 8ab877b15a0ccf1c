"""Models whose layers keep a state per request (Qwen3-Next, Qwen3.5) on a machine without a GPU.

What SGLang chooses for them is meant for GPUs: states are kept at fixed places of a prompt by Triton kernels,
their pool takes almost half of the memory, and the convolution's inputs are rounded to bfloat16.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from kt_kernel.errors import ConfigurationError
from kt_kernel.integrations.sglang import cpu_operators
from kt_kernel.integrations.sglang.cpu_defaults import config_values
from kt_kernel.kv_budget import StateValues, most_states
from kt_kernel.usable_memory import usable_memory

logger = logging.getLogger(__name__)

_CONVOLUTION_TYPE = "SGLANG_MAMBA_CONV_DTYPE"


def text_config(model: Any) -> Any | None:
    """The configuration of a model with gated delta rules, None for others. `model`: SGLang's ModelConfig."""
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config

    return hybrid_gdn_config(model)


def choose(options: Any, model: Any) -> dict[str, Any]:
    """The ServerArgs fields to set. `options`: SGLang's options so far."""
    config = text_config(model)
    if config is None:
        return {}
    if not cpu_operators.is_open():
        raise ConfigurationError(
            "this model has layers of gated delta rules, which only kt-kernel's operators compute on a CPU, "
            "and they are off; leave out --kt-cpu-operators off."
        )
    if options.mamba_radix_cache_strategy not in ("auto", "no_buffer"):
        raise ConfigurationError(
            f"--mamba-radix-cache-strategy is {options.mamba_radix_cache_strategy}, whose copies of states "
            "are Triton kernels for GPUs; leave it out, or give no_buffer."
        )
    chosen: dict[str, Any] = {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}
    if options.max_mamba_cache_size is None:
        per_state = bytes_per_state(config, options.tp_size, options.mamba_ssm_dtype, model.dtype)
        chosen["max_mamba_cache_size"] = states = most_states(per_state, usable_memory()[1])
        logger.info(
            "--max-mamba-cache-size is not given: %d states of requests (%.2f GB); give it to change that",
            states,
            states * per_state / 1e9,
        )
    return chosen


def choose_environment(model: Any) -> None:
    """The convolution's last inputs are kept as they are, so that a prompt's results do not depend on how it
    is cut. For this process and its children.
    """
    from sglang.srt.environ import envs

    if text_config(model) is not None and not envs.SGLANG_MAMBA_CONV_DTYPE.is_set():
        envs.SGLANG_MAMBA_CONV_DTYPE.set(str(model.dtype).removeprefix("torch."))


def bytes_per_state(config: Any, tp_size: int, state_type: str | None, dtype: torch.dtype) -> int:
    """Bytes that one request's states take on one rank: a matrix per value head, and a few inputs of the
    convolution.
    """
    values = StateValues.of(config_values(config), config.num_hidden_layers)
    return values.bytes(getattr(torch, state_type or "float32").itemsize, dtype.itemsize) // tp_size
