"""Do slots in a device's own format compute what the same experts give when they are decoded?

Two made-up experts with random codes and scales, different in every group, go into two slots of each kind.
Anything misplaced, from a scale to a tile, changes the results by far more than rounding does.
"""

from __future__ import annotations

import math

import torch

from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors, TensorSpec
from kt_kernel.hybrid.experts import DeviceExperts

SLOTS = 2  # that both kinds must have

_TOKENS = 9
_ROUTING = ((0, 1), (1, 0), (1, -1), (-1, 0), (-1, -1))
_E2M1_RMS, _INT4_RMS, _E4M3_RMS = 2.9, 4.6, 16.0


def sample_expert(encoding: ExpertEncoding, seed: int) -> ExpertTensors:
    """One rank's shard of an expert that no checkpoint has, in host memory; its matrices keep lengths."""
    generator = torch.Generator().manual_seed(seed)
    inputs = (encoding.hidden, encoding.share)
    weights = [
        _codes(spec, generator, columns)
        for spec, columns in zip((encoding.w13_weight, encoding.w2_weight), inputs, strict=True)
    ]
    scales = [
        None if spec is None else _scales(spec, encoding, generator, columns)
        for spec, columns in zip((encoding.w13_scale, encoding.w2_scale), inputs, strict=True)
    ]
    global_scales = None
    if encoding.global_scales is not None:
        gate, down = (1 / (_E2M1_RMS * math.sqrt(columns)) for columns in inputs)
        global_scales = torch.tensor([gate, gate, down])
    return ExpertTensors(weights[0], scales[0], weights[1], scales[1], global_scales)


def difference(
    native: DeviceExperts, decoded: DeviceExperts, encoding: ExpertEncoding, hidden: torch.Tensor
) -> float:
    """The NMSE of what `native` computes against `decoded`; infinite if it has numbers that are none.

    Both have SLOTS slots, which are overwritten. `hidden`: see `sample_tokens`.
    """
    for slot in range(SLOTS):
        tensors = sample_expert(encoding, seed=slot)
        for experts in (native, decoded):
            experts.store(slot, tensors)
    rows = torch.tensor(_ROUTING, dtype=torch.int32, device=hidden.device)
    slots = rows.repeat(-(-hidden.shape[0] // len(rows)), 1)[: hidden.shape[0]]
    weights = torch.linspace(0.2, 1.0, slots.numel(), device=hidden.device).view(slots.shape)
    found, expected = (
        experts.compute(hidden.clone(), slots, weights).double() for experts in (native, decoded)
    )
    error = float((found - expected).square().sum() / expected.square().sum())
    return error if math.isfinite(error) else math.inf


def sample_tokens(hidden_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A few rows to compute."""
    generator = torch.Generator().manual_seed(SLOTS)
    return torch.randn(_TOKENS, hidden_size, generator=generator).to(dtype).to(device)


def _codes(spec: TensorSpec, generator: torch.Generator, inputs: int) -> torch.Tensor:
    if spec.dtype == torch.bfloat16:
        return (torch.randn(spec.shape, generator=generator) / math.sqrt(inputs)).to(spec.dtype)
    if spec.dtype == torch.float8_e4m3fn:
        values = torch.randn(spec.shape, generator=generator) * _E4M3_RMS
        return values.to(spec.dtype)
    octets = torch.randint(0, 256, (spec.bytes,), dtype=torch.uint8, generator=generator)
    return octets.view(spec.dtype).view(spec.shape)


def _scales(
    spec: TensorSpec, encoding: ExpertEncoding, generator: torch.Generator, inputs: int
) -> torch.Tensor:
    spread = torch.rand(spec.shape, generator=generator) * 1.5 + 0.25
    if encoding.method == "NVFP4":  # the global scale does the rest
        return spread.to(spec.dtype)
    of_codes = {"MXFP4": _E2M1_RMS, "RAWINT4": _INT4_RMS, "GPTQ_INT4": _INT4_RMS}
    scales = spread / (of_codes.get(encoding.method, _E4M3_RMS) * math.sqrt(inputs))
    if encoding.method not in ("MXFP4", "MXFP8"):
        return scales.to(spec.dtype)
    exponents = scales.log2().round()
    return (exponents + 127).to(torch.uint8) if spec.dtype == torch.uint8 else exponents.exp2().to(spec.dtype)
