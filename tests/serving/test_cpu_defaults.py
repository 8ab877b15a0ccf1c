"""The sizes of the KV cache and of the pool of states, chosen when the user leaves them open. No server."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from kt_kernel import usable_memory
from kt_kernel.integrations.sglang import cpu_defaults, recurrent_states
from kt_kernel.kv_budget import (
    LEAST_STATES,
    LEAST_TOKENS,
    MOST_KV_BYTES,
    MOST_STATES,
    most_cached_tokens,
    most_states,
)
from kt_kernel.planning.config_facts import sizes_of_config
from kt_kernel.planning.requests import kv_bytes

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


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_plan_counts_the_bytes_that_the_server_counts(family, ranks, tmp_path):
    from sglang.srt.configs.model_config import ModelConfig

    path = tiny_models.build(family, tmp_path / "model")
    model = ModelConfig(str(path), dtype="bfloat16")
    sizes = sizes_of_config(json.loads((path / "config.json").read_text()))
    assert cpu_defaults.kv_bytes_per_token(model, ranks) == kv_bytes(sizes, ranks, 2)
    if config := recurrent_states.text_config(model):
        per_state = recurrent_states.bytes_per_state(config, ranks, None, torch.bfloat16)
        assert per_state == sizes.states.bytes(4, 2) // ranks > 0
        # one layer of four has a cache
        assert sizes.kv_values_per_token == 2 * model.get_num_kv_heads(1) * model.head_dim


def test_the_cache_is_an_eighth_of_what_the_control_group_leaves(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    monkeypatch.setattr(usable_memory, "_own_groups", lambda: iter([tmp_path]))
    config = SimpleNamespace()
    model = SimpleNamespace(
        hf_text_config=config,
        get_num_kv_heads=lambda ranks: 8,
        num_hidden_layers=8,
        head_dim=128,
        dtype=torch.bfloat16,
        context_len=1 << 20,
    )
    chosen = cpu_defaults.choose(SimpleNamespace(sleep_on_idle=True, max_total_tokens=None, tp_size=1), model)
    assert chosen["max_total_tokens"] == GIB // 8 // (8 * 2 * 8 * 128 * 2)


def test_the_states_of_a_large_model_do_not_take_the_experts_memory():
    # Qwen3-Next-80B-A3B: 36 of 48 layers, 32 heads of 128 x 128 in float32, three inputs of 8192 channels
    config = SimpleNamespace(
        linear_num_value_heads=32,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_conv_kernel_dim=4,
        num_hidden_layers=48,
        layers_block_type=[*["linear_attention"] * 3, "attention"] * 12,
    )
    size = recurrent_states.bytes_per_state(config, 1, None, torch.bfloat16)
    assert size == 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert most_states(size, 512 * GIB) == MOST_KV_BYTES // size
    assert most_states(size, 2 * GIB) == LEAST_STATES
    assert most_states(200_000, 24 * GIB) == MOST_STATES
