"""Sampling on a CPU: one native operator for temperature, top-k, top-p and min-p.

SGLang's way through torch sorts the whole vocabulary for top-p: 16 ms for one token of 151,936, and 3 ms to
draw one without any filter, against 0.4 and 0.2; two cores of a Zen 4, 2026-11-30 (bench/sampling.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def sample(
    original: Callable,
    sampler: Any,
    logits_output: Any,
    sampling_info: Any,
    return_logprob: Any,
    *arguments: Any,
    logprob_logits: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Around `Sampler.forward`: the ids of the next tokens, int32 [requests]."""
    if return_logprob or logprob_logits is not None or not _is_ours(sampler, logits_output, sampling_info):
        options |= {} if logprob_logits is None else {"logprob_logits": logprob_logits}
        return original(sampler, logits_output, sampling_info, return_logprob, *arguments, **options)
    logits = sampler._preprocess_logits(logits_output.next_token_logits, sampling_info)
    ids = torch.ops.kt_kernel.sample(
        logits,
        sampling_info.temperatures,
        sampling_info.top_ks,
        sampling_info.top_ps,
        sampling_info.min_ps,
        torch.rand(len(logits), dtype=torch.float64),
    )
    sampler._sync_token_ids_across_tp(ids, sampling_info)
    return ids


def _is_ours(sampler: Any, logits_output: Any, sampling_info: Any) -> bool:
    """Seeds of requests are SGLang's own scheme, and its reports need all probabilities."""
    logits = logits_output.next_token_logits
    return (
        logits.dtype == torch.float32
        and logits.device.type == "cpu"
        and logits.is_contiguous()
        and not sampling_info.is_all_greedy
        and sampling_info.sampling_seed is None
        and sampling_info.sampling_mask_batch_indices is None
        and sampler.rl_on_policy_target is None
    )
