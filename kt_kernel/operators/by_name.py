"""Functions that SGLang imports from `sgl_kernel` by name, instead of calling `torch.ops.sgl_kernel`.

NAMES: module -> {name: function}; where the gate is open, the stand-in for that module has them
(third_party/sglang-0.5.23-cpu).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kt_kernel.operators import speculative

PAD_SLOT = -1
_SILU = ("silu", "swish")
_operators = torch.ops.sgl_kernel
IS_PACKED = True


def causal_conv1d_fn_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = "silu",
    conv_states: torch.Tensor,
    has_initial_state: torch.Tensor | None = None,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    pad_slot_id: int = PAD_SLOT,
    **_: Any,
) -> torch.Tensor:
    """Prompts: `x` [channels, tokens], a transposed view -> the same."""
    silu = activation in _SILU
    return _operators.causal_conv1d_fwd_cpu(
        *(x.t(), weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state),
        *(silu, pad_slot_id, IS_PACKED),
    ).t()


def causal_conv1d_update_cpu(
    x: torch.Tensor,
    conv_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    conv_state_indices: torch.Tensor,
    pad_slot_id: int = PAD_SLOT,
    **drafts: torch.Tensor | None,
) -> torch.Tensor:
    """Decoding: `x` [requests, channels], or [requests, channels, drafts], a transposed view -> the same."""
    given = (weight, bias, activation in _SILU, conv_state_indices, pad_slot_id, IS_PACKED)
    if x.dim() == 2:
        return _operators.causal_conv1d_update_cpu(x, conv_states, *given, **drafts)
    out = _operators.causal_conv1d_update_cpu(x.transpose(1, 2), conv_states, *given, **drafts)
    return out.transpose(1, 2)


def chunk_gated_delta_rule_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    head_first: bool = False,
) -> tuple[torch.Tensor, None, None]:
    """Prompts: -> (results, None, None): the states stay in their pool, and none is kept on the way."""
    out = _operators.chunk_gated_delta_rule_cpu(
        *(q, k, v, g, beta, initial_state, cu_seqlens, use_qk_l2norm_in_kernel, initial_state_indices)
    )
    return out, None, None


def _by_name(*functions: Callable) -> dict[str, Callable]:
    return {function.__name__: function for function in functions}


NAMES: dict[str, dict[str, Callable]] = {
    "sgl_kernel": _by_name(
        speculative.assign_draft_cache_locs_contiguous_cpu,
        speculative.assign_extend_cache_locs_cpu,
        speculative.assign_req_to_token_pool_cpu,
        speculative.build_draft_decode_metadata_cpu,
        speculative.build_tree_kernel_efficient_cpu,
        speculative.copy_all_layer_kv_cache_cpu,
        speculative.fill_accept_out_cache_loc_cpu,
        speculative.fill_bonus_tokens_cpu,
        speculative.rotate_input_ids_cpu,
        speculative.verify_tree_greedy_cpu,
    ),
    "sgl_kernel.mamba": _by_name(causal_conv1d_fn_cpu, causal_conv1d_update_cpu, chunk_gated_delta_rule_cpu),
    "sgl_kernel.speculative": _by_name(speculative.reconstruct_indices_from_tree_mask),
}
