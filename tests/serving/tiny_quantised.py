"""Tiny quantised checkpoints in the layout of published ones, each with a twin of the decoded weights.

    <path>/served    what is downloaded: quantised tensors, and a config.json that says how
    <path>/decoded   the same model in float32 without quantisation, for transformers
    <path>/experts   only where the experts lie in a directory of their own

Which tensors are quantised, their names and the words of quantization_config are the named model's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import quantised
import tiny_models
import torch
from safetensors.torch import load_file, save_file

SEED = 1
_WEIGHTS = "model.safetensors"

# DeepSeek-V4's names. SGLang cannot run that model on a CPU, but its experts under another model's rest.
_SERVED_APART = re.compile(r"layers\.\d+\.ffn\.experts\.")

_EXPERTS = r"\.experts\.\d+\.\w+_proj"
_ATTENTION = r"\.self_attn\.\w+_proj(_with_mqa)?"
_DENSE_MLP = r"\.mlp\.(shared_experts\.)?\w+_proj"
_ALL_LINEAR = f"({_EXPERTS}|{_ATTENTION}|{_DENSE_MLP})$"


@dataclass(frozen=True)
class Layout:
    """`method`: of the experts.
    `like`: the model whose layout it is.
    `quantised`: matches the names, without .weight, of the tensors that are stored quantised.
    `published`: from a tensor of transformers to its parts (views), by their published names.
    """

    method: str
    like: str
    family: str
    quantised: str
    make: quantised.Maker
    quantization_config: Mapping[str, object]
    changes: Mapping[str, object] = field(default_factory=dict)
    published: Callable[[str, torch.Tensor], quantised.Tensors] = lambda name, tensor: {name: tensor}
    served_config: Mapping[str, object] = field(default_factory=dict)
    also_written: Callable[[Path, Mapping[str, object]], None] = lambda path, config: None
    more_tensors: Callable[[str], quantised.Tensors] = lambda name: {}


def _write_modelopt_file(path: Path, config: Mapping[str, object]) -> None:
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": config["ignore"],
    }
    content = {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": quantization}
    (path / "hf_quant_config.json").write_text(json.dumps(content))


def _kv_cache_scales(name: str) -> quantised.Tensors:
    part = {"k_proj": "k_scale", "v_proj": "v_scale"}.get(name.rpartition(".")[2])
    return {part: torch.tensor(1.0)} if part else {}


def _compressed_tensors(format_name: str, ignore: list[str], weights: dict) -> dict[str, object]:
    common = {"dynamic": False, "symmetric": True, "actorder": None, "observer": "minmax"}
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": format_name,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {**group, "weights": {**common, **weights}}},
    }


def _deepseek_v4_names(name: str, tensor: torch.Tensor) -> quantised.Tensors:
    found = re.fullmatch(r"model\.(layers\.\d+)\.mlp(\.experts\.\d+)\.(gate|up|down)_proj\.weight", name)
    if found is None:
        return {name: tensor}
    layer, expert, projection = found.groups()
    short = {"gate": "w1", "up": "w3", "down": "w2"}[projection]
    return {f"{layer}.ffn{expert}.{short}.weight": tensor}


def _gpt_oss_names(name: str, tensor: torch.Tensor) -> quantised.Tensors:
    """transformers stores the transpose of the matrices that are published."""
    return {name: tensor.transpose(1, 2) if name.endswith("_proj") else tensor}


def _minimax_m3_names(name: str, tensor: torch.Tensor) -> quantised.Tensors:
    """transformers fuses gate and up, and all experts of a layer; the checkpoint has neither."""
    if ".mlp.gate.e_score_correction_bias" in name:
        return {name.replace(".mlp.gate.", ".block_sparse_moe."): tensor}
    if ".mlp.gate." in name or ".shared_experts." in name or ".experts." in name:
        name = name.replace(".mlp.", ".block_sparse_moe.")
    if name.endswith(".experts.down_proj"):
        stem = name.removesuffix("down_proj")
        return {f"{stem}{expert}.w2.weight": matrix for expert, matrix in enumerate(tensor)}
    if name.endswith(".experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        halves = [(expert, *matrix.chunk(2)) for expert, matrix in enumerate(tensor)]
        return {f"{stem}{expert}.w1.weight": gate for expert, gate, _ in halves} | {
            f"{stem}{expert}.w3.weight": up for expert, _, up in halves
        }
    if name.endswith(".gate_up_proj.weight"):
        gate, up = tensor.chunk(2)
        return {name.replace("gate_up_proj", "gate_proj"): gate, name.replace("gate_up_proj", "up_proj"): up}
    return {name: tensor}


LAYOUTS = {
    "deepseek-v3": Layout(
        method="FP8",
        like="deepseek-ai/DeepSeek-V3",
        family="deepseek_v3",
        quantised=_ALL_LINEAR,
        make=quantised.fp8_blocks(torch.float32),
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        changes={"moe_intermediate_size": 256},
    ),
    "minimax-m2": Layout(
        method="FP8",
        like="MiniMaxAI/MiniMax-M2",
        family="minimax_m2",
        quantised=rf"\.experts\.\d+\.w[123]$|{_ATTENTION}$",
        make=quantised.fp8_blocks(torch.float32),
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
        served_config={
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
        },
    ),
    "glm-4.7-fp8": Layout(
        method="FP8_PERCHANNEL",
        like="zai-org/GLM-4.7-FP8",
        family="glm4_moe",
        quantised=_ALL_LINEAR,
        make=quantised.fp8_rows,
        quantization_config=_compressed_tensors(
            "float-quantized",
            ["lm_head", "re:.*mlp.gate$"],
            {"num_bits": 8, "type": "float", "strategy": "channel"},
        ),
    ),
    "kimi-k2-thinking": Layout(
        method="RAWINT4",
        like="moonshotai/Kimi-K2-Thinking",
        family="deepseek_v3",
        quantised=f"{_EXPERTS}$",
        make=quantised.packed_int4(32),
        quantization_config=_compressed_tensors(
            "pack-quantized",
            [
                "lm_head",
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            ],
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        ),
        changes={"n_group": 1, "topk_group": 1},
    ),
    "qwen3-gptq-int4": Layout(
        method="GPTQ_INT4",
        like="Qwen/Qwen3-30B-A3B-GPTQ-Int4",
        family="qwen3_moe",
        quantised=_ALL_LINEAR,
        make=quantised.gptq_int4(128),
        quantization_config={
            "bits": 4,
            "checkpoint_format": "gptq",
            "desc_act": False,
            "group_size": 128,
            "lm_head": False,
            "quant_method": "gptq",
            "sym": True,
            "true_sequential": True,
        },
        changes={"moe_intermediate_size": 256},
    ),
    "qwen3-nvfp4": Layout(
        method="NVFP4",
        like="nvidia/Qwen3-30B-A3B-NVFP4",
        family="qwen3_moe",
        quantised=_ALL_LINEAR,
        make=quantised.nvfp4,
        quantization_config={
            "quant_algo": "NVFP4",
            "quant_method": "modelopt",
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "ignore": ["lm_head", "model.layers.*.mlp.gate"],
            "config_groups": {
                "group_0": {
                    "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                    "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                    "targets": ["Linear"],
                }
            },
        },
        also_written=_write_modelopt_file,
        more_tensors=_kv_cache_scales,
    ),
    "gpt-oss": Layout(
        method="MXFP4",
        like="openai/gpt-oss-20b",
        family="gpt_oss",
        quantised=r"\.experts\.(gate_up|down)_proj$",
        make=quantised.mxfp4_blocks,
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        published=_gpt_oss_names,
        served_config={
            "initial_context_length": 1024,
            "experts_per_token": 4,
            "hidden_act": "silu",
            "rope_theta": 150000.0,
        },
    ),
    "qwen3-fp8": Layout(
        method="FP8",
        like="Qwen/Qwen3-30B-A3B-FP8",
        family="qwen3_moe",
        quantised=_ALL_LINEAR,
        make=quantised.fp8_blocks(torch.bfloat16),
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
        },
    ),
    "kimi-k2-instruct": Layout(
        method="FP8",
        like="moonshotai/Kimi-K2-Instruct",
        family="deepseek_v3",
        quantised=_ALL_LINEAR,
        make=quantised.fp8_blocks(torch.float32),
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        changes={"moe_intermediate_size": 256, "n_group": 1, "topk_group": 1},
    ),
    "compressed-mxfp4": Layout(
        method="MXFP4",
        like="moonshotai/Kimi-K3, the format of its experts",
        family="qwen3_moe",
        quantised=f"{_EXPERTS}$",
        make=quantised.mxfp4_packed,
        quantization_config=_compressed_tensors(
            "mxfp4-pack-quantized",
            ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"],
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": "torch.uint8",
            },
        ),
    ),
    "compressed-nvfp4": Layout(
        method="NVFP4",
        like="RedHatAI/Qwen3-30B-A3B-NVFP4",
        family="qwen3_moe",
        quantised=_ALL_LINEAR,
        make=quantised.nvfp4_packed,
        quantization_config=_compressed_tensors(
            "nvfp4-pack-quantized",
            ["lm_head", "re:.*mlp.gate$"],
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
    ),
    "deepseek-v4-experts": Layout(
        method="MXFP4",
        like="deepseek-ai/DeepSeek-V4-Flash, its experts",
        family="deepseek_v3",
        quantised=r"\.ffn\.experts\.\d+\.w[123]$",
        make=quantised.mxfp4,
        quantization_config={},
        published=_deepseek_v4_names,
    ),
    "minimax-m3": Layout(
        method="MXFP8",
        like="MiniMaxAI/MiniMax-M3-MXFP8, its language model without sparse attention",
        family="minimax_m3",
        quantised=rf"\.experts\.\d+\.w[123]$|{_ATTENTION}$|\.(mlp|shared_experts)\.(gate|up|down)_proj$",
        make=quantised.mxfp8,
        quantization_config={
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [1, 32],
        },
        published=_minimax_m3_names,
        served_config={
            "architectures": ["MiniMaxM3SparseForCausalLM"],
            "model_type": "minimax_m2",
            "hidden_act": "swigluoai",
            "use_gemma_norm": True,
            "use_qk_norm": True,
            "qk_norm_type": "per_head",
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "n_shared_experts": 1,
            "moe_layer_freq": [0, 1, 1, 1],
            "sparse_attention_config": {
                "sparse_attention_freq": [0, 0, 0, 0],
                "sparse_num_index_heads": 4,
                "sparse_index_dim": 64,
                "sparse_block_size": 128,
                "sparse_topk_blocks": 16,
                "sparse_init_block": 0,
                "sparse_local_block": 1,
            },
        },
    ),
}


# gpt-oss is served by test_gpt_oss.py, as the biases of its experts do not move to a device yet; the others'
# formats are served in another layout, and read in tests/transformers.
_APART = ("gpt-oss", "qwen3-fp8", "kimi-k2-instruct", "compressed-mxfp4", "compressed-nvfp4")
SERVED = tuple(name for name in LAYOUTS if name not in _APART)


def build(name: str, path: Path) -> Path:
    """Write the checkpoints of one row of LAYOUTS under `path`; the same bytes every time."""
    layout = LAYOUTS[name]
    served, decoded = path / "served", path / "decoded"
    tiny_models.build(layout.family, served, **layout.changes)
    shutil.copytree(served, decoded)
    torch.manual_seed(SEED)
    stored = {}
    meant = {name: tensor.float() for name, tensor in sorted(load_file(served / _WEIGHTS).items())}
    for twin_name, twin in meant.items():
        for name, part in layout.published(twin_name, twin).items():
            stored |= _store(layout, name, part)
    apart = {name: tensor for name, tensor in stored.items() if _SERVED_APART.match(name)}
    save_file(
        {name: stored[name] for name in stored if name not in apart}, served / _WEIGHTS, {"format": "pt"}
    )
    if apart:
        (path / "experts").mkdir()
        save_file(apart, path / "experts" / _WEIGHTS, {"format": "pt"})
    save_file(meant, decoded / _WEIGHTS, {"format": "pt"})
    if layout.quantization_config:
        _change_config(served, quantization_config=dict(layout.quantization_config))
    _change_config(served, **layout.served_config)
    _change_config(decoded, dtype="float32")
    layout.also_written(served, layout.quantization_config)
    return path


def _store(layout: Layout, name: str, tensor: torch.Tensor) -> quantised.Tensors:
    """The stored tensors; a quantised one's decoded values replace those in `tensor`."""
    stem = name.removesuffix(".weight")
    if not re.search(layout.quantised, stem):
        return {name: tensor.bfloat16()}
    parts, decoded = layout.make(*tensor.shape, tensor.std().item())
    tensor.copy_(decoded)
    parts |= layout.more_tensors(stem)
    return {stem + (part if part.startswith("_") else f".{part}"): value for part, value in parts.items()}


def _change_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=2))
