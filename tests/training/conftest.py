"""Tiny checkpoints of the families that are trained here, a few hundred KB each."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))

import tiny_models

# Two layers; of DeepSeek and GLM the first is dense. Sizes are multiples of what every format packs together.
_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
_FEW = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
_SIZES = {
    "qwen3_moe": _SMALL | _FEW,
    "mixtral": _SMALL | {"intermediate_size": 32, "num_local_experts": 4},
    "glm4_moe": _SMALL | {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "rope_scaling": None,
        "max_position_embeddings": 256,
    },
    "minimax_m2": _SMALL
    | {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 8},
}
FAMILIES = tuple(_SIZES)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, changes of its configuration) -> the folder of its checkpoint, built on first use."""
    root = tmp_path_factory.mktemp("training")

    @functools.cache
    def build(family: str = "qwen3_moe", **changes: object) -> Path:
        folder = root / f"{family}-{len(list(root.iterdir()))}"
        return tiny_models.build(family, folder, **{**_SIZES[family], **changes})

    return build


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Matrices are tiny here: torch's threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
