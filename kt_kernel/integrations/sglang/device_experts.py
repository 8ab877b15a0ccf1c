"""SGLang's expert weights as the engine's `DeviceExperts`: the slots of a served layer, and spare ones.

SGLang's methods compute with whatever layer they are given, so spare slots are a layer of the same kind
that holds nothing but its own weights. Slots are filled while serving in two formats only, each a class
below: SGLang rearranges the weights of the others for its kernels after loading.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Protocol

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from kt_kernel.decoding import decode_expert
from kt_kernel.errors import FeatureUnavailableError
from kt_kernel.expert_image import ExpertEncoding, ExpertTensors


class SlotFormat(Protocol):
    """How one slot of a layer's tensors is filled."""

    names: tuple[str, ...]  # the layer's tensors, first dimension = slots

    def store(self, layer: torch.nn.Module, slot: int, tensors: ExpertTensors) -> None: ...


class Unquantised:
    """w13_weight [slots, 2 I, H], gate above up, and w2_weight [slots, H, I] in the model's dtype."""

    names = ("w13_weight", "w2_weight")

    def __init__(self, encoding: ExpertEncoding, method: UnquantizedFusedMoEMethod) -> None:
        self._encoding = encoding
        self._alternating = method.w13_swiglu_interleaved

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

    def store(self, layer: torch.nn.Module, slot: int, tensors: ExpertTensors) -> None:
        parts = (tensors.w13_weight, tensors.w13_scale, tensors.w2_weight, tensors.w2_scale)
        for name, part in zip(self.names, parts, strict=True):
            getattr(layer, name).data[slot].copy_(part, non_blocking=True)


def slot_format(layer: torch.nn.Module, method: Any, encoding: ExpertEncoding) -> SlotFormat:
    """The format of a loaded layer; raises FeatureUnavailableError if it cannot be filled while serving."""
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
    raise FeatureUnavailableError(
        f"not available yet: writing {encoding.method} experts into the weights that "
        f"{type(method).__name__} holds on the device; leave out --kt-gpu-prefill-token-threshold, "
        "--kt-enable-dynamic-expert-update and --kt-miss-policy auto."
    )


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


class SglangExperts:
    """The experts that `layer` holds, computed by `method`, SGLang's own.

    `slots`: their number. They cannot be changed before `fill_with` was called.
    """

    def __init__(self, layer: torch.nn.Module, method: Any, slots: int) -> None:
        self.layer = layer
        self.capacity = slots
        self._method = method
        self._format: SlotFormat | None = None
        tensors = [tensor for tensor in layer.parameters(recurse=False) if tensor.shape[:1] == (slots,)]
        self.bytes_per_expert = sum(tensor.nbytes for tensor in tensors) // max(slots, 1)

    def fill_with(self, format_of_slots: SlotFormat) -> None:
        """Let `store` and `copy_slot` fill the slots that way."""
        self._format = format_of_slots

    def compute(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See DeviceExperts.compute; carries the routed scaling factor where SGLang's kernels apply it."""
        if hidden.shape[0] == 0 or self.capacity == 0:
            return torch.zeros_like(hidden)
        routing = StandardTopKOutput(topk_weights=weights, topk_ids=slots, router_logits=None)
        dispatched = StandardDispatchOutput(
            hidden_states=hidden, hidden_states_scale=None, topk_output=routing
        )
        return self._method.apply(self.layer, dispatched).hidden_states

    def store(self, slot: int, tensors: ExpertTensors) -> int:
        """See DeviceExperts.store."""
        self._format.store(self.layer, slot, tensors)
        return sum(part.nbytes for part in tensors if part is not None)

    def copy_slot(self, slot: int, source: SglangExperts, source_slot: int) -> None:
        """See DeviceExperts.copy_slot."""
        for name in self._format.names:
            target, origin = getattr(self.layer, name), getattr(source.layer, name)
            target.data[slot].copy_(origin.data[source_slot], non_blocking=True)


def spare_experts(layer: torch.nn.Module, method: Any, slots: int, encoding: ExpertEncoding) -> SglangExperts:
    """Room for `slots` experts beside those of `layer`, of the same kind, on the same device; empty."""
    spare = copy.copy(layer)
    # The copy shares what makes the layer (sizes, dispatcher); weights and modules are its own.
    spare.__dict__.update(_parameters={}, _buffers={}, _modules={}, num_local_experts=slots)
    spare_method = copy.copy(method)
    config = dataclasses.replace(layer.moe_runner_config, num_local_experts=slots, layer=spare)
    spare.moe_runner_config = config
    with torch.device(layer.w13_weight.device):
        spare_method.create_weights(
            layer=spare,
            num_experts=slots,
            hidden_size=config.hidden_size,
            intermediate_size_per_partition=config.intermediate_size_per_partition,
            params_dtype=config.params_dtype,
            weight_loader=None,
        )
    spare_method.create_moe_runner(spare, config)
    experts = SglangExperts(spare, spare_method, slots)
    experts.fill_with(slot_format(spare, spare_method, encoding))
    return experts
