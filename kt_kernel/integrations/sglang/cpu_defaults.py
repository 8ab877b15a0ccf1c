"""Defaults for machines without a GPU. Only what the user left open is filled in, and each choice is
logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.integrations.sglang.rank_cores import CORES_OF_RANKS, ranks_of_a_host
from kt_kernel.kv_budget import cached_values, most_cached_tokens
from kt_kernel.threads import cores_of_processes
from kt_kernel.usable_memory import usable_memory

logger = logging.getLogger(__name__)

_THREADS_OF_TORCH = "OMP_NUM_THREADS"


def choose(options: Any, model: Any) -> dict[str, Any]:
    """The ServerArgs fields to set. `options`: SGLang's options so far; `model`: its ModelConfig.

    The overlap schedule looks at a batch's tokens after it has launched the next one. Here a launch returns
    with the results, so that every token only waits for the step after it, and the way around through
    buffers costs 0.4 ms a step (Zen 4, 4 layers, Q4_K_M, 2026-11-30: 1.1 ms between two steps, 1.5 with it).
    """
    chosen: dict[str, Any] = {"disable_overlap_schedule": True}
    if not options.sleep_on_idle:
        # Without it the scheduler polls for requests with 100 % of a core.
        chosen["sleep_on_idle"] = True
    if options.max_total_tokens is None:
        per_token = kv_bytes_per_token(model, options.tp_size)
        tokens = most_cached_tokens(per_token, model.context_len, usable_memory()[1])
        chosen["max_total_tokens"] = tokens
        logger.info(
            "--max-total-tokens is not given: %d tokens of KV cache (%.2f GB); give it to change that",
            tokens,
            tokens * per_token / 1e9,
        )
    return chosen


def choose_environment(options: Any) -> None:
    """Switches of SGLang that are environment variables, for this process and its children.

    MiniMax-M3's router multiplies in bfloat16 by an operation that torch has on GPUs only; the alternative is
    float32. More ranks than NUMA nodes are refused unless somebody says which cores are whose.
    """
    from sglang.srt.environ import envs

    if not envs.SGLANG_OPT_USE_BF16_ROUTER_GEMM.is_set():
        envs.SGLANG_OPT_USE_BF16_ROUTER_GEMM.set(False)
    ranks = ranks_of_a_host(options)
    if ranks * options.nnodes > 1:
        parts = cores_of_processes(kt_kernel_ext.topology(), ranks)
        os.environ.setdefault(CORES_OF_RANKS, as_sglang_reads(parts))
        # Otherwise each rank's torch has a thread for every core, and they spin against each other.
        os.environ.setdefault(_THREADS_OF_TORCH, str(max(1, len(set().union(*parts)) // ranks)))


def as_sglang_reads(parts: Sequence[Sequence[int]]) -> str:
    """The cores of each rank: `0,1|2,3`."""
    return "|".join(",".join(map(str, part)) for part in parts)


def kv_bytes_per_token(model: Any, tp_size: int) -> int:
    """Bytes of KV cache of one token in all layers on one rank, in the model's dtype."""
    heads, layers = model.get_num_kv_heads(tp_size), model.num_hidden_layers
    element = torch.empty((), dtype=model.dtype).element_size()
    return element * cached_values(config_values(model.hf_text_config), layers, heads, model.head_dim)


def config_values(config: Any) -> dict[str, Any]:
    """As config.json has them; SGLang's classes say the layers' kinds by a property."""
    kinds = getattr(config, "layers_block_type", None)
    return vars(config) | ({"layer_types": list(kinds)} if kinds else {})
