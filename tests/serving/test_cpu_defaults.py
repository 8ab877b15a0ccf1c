"""The sizes of the KV cache and of the pool of states, chosen when the user leaves them open. No server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kt_kernel.integrations.sglang import recurrent_states
from kt_kernel.integrations.sglang.recurrent_states import LEAST_STATES, MOST_STATES
from kt_kernel.kv_budget import LEAST_TOKENS, MOST_KV_BYTES, most_cached_tokens

GIB = 1 << 30


@pytest.mark.parametrize(
    ("bytes_per_token", "context", "memory", "tokens"),
    [
        # 30 layers x 3 heads x 64 in bf16: a few contexts, although memory would hold more
        (23_040, 8192, 24 * GIB, 4 * 8192),
        # a large model with a long context: the memory decides, up to a limit
        (98_304, 262_144, 512 * GIB, MOST_KV_BYTES // 98_304),
        (98_304, 262_144, 16 * GIB, 2 * GIB // 98_304),
        # too little memory for anything is for the user to see, not for a cache of no tokens
        (98_304, 262_144, GIB // 4, LEAST_TOKENS),
    ],
)
def test_the_cache_is_bounded_by_memory_and_by_use(bytes_per_token, context, memory, tokens):
    assert most_cached_tokens(bytes_per_token, context, memory) == tokens


def test_the_states_of_a_large_model_do_not_take_the_experts_memory():
    # Qwen3-Next-80B-A3B: 36 of 48 layers, 32 heads of 128 x 128 in float32, three inputs of 8192 channels
    config = SimpleNamespace(
        linear_num_value_heads=32,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_conv_kernel_dim=4,
        layers_block_type=[*["linear_attention"] * 3, "attention"] * 12,
    )
    size = recurrent_states.bytes_per_state(config, 1, None, torch.bfloat16)
    assert size == 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert recurrent_states.most_states(size, 512 * GIB) == MOST_KV_BYTES // size
    assert recurrent_states.most_states(size, 2 * GIB) == LEAST_STATES
    assert recurrent_states.most_states(200_000, 24 * GIB) == MOST_STATES
