"""How one slot of SGLang's expert tensors is filled from an expert in main memory.

SGLang rearranges the weights of most quantisation methods after loading, each in its own way, so a slot can
be filled while serving only where a class here does the same for one expert: plain.py what is stored as it
is, or unquantised; marlin.py what the Marlin kernels read. `slot_format` finds the one of a loaded layer.

A new format is a class with `of`, `names`, `places` and `store`, and a row of the table.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.integrations.sglang.slot_formats.marlin import MarlinFp4, MarlinInt4, MarlinNvfp4
from kt_kernel.integrations.sglang.slot_formats.plain import AsStored, Unquantised


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

    def is_like(self, other: SlotFormat | None) -> bool:
        """Do slots of both hold an expert in the same bytes of the same tensors?"""
        ...


# SGLang's method, or the scheme that it leaves a layer to; the encoding; who fills its slots; its tensors in
# the order of an ExpertTensors. `of` of that class says no if the layer's tensors look otherwise.
_PLAIN_NAMES = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
_INVERSE_NAMES = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
_PACKED_NAMES = ("w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale")
_GPTQ_NAMES = ("w13_qweight", "w13_scales", "w2_qweight", "w2_scales")
_UNQUANTISED = "UnquantizedFusedMoEMethod"  # from experts of any encoding
_FORMATS = {
    ("Fp8MoEMethod", "FP8"): (AsStored, _INVERSE_NAMES),
    ("Fp8MoEMethod", "MXFP8"): (AsStored, _INVERSE_NAMES),
    ("CompressedTensorsW8A8Fp8MoE", "FP8"): (AsStored, _PLAIN_NAMES),
    ("CompressedTensorsW8A8Fp8MoE", "FP8_PERCHANNEL"): (AsStored, _PLAIN_NAMES),
    ("W8A8FP8MoEMethod", "FP8_PERCHANNEL"): (AsStored, _PLAIN_NAMES),
    ("CompressedTensorsWNA16TritonMoE", "RAWINT4"): (AsStored, _PACKED_NAMES),
    ("CompressedTensorsWNA16MoE", "RAWINT4"): (MarlinInt4, _PACKED_NAMES),
    ("GPTQMarlinMoEScheme", "GPTQ_INT4"): (MarlinInt4, _GPTQ_NAMES),
    ("Mxfp4MarlinMoEMethod", "MXFP4"): (MarlinFp4, _PLAIN_NAMES),
    ("ModelOptNvFp4FusedMoEMethod", "NVFP4"): (MarlinNvfp4, _PLAIN_NAMES),
    ("CompressedTensorsW4A16Nvfp4MoE", "NVFP4"): (MarlinNvfp4, _PLAIN_NAMES),
}


def slot_format(layer: torch.nn.Module, method: Any, encoding: ExpertEncoding) -> SlotFormat | None:
    """How the slots of a loaded layer are filled from experts of that encoding; None if they cannot be."""
    if not has_format(layer, method, encoding):
        return None
    maker = type(maker_of(layer, method)).__name__
    if maker == _UNQUANTISED:
        return Unquantised.of(layer, method, encoding)
    kind, names = _FORMATS[maker, encoding.method]
    return kind.of(layer, method, encoding, names)


def has_format(layer: torch.nn.Module, method: Any, encoding: ExpertEncoding) -> bool:
    """Is there a format for such layers, if their tensors look as they should once they are loaded?"""
    maker = type(maker_of(layer, method)).__name__
    return maker == _UNQUANTISED or (maker, encoding.method) in _FORMATS


def maker_of(layer: torch.nn.Module, method: Any) -> Any:
    """Who really makes the layer's tensors: some methods leave all to a scheme that the layer holds."""
    scheme = getattr(layer, "scheme", None)
    return method if scheme is None else scheme
