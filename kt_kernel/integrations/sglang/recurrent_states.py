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
from kt_kernel.integrations.sglang.cpu_defaults import usable_memory
from kt_kernel.kv_budget import MOST_KV_BYTES, MOST_KV_SHARE

logger = logging.getLogger(__name__)

# Three of them per running request are what SGLang counts with.
LEAST_STATES = 12
# Beyond 64 running requests they only help to find prefixes again.
MOST_STATES = 256

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
        chosen["max_mamba_cache_size"] = states = most_states(per_state, usable_memory())
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


def most_states(bytes_per_state: int, memory: int) -> int:
    """Limited by memory (bytes) like the KV cache, and by use; never below a minimum."""
    budget = min(MOST_KV_BYTES, int(memory * MOST_KV_SHARE))
    return max(LEAST_STATES, min(budget // bytes_per_state, MOST_STATES))


def bytes_per_state(config: Any, tp_size: int, state_type: str | None, dtype: torch.dtype) -> int:
    """Bytes that one request's states take on one rank: a matrix per value head, and a few inputs of the
    convolution.
    """
    values = config.linear_num_value_heads * config.linear_value_head_dim
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    matrix = values * config.linear_key_head_dim * getattr(torch, state_type or "float32").itemsize
    inputs = (2 * keys + values) * (config.linear_conv_kernel_dim - 1) * dtype.itemsize
    layers = sum(kind == "linear_attention" for kind in config.layers_block_type)
    return layers * (matrix + inputs) // tp_size
