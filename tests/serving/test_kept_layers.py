"""Quantised dense layers stay in their format, and SGLang finds the right layer for each of them.

The checks need SGLang, so they run in an interpreter of their own: inside_kept_layers.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import tiny_quantised
from gguf_mixed import write_mixed
from gguf_published import write_published
from safetensors.torch import load_file
from server import clean_environment, free_port
from transformers import AutoConfig

# What int8 activations add to the rounding of decoded weights.
MOST_DIFFERENCE = 0.012

# family of tiny_models.py -> architecture of the GGUF file
FILES = {"mixtral": "llama", "deepseek_v3": "deepseek2"}

# Of the second layer, and outside of layers. kv_b_proj, routers and embeddings are decoded.
KEPT = {
    "deepseek-v3": {
        "layers.1.self_attn.fused_qkv_a_proj_with_mqa": "FP8+FP8",
        "layers.1.self_attn.q_b_proj": "FP8",
        "layers.1.self_attn.o_proj": "FP8",
        "layers.1.mlp.shared_experts.gate_up_proj": "FP8+FP8",
        "layers.1.mlp.shared_experts.down_proj": "FP8",
    },
    "qwen3-gptq-int4": {
        "layers.1.self_attn.qkv_proj": "GPTQ_INT4+GPTQ_INT4+GPTQ_INT4",
        "layers.1.self_attn.o_proj": "GPTQ_INT4",
    },
    "mixtral": {
        "layers.1.self_attn.qkv_proj": "Q4_K+Q4_K+Q6_K",
        "layers.1.self_attn.o_proj": "Q5_K",
        "lm_head": "Q6_K",
    },
    "deepseek_v3": {
        "layers.1.self_attn.fused_qkv_a_proj_with_mqa": "Q4_K+Q4_K",
        "layers.1.self_attn.q_b_proj": "Q8_0",
        "layers.1.self_attn.o_proj": "Q5_K",
        "layers.1.mlp.shared_experts.gate_up_proj": "Q4_K+Q4_K",
        "layers.1.mlp.shared_experts.down_proj": "Q8_0",
        "lm_head": "Q6_K",
    },
}


def build(name: str, path: Path) -> Path:
    """The model that is given to the server."""
    if name in tiny_quantised.LAYOUTS:
        return tiny_quantised.build(name, path) / "served"
    checkpoint = tiny_models.build(name, path / "checkpoint")
    tensors, config = load_file(checkpoint / "model.safetensors"), AutoConfig.from_pretrained(checkpoint)
    plain = write_published(FILES[name], config, tensors, path / "plain.gguf")
    return write_mixed(plain, path / "mixed.gguf")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], float]]:
    """Checkpoint -> the formats of its kept layers, and the error of the worst one."""
    root = tmp_path_factory.mktemp("kept")
    models = [f"{name}={build(name, root / name)}" for name in KEPT]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("inside_kept_layers.py")), str(free_port()), *models],
        env={**clean_environment(), "KT_SGLANG_CPU_SHIMS": "1", "XDG_CACHE_HOME": str(root / "cache")},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {name: (formats, worst) for name, formats, worst in lines}


@pytest.mark.parametrize("name", KEPT)
def test_each_layer_has_its_own_matrices(found, name):
    formats, worst = found[name]
    short = {layer.removeprefix("model."): kept for layer, kept in formats.items()}
    others = ("layers.0.", "layers.2.", "layers.3.")
    assert {layer: kept for layer, kept in short.items() if not layer.startswith(others)} == KEPT[name]
    assert 0 < worst < MOST_DIFFERENCE
