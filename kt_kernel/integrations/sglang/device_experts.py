"""SGLang's expert weights as the engine's `DeviceExperts`: the slots of a served layer, and spare ones.

SGLang's methods compute with whatever layer they are given, so spare slots are a layer of the same kind
that holds nothing but its own weights (spare_layers.py). Where no slot format (slot_formats/) is that of the
layer, or it is not right on this device (device_check.py), its experts never change, and its spare slots are
unquantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.utils import is_cuda

from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.integrations.sglang import device_backends
from kt_kernel.integrations.sglang.cpu_fixes import PLAYS_DEVICE
from kt_kernel.integrations.sglang.device_check import Trial, Verdict, examine, is_right
from kt_kernel.integrations.sglang.slot_formats import SlotFormat, slot_format
from kt_kernel.integrations.sglang.spare_layers import (
    SpareLayer,
    decoded_layer,
    device_of,
    name_of,
    native_layer,
    weight_only_layer,
)


def without_gaps(slots: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same routing with slot 0 and weight 0 in place of -1."""
    return slots.clamp(min=0), torch.where(slots < 0, 0, weights)


class SglangExperts:
    """The experts that `layer` holds, computed by `method`, SGLang's own.

    `slots`: their number. `filled_as`: how they are filled while serving, None = never.
    """

    def __init__(self, layer: torch.nn.Module, method: Any, slots: int, filled_as: SlotFormat | None) -> None:
        self.layer = layer
        setattr(layer, PLAYS_DEVICE, True)
        self.capacity = slots
        self.filled_as = filled_as
        self._method = method
        tensors = [tensor for tensor in layer.parameters(recurse=False) if tensor.shape[:1] == (slots,)]
        self.bytes_per_expert = sum(tensor.nbytes for tensor in tensors) // max(slots, 1)

    def compute(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See DeviceExperts.compute; carries the routed scaling factor where SGLang's kernels apply it."""
        if hidden.shape[0] == 0 or self.capacity == 0:
            return torch.zeros_like(hidden)
        if is_cuda() and not device_backends.skips_gaps(self._method, self.layer):
            slots, weights = without_gaps(slots, weights)
        # The routing is done; Marlin's kernels read the number of tokens from the logits, and no more.
        routing = StandardTopKOutput(topk_weights=weights, topk_ids=slots, router_logits=weights)
        dispatched = StandardDispatchOutput(
            hidden_states=hidden, hidden_states_scale=None, topk_output=routing
        )
        return self._method.apply(self.layer, dispatched).hidden_states

    def places(self, slot: int) -> ExpertTensors | None:
        """See DeviceExperts.places."""
        return self.filled_as.places(self.layer, slot)

    def store(self, slot: int, tensors: ExpertTensors) -> int:
        """See DeviceExperts.store."""
        self.filled_as.store(self.layer, slot, tensors)
        return sum(part.nbytes for part in tensors if part is not None)

    def takes_slots_of(self, source: SglangExperts) -> bool:
        """See DeviceExperts.takes_slots_of."""
        return source.filled_as is not None and source.filled_as.is_like(self.filled_as)

    def copy_slot(self, slot: int, source: SglangExperts, source_slot: int) -> None:
        """See DeviceExperts.copy_slot."""
        for name in self.filled_as.names:
            target, origin = getattr(self.layer, name), getattr(source.layer, name)
            target.data[slot].copy_(origin.data[source_slot], non_blocking=True)


def spare_experts(layer: torch.nn.Module, method: Any, slots: int, encoding: ExpertEncoding) -> SglangExperts:
    """Room for `slots` experts of `encoding` beside those of `layer`, on the same device; empty.

    Of the layer's own kind, or weight-only, if that was found right on this device; else unquantised.
    """

    kinds = _Kinds(layer, method, encoding)
    if isinstance(method, UnquantizedFusedMoEMethod):
        return kinds.native(slots) or kinds.decoded(slots)
    if kinds.native_is_right():
        return kinds.native(slots)
    return kinds.weight_only(slots) if kinds.weight_only_is_right() else kinds.decoded(slots)


def resident_format(layer: torch.nn.Module, method: Any, encoding: ExpertEncoding) -> SlotFormat | None:
    """How the loaded experts of `layer` are replaced while serving; None if they cannot be, or if that was
    found wrong on this device.
    """
    form = slot_format(layer, method, encoding)
    if form is None or isinstance(method, UnquantizedFusedMoEMethod):
        return form
    return form if _Kinds(layer, method, encoding).native_is_right() else None


def tried(layer: torch.nn.Module, method: Any, encoding: ExpertEncoding) -> Verdict:
    """What comes of slots of the layer's own kind on this device; its own experts stay as they are."""
    kinds = _Kinds(layer, method, encoding)
    return examine(kinds.native_trial, kinds.native, kinds.decoded)


@dataclass(frozen=True)
class _Kinds:
    """The kinds of slot that can stand beside a layer's own."""

    layer: torch.nn.Module
    method: Any
    encoding: ExpertEncoding

    def native(self, slots: int) -> SglangExperts | None:
        return _experts_of(native_layer(self.layer, self.method, slots, self.encoding), slots)

    def weight_only(self, slots: int) -> SglangExperts | None:
        return _experts_of(weight_only_layer(self.layer, slots, self.encoding), slots)

    def decoded(self, slots: int) -> SglangExperts:
        return _experts_of(decoded_layer(self.layer, slots, self.encoding), slots)

    def native_is_right(self) -> bool:
        return is_right(self.native_trial, self.native, self.decoded)

    @property
    def native_trial(self) -> Trial:
        return self._trial(name_of(self.layer, self.method))

    def weight_only_is_right(self) -> bool:
        return is_right(self._trial("weight-only kernels"), self.weight_only, self.decoded)

    def _trial(self, name: str) -> Trial:
        dtype = self.layer.moe_runner_config.params_dtype
        return Trial(name, self.encoding, device_of(self.layer), dtype)


def _experts_of(made: SpareLayer | None, slots: int) -> SglangExperts | None:
    return None if made is None else SglangExperts(made.layer, made.method, slots, made.form)
