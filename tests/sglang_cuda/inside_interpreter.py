"""Runs in a process of its own with TRITON_INTERPRET=1: triton's interpreter computes SGLang's fused MoE.

Layers are those of layers.py, through our method. What SGLang compiles from CUDA source stands here as torch
functions written from its documented contract; memory that nothing wrote is NaN, so that reading it shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cuda_code
import numpy
import torch

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_BLOCK = 128


# ---- what SGLang has in CUDA ---------------------------------------------------------------------


def align(
    ids, buckets, block, sorted_ids, expert_ids, total, offsets, fill=False, skip_invalid=False
) -> None:
    """moe_align_block_size: pairs of token and expert sorted by expert, each expert's part padded to blocks.

    Bucket 0 is that of id -1. Padding is the number of pairs; what lies beyond the total must not be read.
    """
    assert not skip_invalid
    pairs = ids.flatten().long() + 1
    assert pairs.min() >= 0 and pairs.max() < buckets
    sorted_ids.fill_(pairs.numel())
    expert_ids.fill_(buckets + 1000)
    end = 0
    for bucket in range(buckets):
        members = (pairs == bucket).nonzero().flatten()
        blocks = -(-len(members) // block)
        sorted_ids[end : end + len(members)] = members.int()
        expert_ids[end // block : end // block + blocks] = bucket - 1
        end += blocks * block
    total.fill_(end)


def activate(gate_up, out, kind) -> None:
    assert kind == "silu"
    out.copy_(silu_and_mul(gate_up.float()))


def activate_routed(gate_up, out, expert_ids, step, kind) -> None:
    """The same; rows without an expert keep what they hold."""
    rows = expert_ids.repeat_interleave(step) >= 0
    assert kind == "silu" and len(rows) == len(out)
    out[rows] = silu_and_mul(gate_up[rows].float()).to(out.dtype)


def quantise_groups(source, out, scales) -> None:
    size = source.shape[-1] // scales.shape[-1]
    groups = source.float().unflatten(-1, (-1, size))
    scales.copy_(groups.abs().amax(-1).clamp(min=1e-10) / _FP8_MAX)
    out.copy_((groups / scales.unsqueeze(-1)).clamp(-_FP8_MAX, _FP8_MAX).flatten(-2).to(_FP8))


def quantise_rows_int8(source) -> tuple[torch.Tensor, torch.Tensor]:
    """In Triton, but with a function of CUDA's library that the interpreter has not."""
    scales = source.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (source.float() / scales).round().to(torch.int8), scales


def sum_experts(parts, out, factor) -> None:
    out.copy_(parts.float().sum(1) * factor)


RESULTS = {
    "moe_align_block_size": align,
    "run_activation": activate,
    "run_activation_filtered": activate_routed,
    "per_token_group_quant": quantise_groups,
    "per_token_quant_fp8": quantise_groups,
    "moe_sum_reduce": sum_experts,
}


# ---- formats -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How weights and activations are stored."""

    config: Callable[[], Any]  # SGLang's, from which it makes a layer
    fill: Callable[[torch.nn.Module, str, torch.Tensor], torch.Tensor]  # returns the values that are stored
    rounded: Callable[[torch.Tensor], torch.Tensor]  # activations as a matrix multiplication sees them


def fill_bf16(layer: torch.nn.Module, name: str, values: torch.Tensor) -> torch.Tensor:
    getattr(layer, f"{name}_weight").data.copy_(values)
    return values.to(torch.bfloat16).float()


def fill_fp8_blocks(layer: torch.nn.Module, name: str, values: torch.Tensor) -> torch.Tensor:
    weight, scales = getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_weight_scale_inv")
    blocks = values.unflatten(2, (-1, _BLOCK)).unflatten(1, (-1, _BLOCK))
    scales.data.copy_(blocks.abs().amax((2, 4)) / _FP8_MAX)
    each = scales.data.repeat_interleave(_BLOCK, 1).repeat_interleave(_BLOCK, 2)
    weight.data.copy_((values / each).to(_FP8))
    return weight.data.float() * each


def fill_rows(layer: torch.nn.Module, name: str, values: torch.Tensor) -> torch.Tensor:
    weight, scales = getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_weight_scale")
    largest = 127 if weight.dtype == torch.int8 else _FP8_MAX
    scales.data.copy_(values.abs().amax(2, keepdim=True) / largest)
    codes = values / scales.data
    weight.data.copy_((codes.round() if weight.dtype == torch.int8 else codes).to(weight.dtype))
    return weight.data.float() * scales.data


def fp8_groups(hidden: torch.Tensor, size: int) -> torch.Tensor:
    codes = torch.empty_like(hidden, dtype=_FP8)
    scales = torch.empty(*hidden.shape[:-1], hidden.shape[-1] // size)
    quantise_groups(hidden, codes, scales)
    return codes.float() * scales.repeat_interleave(size, -1)


def int8_rows(hidden: torch.Tensor) -> torch.Tensor:
    codes, scales = quantise_rows_int8(hidden)
    return codes * scales


def fp8_config() -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[_BLOCK, _BLOCK])


def w8a8_fp8_config() -> Any:
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config

    return W8A8Fp8Config(is_checkpoint_fp8_serialized=True)


def w8a8_int8_config() -> Any:
    from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config

    return W8A8Int8Config({})


FORMATS = {
    "bf16": Format(lambda: None, fill_bf16, torch.Tensor.float),
    "fp8 blocks": Format(fp8_config, fill_fp8_blocks, lambda hidden: fp8_groups(hidden, _BLOCK)),
    "fp8 rows": Format(w8a8_fp8_config, fill_rows, lambda hidden: fp8_groups(hidden, hidden.shape[-1])),
    "int8 rows": Format(w8a8_int8_config, fill_rows, int8_rows),
}


