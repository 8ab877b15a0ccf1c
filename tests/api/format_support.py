"""Shared by the tests of quantised checkpoints: writing every format, and decoding it the slow way.

The decoders below follow the definitions of the formats alone; tests/formats compares them, through the same
loading path, with what other people's software writes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from api_support import TOP_K, random_experts, save_single
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from kt_kernel import KTMoEWrapper
from kt_kernel.checkpoint.formats import FORMATS
from kt_kernel.checkpoint.safetensors_file import TORCH_DTYPES
from kt_kernel.formats.matrices import ExpertMatrix, LayerExperts
from kt_kernel.formats.quantize.experts import quantize_experts

QUANTISED = (
    "FP8",
    "FP8_PERCHANNEL",
    "RAWINT4",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "GPTQ_INT4",
    "AMXINT4",
    "AMXINT8",
)
METHODS = ("BF16", *QUANTISED)

# Multiples of 32, as the formats need, and of nothing larger: blocks of 128 are ragged.
EXPERTS, HIDDEN, INTERMEDIATE, MAX_TOKENS = 6, 160, 96, 64

PROJECTIONS = ("gate", "up", "down")
DEEPSEEK = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")

# Suffixes of codes, scales and global scale as the best known publisher of the format names them.
SUFFIXES = {
    "BF16": ("weight",),
    "FP8": ("weight", "weight_scale_inv"),
    "FP8_PERCHANNEL": ("weight", "weight_scale"),
    "RAWINT4": ("weight_packed", "weight_scale"),
    "MXFP4": ("weight", "scale"),
    "MXFP8": ("weight", "weight_scale_inv"),
    "NVFP4": ("weight", "weight_scale", "weight_scale_2"),
    "GPTQ_INT4": ("qweight", "scales"),
    "AMXINT4": ("weight", "weight_scale"),
    "AMXINT8": ("weight", "weight_scale"),
}

GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def quantised(
    method: str,
    seed: int = 1,
    experts: int = EXPERTS,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
) -> LayerExperts:
    """Random experts in the layout of the method's checkpoints."""
    matrices = random_experts(seed, experts, hidden, intermediate)
    return quantize_experts(method, *(list(tensor.unbind()) for tensor in matrices))


def checkpoint_tensors(
    method: str,
    layer: LayerExperts,
    base: str = "model.layers.0.mlp.experts",
    names: tuple[str, str, str] = DEEPSEEK,
    suffixes: tuple[str, ...] | None = None,
) -> dict[str, torch.Tensor]:
    """The layer's tensors under their names in a checkpoint."""
    tensors = {}
    for name, matrices in zip(names, (layer.gate, layer.up, layer.down), strict=True):
        for expert, matrix in enumerate(matrices):
            parts = (matrix.weight, matrix.scale, torch.tensor(matrix.global_scale))
            for suffix, part in zip(suffixes or SUFFIXES[method], parts, strict=False):
                tensors[f"{base}.{expert}.{name}.{suffix}"] = part.clone()
    return tensors


