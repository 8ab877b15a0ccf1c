"""What requests take of memory (keys and values of a token, states of linear attention), and how much of both
a server without a GPU keeps, where the user left it open. For plans and for the server: no torch here.

`text`: the language model's part of config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# SGLang takes most of the free memory for its KV cache, as is right on a GPU: 15 GB for a model of 30 MB on
# a machine with 24 GB. On a CPU that memory is the experts' and the page cache's.
MOST_KV_BYTES = 4 << 30
MOST_KV_SHARE = 1 / 8
# Tokens beyond a few full contexts only help when as many long requests run at once.
MOST_CONTEXTS = 4
LEAST_TOKENS = 2048
# Three states per running request are what SGLang counts with.
LEAST_STATES = 12
# Beyond 64 running requests they only help to find prefixes again.
MOST_STATES = 256


def most_cached_tokens(bytes_per_token: int, context_len: int, memory: int) -> int:
    """How many tokens the KV cache holds: limited by memory (bytes) and by the model's context, never below
    a minimum.
    """
    budget = min(MOST_KV_BYTES, int(memory * MOST_KV_SHARE))
    return max(LEAST_TOKENS, min(budget // max(1, bytes_per_token), MOST_CONTEXTS * context_len))


def most_states(bytes_per_state: int, memory: int) -> int:
    """Limited by memory (bytes) like the KV cache, and by use; never below a minimum."""
    budget = min(MOST_KV_BYTES, int(memory * MOST_KV_SHARE))
    return max(LEAST_STATES, min(budget // max(1, bytes_per_state), MOST_STATES))


def cached_values(text: Mapping[str, Any], layers: int, kv_heads: int, head_dim: int) -> int:
    """Numbers in the KV cache for one token, in all layers that have one."""
    cached = layers_with_cache(text, layers)
    if not (rank := text.get("kv_lora_rank")):
        return cached * 2 * kv_heads * head_dim
    # DeepSeek-V3.2's indexer keeps a key of its own, in 8 bits with a scale: half as many 16-bit numbers.
    indexer = (text.get("index_head_dim") or 0) // 2 + (2 if text.get("index_head_dim") else 0)
    return cached * (rank + (text.get("qk_rope_head_dim") or 0) + indexer)


def layers_with_cache(text: Mapping[str, Any], layers: int) -> int:
    """How many layers keep keys and values; those of linear attention keep a state of fixed size instead."""
    types = text.get("layer_types") or ()
    if len(types) == layers:
        return sum(kind != "linear_attention" for kind in types)
    if full := (text.get("linear_attn_config") or {}).get("full_attn_layers"):  # Kimi-Linear
        return len(full)
    if interval := text.get("full_attention_interval"):
        return layers // interval
    return layers


@dataclass(frozen=True)
class StateValues:
    """Numbers that one request's gated delta rules keep, in all layers: `matrices`, one per value head, and
    the last `inputs` of the convolutions. 0 for models without.
    """

    matrices: int = 0
    inputs: int = 0

    @classmethod
    def of(cls, text: Mapping[str, Any], layers: int) -> StateValues:
        """`layers`: of the whole model."""
        if not text.get("linear_num_value_heads"):
            return cls()
        linear = layers - layers_with_cache(text, layers)
        value_heads, value_dim, key_heads, key_dim, taps = (
            text.get(f"linear_{name}") or 0
            for name in (
                "num_value_heads",
                "value_head_dim",
                "num_key_heads",
                "key_head_dim",
                "conv_kernel_dim",
            )
        )
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        return cls(linear * value_heads * value_dim * key_dim, linear * channels * max(0, taps - 1))

    def bytes(self, matrix_width: int, input_width: int) -> int:
        """Of one request, with so many bytes a number."""
        return self.matrices * matrix_width + self.inputs * input_width
