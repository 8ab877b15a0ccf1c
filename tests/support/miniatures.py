"""Miniature checkpoints of the model families, by the release that each is like: a few MB, random weights.

    from miniatures import MINIATURES
    folder = MINIATURES["gpt-oss-20b"].write(tmp_path / "model")    config.json, tokenizer, safetensors

A miniature has the real architecture's class, the names and dtypes of the release's tensors, and its
quantisation_config; only the sizes are small. The same bytes every time. How they are made:
tests/serving/tiny_models.py (unquantised) and tests/serving/tiny_quantised.py.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))

import tiny_models
import tiny_quantised
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Miniature:
    """`like`: the release. `method`: of its experts. `source`: the family of tiny_models.py, or the layout of
    tiny_quantised.py. `write(folder)` makes the folder, and returns it."""

    name: str
    like: str
    method: str
    source: str
    write: Callable[[Path], Path]


def _plain(name: str, like: str, family: str, **changes: object) -> Miniature:
    return Miniature(name, like, "BF16", family, lambda folder: tiny_models.build(family, folder, **changes))


def _quantised(layout: str, name: str = "") -> Miniature:
    row = tiny_quantised.LAYOUTS[layout]
    return Miniature(
        name or layout, row.like, row.method, layout, lambda folder: _served_alone(layout, folder)
    )


def _served_alone(layout: str, folder: Path) -> Path:
    """Without the twin of decoded weights that is written beside it."""
    with tempfile.TemporaryDirectory() as made:
        tiny_quantised.build(layout, Path(made))
        return Path(shutil.move(Path(made) / "served", folder))


def _kimi_k25(folder: Path) -> Path:
    """Kimi-K2's language model inside a model with pictures, whose tower is left out."""
    _served_alone("kimi-k2-thinking", folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    save_file(
        {f"language_model.{name}": tensor for name, tensor in tensors.items()}, weights, {"format": "pt"}
    )
    text = json.loads(config.read_text())
    nested = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": {**text, "model_type": "kimi_k2"},
        "vision_config": {"model_type": "kimi_k25_vision"},
        **{name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    config.write_text(json.dumps(nested, indent=2))
    return folder


_ALL = (
    _plain("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "qwen3_moe"),
    _plain("qwen2-57b-a14b", "Qwen/Qwen2-57B-A14B-Instruct", "qwen2_moe"),
    _plain("qwen3-next", "Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next"),
    _plain("qwen3.5-moe", "Qwen/Qwen3.5-35B-A3B, its language model", "qwen3_5_moe"),
    _plain("mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral"),
    _plain("glm-4.5", "zai-org/GLM-4.5-Air", "glm4_moe"),
    _plain("gpt-oss-bf16", "unsloth/gpt-oss-20b-BF16", "gpt_oss"),
    _plain("ernie-4.5", "baidu/ERNIE-4.5-21B-A3B-PT", "ernie4_5_moe"),
    _plain("hunyuan-a13b", "tencent/Hunyuan-A13B-Instruct", "hunyuan_v1_moe"),
    _plain("deepseek-v3.2-bf16", "deepseek-ai/DeepSeek-V3.2, in bfloat16", "deepseek_v32"),
    _plain("deepseek-v4-bf16", "deepseek-ai/DeepSeek-V4-Flash, in bfloat16", "deepseek_v4"),
    _plain("glm-5", "zai-org/GLM-5", "glm_moe_dsa"),
    _plain("kimi-linear", "moonshotai/Kimi-Linear-48B-A3B-Instruct", "kimi_linear"),
    _quantised("gpt-oss", "gpt-oss-20b"),
    _quantised("qwen3-fp8", "qwen3-30b-a3b-fp8"),
    _quantised("kimi-k2-instruct"),
    _quantised("compressed-mxfp4", "kimi-k3-experts"),
    _quantised("compressed-nvfp4"),
    _quantised("qwen3-gptq-int4"),
    _quantised("qwen3-nvfp4"),
    _quantised("deepseek-v3"),
    _quantised("glm-4.7-fp8"),
    _quantised("kimi-k2-thinking"),
    Miniature("kimi-k2.5", "moonshotai/Kimi-K2.5, its language model", "RAWINT4", "kimi-k2.5", _kimi_k25),
    _quantised("minimax-m2"),
    _quantised("minimax-m3"),
)

MINIATURES: dict[str, Miniature] = {miniature.name: miniature for miniature in _ALL}
