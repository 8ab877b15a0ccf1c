"""The size of the KV cache that is chosen when the user leaves it open. No server."""

from __future__ import annotations

import pytest

from kt_kernel.integrations.sglang.cpu_defaults import LEAST_TOKENS, MOST_KV_BYTES, most_cached_tokens

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
