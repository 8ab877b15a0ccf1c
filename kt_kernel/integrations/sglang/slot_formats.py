"""How one slot of SGLang's expert tensors is filled from an expert in main memory, one class per format.

SGLang rearranges the weights of most quantisation methods after loading, so a slot can be filled while
serving only in the formats below; `slot_format` finds the one of a loaded layer, if there is one.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from kt_kernel.decoding import decode_expert
from kt_kernel.expert_image import ExpertEncoding, ExpertTensors


class SlotFormat(Protocol):
    """How one slot of a layer's tensors is filled."""

    names: tuple[str, ...]  # the layer's tensors, first dimension = slots

    def places(self, layer: torch.nn.Module, slot: int) -> ExpertTensors | None:
        """Where on the device each part of an expert goes, byte by byte as it is stored in main memory.

        None if it is decoded or rearranged on its way: then only `store` can fill the slot.
        """
        ...

    def store(self, layer: torch.nn.Module, slot: int, tensors: ExpertTensors) -> None:
        """Fill `slot` from `tensors`, in host memory or on the device, in the order of the current stream."""
        ...


class Unquantised:
    """w13_weight [slots, 2 I, H], gate above up, and w2_weight [slots, H, I] in the model's dtype."""

    names = ("w13_weight", "w2_weight")

    def __init__(self, encoding: ExpertEncoding, method: UnquantizedFusedMoEMethod) -> None:
        self._encoding = encoding
        self._alternating = method.w13_swiglu_interleaved

    def places(self, layer: torch.nn.Module, slot: int) -> ExpertTensors | None:
        w13, w2 = layer.w13_weight.data[slot], layer.w2_weight.data[slot]
        if self._alternating or self._encoding.method != "BF16" or w13.dtype != torch.bfloat16:
            return None
        return ExpertTensors(w13, None, w2, None)

    def store(self, layer: torch.nn.Module, slot: int, tensors: ExpertTensors) -> None:
        """The stored bytes cross the bus, and are decoded on the device."""
        place = layer.w13_weight.data[slot]
        w13, w2 = decode_expert(tensors.to(place.device), self._encoding, place.dtype)
        if self._alternating:
            gate, up = w13.chunk(2)
            place[0::2].copy_(gate)
            place[1::2].copy_(up)
        else:
            place.copy_(w13)
        layer.w2_weight.data[slot].copy_(w2)


class BlockFp8:
    """e4m3 with a float32 scale per 128 x 128: what --kt-method FP8 writes, byte by byte."""

    names = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")

    def places(self, layer: torch.nn.Module, slot: int) -> ExpertTensors:
        return ExpertTensors(*(getattr(layer, name).data[slot] for name in self.names))

    def store(self, layer: torch.nn.Module, slot: int, tensors: ExpertTensors) -> None:
        for place, part in zip(self.places(layer, slot), tensors, strict=True):
            if place is not None:
                place.copy_(part, non_blocking=True)


def slot_format(layer: torch.nn.Module, method: Any, encoding: ExpertEncoding) -> SlotFormat | None:
    """How the slots of a loaded layer are filled from experts of that encoding; None if they cannot be."""
    if type(method) is UnquantizedFusedMoEMethod and _is_plain(layer, method):
        return Unquantised(encoding, method)
    if (
        type(method) is Fp8MoEMethod
        and encoding.method == "FP8"
        and method.block_quant
        and _is_plain(layer, method)
        and _scales_are_plain(layer)
    ):
        return BlockFp8()
    return None


def _is_plain(layer: torch.nn.Module, method: Any) -> bool:
    """Are the weights [slots, 2 I, H] and [slots, H, I], in rows, as they were made?"""
    config = layer.moe_runner_config
    backend = method.get_moe_runner_backend(layer)
    shapes = (
        (2 * config.intermediate_size_per_partition, config.hidden_size),
        (config.hidden_size, config.intermediate_size_per_partition),
    )
    return (
        backend is not None
        and backend.is_triton()
        and not getattr(layer, "use_intel_amx_backend", False)
        and (layer.w13_weight.shape[1:], layer.w2_weight.shape[1:]) == shapes
    )


def _scales_are_plain(layer: torch.nn.Module) -> bool:
    scales = (layer.w13_weight_scale_inv, layer.w2_weight_scale_inv)
    return layer.w13_weight.dtype == torch.float8_e4m3fn and all(
        scale.dtype == torch.float32 and not getattr(scale, "format_ue8m0", False) for scale in scales
    )