# ---- one layer -----------------------------------------------------------------------------------


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def expected(
    kind: Format,
    w13: torch.Tensor,
    w2: torch.Tensor,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Every pair of token and slot by itself; id -1 adds nothing."""
    out = torch.zeros(hidden.shape)
    for token, row in enumerate(ids.tolist()):
        for slot, weight in zip(row, weights[token].tolist(), strict=True):
            if slot >= 0:
                gate_up = (kind.rounded(hidden[token : token + 1]) @ w13[slot].T).to(torch.bfloat16)
                inner = kind.rounded(silu_and_mul(gate_up.float()).to(torch.bfloat16))
                out[token] += weight * (inner @ w2[slot].T)[0]
    return out


def routings(slots: int) -> dict[str, torch.Tensor]:
    """Slots of five tokens with three experts each, -1 = not on the device, by what is special about them."""
    spread = torch.arange(15, dtype=torch.int32).reshape(5, 3) % slots
    gaps = torch.where(spread % 3 == 1, -1, spread)
    alone = spread.clone()
    alone[2] = -1
    return {
        "every expert on the device": spread,
        "experts missing": gaps,
        "a token without any": alone,
        "no token with any": torch.full_like(spread, -1),
        "one slot for all": torch.where(spread % 2 == 0, slots - 1, -1),
        "one token": gaps[:1].contiguous(),
    }


def multiply_bf16() -> None:
    """triton 3.7's interpreter keeps bf16 as uint16 and would multiply those numbers (triton issue 11584)."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widened(operand: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if operand.dtype.scalar != bfloat16:
            return operand
        bits = operand.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), float32)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(builder, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def run_without_overlap() -> None:
    """From SM90 on kernels wait for those before them; here they run one after the other."""
    from triton.language.extra import cuda

    cuda.gdc_wait = cuda.gdc_launch_dependents = lambda: None


def enter(capability: str) -> None:
    cuda_code.enter(cuda_code.capability_of(capability))
    cuda_code.RESULTS.update(RESULTS)
    from sglang.kernels.ops.moe import fused_moe_triton_kernels

    fused_moe_triton_kernels.per_token_quant_int8 = quantise_rows_int8
    multiply_bf16()
    run_without_overlap()
    torch.use_deterministic_algorithms(True)  # torch.empty fills with NaN


def errors(kind: Format, slots: int, names: list[str]) -> dict[str, float]:
    """By routing: how far the token that is furthest from torch's result is from it, relative to its norm."""
    from layers import EXPERTS, FACTOR, HIDDEN, INTERMEDIATE, make_layer, method_of

    from kt_kernel.integrations.sglang.device_experts import SglangExperts, without_gaps

    generator = torch.Generator().manual_seed(0)
    layer = make_layer(kind.config(), slots=slots)
    w13 = torch.randn(slots, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5
    w2 = torch.randn(slots, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5
    w13, w2 = kind.fill(layer, "w13", w13), kind.fill(layer, "w2", w2)
    layer.quant_method.process_weights_after_loading(layer)
    experts = SglangExperts(layer, method_of(layer), slots, None)
    found = {}
    for name in names:
        ids = routings(slots)[name]
        hidden = torch.randn(len(ids), HIDDEN, generator=generator).to(torch.bfloat16)
        weights = torch.rand(ids.shape, generator=generator) + 0.5
        want = FACTOR * expected(kind, w13, w2, hidden, ids, weights)
        if slots == EXPERTS:
            ids, weights = without_gaps(ids, weights)
        difference = (experts.compute(hidden, ids, weights).float() - want).norm(dim=1)
        found[name] = (difference / want.norm(dim=1).clamp(min=1e-6)).max().item()
    return found


def check_align(slots: int) -> None:
    """The stand-in for the CUDA kernel does what SGLang's kernel for small batches does, one in Triton."""
    from sglang.kernels.ops.moe.moe_align_small_numel import moe_align_small_numel

    block = 16
    for name, ids in routings(slots).items():
        outputs = []
        for function in (align, moe_align_small_numel):
            buffers = (
                torch.empty(ids.numel() * block, dtype=torch.int32),
                torch.empty(ids.numel(), dtype=torch.int32),
            )
            total = torch.empty(1, dtype=torch.int32)
            rest = (torch.empty(slots + 2, dtype=torch.int32), True) if function is align else ()
            function(ids, slots + 1, block, *buffers, total, *rest)
            end = int(total)
            outputs.append((end, buffers[0][:end].tolist(), buffers[1][: end // block].tolist()))
        assert outputs[0] == outputs[1], name


def measure_errors(capability: str) -> None:
    """Prints errors() by format and number of slots."""
    enter(capability)
    import layers

    layers.HIDDEN, layers.INTERMEDIATE = 2 * _BLOCK, _BLOCK
    check_align(layers.SLOTS)
    found = {}
    with layers.served(backend="triton"):
        for name, kind in FORMATS.items():
            some = list(routings(1)) if name == "bf16" else ["experts missing", "one slot for all"]
            found[name] = {
                "some": errors(kind, layers.SLOTS, some),
                "all": errors(kind, layers.EXPERTS, ["a token without any"]),
            }
    unknown = {call.entry for call in cuda_code.CALLS if call.entry.rpartition(".")[2] not in RESULTS}
    assert not unknown, f"nothing stands here for {unknown}"
    print(json.dumps(found))
