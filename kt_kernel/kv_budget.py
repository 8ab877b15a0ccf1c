"""How many tokens the KV cache of a server without a GPU holds, where the user left it open."""

from __future__ import annotations

# SGLang takes most of the free memory for its KV cache, as is right on a GPU: 15 GB for a model of 30 MB on
# a machine with 24 GB. On a CPU that memory is the experts' and the page cache's.
MOST_KV_BYTES = 4 << 30
MOST_KV_SHARE = 1 / 8
# Tokens beyond a few full contexts only help when as many long requests run at once.
MOST_CONTEXTS = 4
LEAST_TOKENS = 2048


def most_cached_tokens(bytes_per_token: int, context_len: int, memory: int) -> int:
    """How many tokens the KV cache holds: limited by memory (bytes) and by the model's context, never below
    a minimum.
    """
    budget = min(MOST_KV_BYTES, int(memory * MOST_KV_SHARE))
    return max(LEAST_TOKENS, min(budget // max(1, bytes_per_token), MOST_CONTEXTS * context_len))