def save(directory: Path, method: str, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """A checkpoint with the config.json that the method's checkpoints have, or the one given."""
    path = save_single(directory, tensors)
    if config is None and method == "GPTQ_INT4":
        config = {"quantization_config": GPTQ_CONFIG}
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def layer_arguments(method: str, **changes) -> dict:
    arguments = {
        "layer_idx": 0,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "cpuinfer_threads": 2,
        "threadpool_count": 1,
        "weight_path": None,
        "chunked_prefill_size": MAX_TOKENS,
        "method": method,
        "activations": "bf16",
    }
    return {**arguments, **changes}


def make_layer(method: str, **changes) -> KTMoEWrapper:
    return KTMoEWrapper(**layer_arguments(method, **changes))


def load(method: str, path: Path, slots: torch.Tensor | None = None, **changes) -> KTMoEWrapper:
    layer = make_layer(method, weight_path=str(path), **changes)
    layer.load_weights(slots)
    return layer


def random_bits(method: str, n: int, k: int, group_size: int = 32) -> dict[str, torch.Tensor]:
    """One matrix's tensors with the method's shapes and dtypes, full of random bits; fast and large."""
    row = next(row for row in FORMATS if row.method == method)
    (dtype, shape), *_ = row.weight_shapes.items()
    tensors = {row.weight: _random(dtype, shape(n, k, group_size)[0])}
    if row.scales:
        dtype = row.scale_dtypes[0]
        tensors[SUFFIXES[method][1]] = _random(dtype, row.scale_shape(n, k, group_size)[0])
    if row.global_scale is not None:
        tensors[row.global_scale.suffix] = torch.tensor(1.0)
    return tensors


def _random(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    itemsize = TORCH_DTYPES[dtype].itemsize
    # No byte 255: as a power-of-two scale it would be refused.
    raw = torch.randint(0, 255, (*shape[:-1], shape[-1] * itemsize), dtype=torch.uint8)
    return raw.view(TORCH_DTYPES[dtype])


# ---- decoding --------------------------------------------------------------------------------


def decoded(method: str, layer: LayerExperts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 gate, up [E, I, H] and down [E, H, I]: the exact numbers that the tensors stand for."""
    return tuple(
        torch.stack([decode(method, matrix) for matrix in matrices])
        for matrices in (layer.gate, layer.up, layer.down)
    )


def written(method: str, numbers: torch.Tensor) -> torch.Tensor:
    """What a device gets: the exact numbers; of GGUF files, decoded on their way, rounded to bf16."""
    return numbers.bfloat16() if method == "LLAMAFILE" else numbers


def decode(method: str, matrix: ExpertMatrix) -> torch.Tensor:
    """float64 [N, K]."""
    return _DECODERS[method](matrix) * matrix.global_scale


def powers_of_two(scale_bytes: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scale_bytes.view(torch.uint8).double() - 127)


def _spread(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales [N, groups] for each of `columns`."""
    scales = scales.double()
    if scales.dim() == 1:
        scales = scales[:, None]
    return scales.repeat_interleave(-(-columns // scales.shape[1]), dim=1)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [N, b] or words -> codes [N, K], low half first."""
    raw = packed.contiguous().view(torch.uint8)
    return torch.stack([raw & 15, raw >> 4], dim=-1).flatten(1).long()


def _decode_blocks(matrix: ExpertMatrix) -> torch.Tensor:
    n, k = matrix.weight.shape
    scales = matrix.scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return matrix.weight.double() * scales


def _decode_mxfp8(matrix: ExpertMatrix) -> torch.Tensor:
    return matrix.weight.double() * powers_of_two(matrix.scale).repeat_interleave(32, 1)


def _decode_mxfp4(matrix: ExpertMatrix) -> torch.Tensor:
    return E2M1[_nibbles(matrix.weight)] * powers_of_two(matrix.scale).repeat_interleave(32, 1)


def _decode_nvfp4(matrix: ExpertMatrix) -> torch.Tensor:
    return E2M1[_nibbles(matrix.weight)] * matrix.scale.double().repeat_interleave(16, 1)


def _decode_packed_int4(matrix: ExpertMatrix) -> torch.Tensor:
    codes = _nibbles(matrix.weight)
    return (codes - 8) * _spread(matrix.scale, codes.shape[1])


def _decode_gptq(matrix: ExpertMatrix) -> torch.Tensor:
    codes = _nibbles(matrix.weight.t())
    return (codes - 8) * _spread(
        matrix.scale.t() if matrix.scale.dim() == 2 else matrix.scale, codes.shape[1]
    )


def _decode_q8_0(matrix: ExpertMatrix) -> torch.Tensor:
    return torch.from_numpy(dequantize(matrix.weight.numpy(), GGMLQuantizationType.Q8_0)).double()


_DECODERS = {
    "BF16": lambda matrix: matrix.weight.double(),
    "FP8": _decode_blocks,
    "FP8_PERCHANNEL": lambda matrix: matrix.weight.double() * matrix.scale.double().reshape(-1, 1),
    "MXFP8": _decode_mxfp8,
    "MXFP4": _decode_mxfp4,
    "NVFP4": _decode_nvfp4,
    "RAWINT4": _decode_packed_int4,
    "GPTQ_INT4": _decode_gptq,
    "AMXINT4": _decode_packed_int4,
    "LLAMAFILE": _decode_q8_0,
    "AMXINT8": lambda matrix: matrix.weight.double() * _spread(matrix.scale, matrix.weight.shape[1]),
}
