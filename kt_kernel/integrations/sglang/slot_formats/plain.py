"""Slots that hold an expert as it is stored in main memory, or decoded to the model's dtype."""

from __future__ import annotations

from typing import Any

import torch

from kt_kernel.formats.decoding import decode_expert
from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors, TensorSpec


class Unquantised:
    """w13_weight [slots, 2 I, H], gate above up, and w2_weight [slots, H, I] in the model's dtype."""

    names = ("w13_weight", "w2_weight")

    @classmethod
    def of(cls, layer: torch.nn.Module, method: Any, encoding: ExpertEncoding) -> Unquantised | None:
        """None if the kernels read other than rows."""
        return cls(encoding, method) if _are_rows(layer, method) else None

    def __init__(self, encoding: ExpertEncoding, method: Any) -> None:
        self._encoding = encoding
        self._alternating = method.w13_swiglu_interleaved

    def places(self, layer: torch.nn.Module, slot: int) -> ExpertTensors | None:
        w13, w2 = layer.w13_weight.data[slot], layer.w2_weight.data[slot]
        if self._alternating or not self._encoding.is_bf16 or w13.dtype != torch.bfloat16:
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

    def is_like(self, other: Any) -> bool:
        return type(other) is type(self) and other.names == self.names


class AsStored:
    """What the method of the encoding writes, byte by byte: the kernels read the checkpoint's layout."""

    @classmethod
    def of(
        cls, layer: torch.nn.Module, method: Any, encoding: ExpertEncoding, names: tuple[str, ...]
    ) -> AsStored | None:
        """None if one of the layer's tensors has other bytes per slot, or its kernels read it differently."""
        # All others rearrange a layer after loading; Triton's of SGLang, too, does that with MXFP8's scales.
        if not _reads_rows(layer, method, ("cutlass",) if encoding.method == "MXFP8" else ("triton",)):
            return None
        specs = (encoding.w13_weight, encoding.w13_scale, encoding.w2_weight, encoding.w2_scale)
        for name, spec in zip(names, specs, strict=True):
            if not _holds(getattr(layer, name, None), spec):
                return None
        return cls(encoding, names)

    def __init__(self, encoding: ExpertEncoding, names: tuple[str, ...]) -> None:
        self.names = names
        self._encoding = encoding

    def places(self, layer: torch.nn.Module, slot: int) -> ExpertTensors:
        encoding = self._encoding
        specs = (encoding.w13_weight, encoding.w13_scale, encoding.w2_weight, encoding.w2_scale)
        return ExpertTensors(
            *(
                getattr(layer, name).data[slot].view(spec.dtype)
                for name, spec in zip(self.names, specs, strict=True)
            )
        )

    def store(self, layer: torch.nn.Module, slot: int, tensors: ExpertTensors) -> None:
        for place, part in zip(self.places(layer, slot), tensors, strict=True):
            if place is not None:
                place.copy_(part, non_blocking=True)

    def is_like(self, other: Any) -> bool:
        return type(other) is type(self) and other.names == self.names


def _holds(tensor: torch.Tensor | None, spec: TensorSpec) -> bool:
    """Is a slot of `tensor` the rows of `spec`, if need be counted in smaller elements?"""
    if tensor is None or tensor.ndim != 1 + len(spec.shape):
        return False
    if getattr(tensor, "format_ue8m0", False) and spec.dtype != torch.uint8:
        return False  # DeepGEMM's packed scales
    integers = not (spec.dtype.is_floating_point or tensor.dtype.is_floating_point)
    if tensor.dtype != spec.dtype and not integers:
        return False
    *rows, columns = tensor.shape[1:]
    return (*rows, columns * tensor.dtype.itemsize) == (
        *spec.shape[:-1],
        spec.shape[-1] * spec.dtype.itemsize,
    )


def _reads_rows(layer: torch.nn.Module, method: Any, kernels: tuple[str, ...] = ("triton",)) -> bool:
    backend = method.get_moe_runner_backend(layer)
    return (
        backend is not None
        and backend.value in kernels
        and not getattr(layer, "use_intel_amx_backend", False)
    )


def _are_rows(layer: torch.nn.Module, method: Any) -> bool:
    """Are the weights [slots, 2 I, H] and [slots, H, I], in rows, as they were made?"""
    config = layer.moe_runner_config
    shapes = (
        (2 * config.intermediate_size_per_partition, config.hidden_size),
        (config.hidden_size, config.intermediate_size_per_partition),
    )
    return _reads_rows(layer, method) and (layer.w13_weight.shape[1:], layer.w2_weight.shape[1:]) == shapes
