"""What numbers a checkpoint's tensors become: read off the output of a layer loaded from them.

The down projection holds the tensors in question. gate and up are made so that token j gives the middle of
the expert the value m in its j-th place and zero elsewhere, exactly:

    hidden = 64 * unit vector j
    gate = L everywhere, so that silu(64 L) = 64 L in float32;  up = L * 2**-shift on the diagonal
    m = (64 L)**2 * 2**-shift, and the output is m times the j-th column of down

L is a value that every one of the method's scales represents exactly. The output is float32, so each element
is the decoded number times m, rounded once.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from kt_kernel import KTMoEWrapper
from kt_kernel.formats.quantize.fp4 import to_mxfp4, to_nvfp4
from kt_kernel.formats.quantize.fp8 import to_fp8_blocks, to_fp8_rows, to_mxfp8
from kt_kernel.formats.quantize.int4 import to_gptq_int4, to_packed_int4
from kt_kernel.formats.quantize.quantized import Quantized

# One rounding to float32, and one of the scale times the global scale.
RELATIVE_ERROR = 2.0**-22

_HIDDEN_VALUE = 64.0


def observed(
    directory: Path,
    method: str,
    down: list[dict[str, torch.Tensor]],
    *,
    hidden: int,
    intermediate: int,
    group_size: int = 0,
    config: dict | None = None,
    shift: int = 0,
) -> list[torch.Tensor]:
    """float64 [hidden, intermediate] of each expert, as our kernels decode it through the loading path.

    `down`: for each expert the tensors of its down projection by suffix: {"weight": ..., "scale": ...}.
    `hidden` >= `intermediate`; `shift` keeps outputs of extreme scales inside float32.
    """
    largest, gate, up = _gate_and_up(method, hidden, intermediate, group_size, shift)
    tensors = {}
    for expert, parts in enumerate(down):
        stem = f"model.layers.0.mlp.experts.{expert}"
        for suffix, part in parts.items():
            tensors[f"{stem}.down_proj.{suffix}"] = part.contiguous()
        for name, matrix in (("gate_proj", gate), ("up_proj", up)):
            for suffix, part in _like(parts, matrix).items():
                tensors[f"{stem}.{name}.{suffix}"] = part.clone()
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config or {}))
    layer = KTMoEWrapper(
        layer_idx=0,
        num_experts=len(down),
        num_experts_per_tok=1,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        cpuinfer_threads=1,
        threadpool_count=1,
        weight_path=directory,
        chunked_prefill_size=intermediate,
        method="AUTO",
        activations="bf16",
    )
    assert layer.method == method
    layer.load_weights()
    tokens = _HIDDEN_VALUE * torch.eye(intermediate, hidden)
    middle = (_HIDDEN_VALUE * largest) ** 2 * 2.0**-shift
    results = []
    for expert in range(len(down)):
        ids = torch.full((intermediate, 1), expert)
        output = layer.forward(tokens, ids, torch.ones(intermediate, 1))
        results.append(output.double().t() / middle)
    return results


def assert_same_numbers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for float32's rounding; NaN where NaN is expected."""
    expected = expected.double()
    wrong = ((actual - expected).abs() > RELATIVE_ERROR * expected.abs()) | (
        actual.isnan() != expected.isnan()
    )
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} numbers differ, first at {wrong.nonzero()[0].tolist()}: "
        f"{actual[wrong][0]} instead of {expected[wrong][0]}"
    )
    assert expected.count_nonzero() > expected.numel() // 2, "a test of zeros proves nothing"


def _gate_and_up(
    method: str, hidden: int, intermediate: int, group_size: int, shift: int
) -> tuple[float, Quantized, Quantized]:
    largest, quantise = {
        "FP8": (448.0, to_fp8_blocks),
        "FP8_PERCHANNEL": (448.0, to_fp8_rows),
        "MXFP8": (448.0, to_mxfp8),
        "MXFP4": (6.0, to_mxfp4),
        "NVFP4": (6.0, _nvfp4_with_scales_of_one),
        "RAWINT4": (7.0, lambda matrix: to_packed_int4(matrix, group_size)),
        "GPTQ_INT4": (7.0, lambda matrix: to_gptq_int4(matrix, group_size)),
    }[method]
    gate = quantise(torch.full((intermediate, hidden), largest))
    up = quantise(largest * torch.eye(intermediate, hidden))
    if up.scale.dtype is torch.uint8:
        up = dataclasses.replace(up, scale=(up.scale.int() - shift).clamp(min=0).to(torch.uint8))
    elif method == "NVFP4":
        up = dataclasses.replace(up, global_scale=2.0**-shift)
    else:
        up = dataclasses.replace(up, scale=up.scale * 2.0**-shift)
    return largest, gate, up


def _nvfp4_with_scales_of_one(matrix: torch.Tensor) -> Quantized:
    result = to_nvfp4(matrix)
    return Quantized(result.weight, torch.ones_like(result.scale.float()).to(result.scale.dtype), 1.0)


def _like(parts: dict[str, torch.Tensor], matrix: Quantized) -> dict[str, torch.Tensor]:
    """Our matrix under the suffixes, dtypes and ranks of the given parts."""
    ours = {}
    for suffix, part in parts.items():
        if suffix in ("weight", "weight_packed", "qweight"):
            ours[suffix] = matrix.weight.view(part.dtype)
        elif suffix == "weight_scale_2":
            ours[suffix] = torch.tensor(matrix.global_scale)
        elif suffix == "weight_global_scale":
            ours[suffix] = torch.tensor([1 / matrix.global_scale])
        elif suffix in ("weight_scale", "weight_scale_inv", "scale", "scales"):
            scale = matrix.scale
            scale = scale.view(part.dtype) if scale.dtype is torch.uint8 else scale.to(part.dtype)
            ours[suffix] = scale[:, None] if scale.dim() < part.dim() else scale
    return ours
