"""SGLang's expert weights as the engine's `DeviceExperts`: the slots of a served layer, and spare ones.

SGLang's methods compute with whatever layer they are given, so spare slots are a layer of the same kind
that holds nothing but its own weights. Where no slot format (slot_formats.py) is that of the layer, its
experts never change, and its spare slots are unquantised.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from kt_kernel.expert_image import ExpertEncoding, ExpertTensors
from kt_kernel.integrations.sglang.slot_formats import SlotFormat, slot_format


def device_of(layer: torch.nn.Module) -> torch.device:
    """Where SGLang holds the layer's own experts, or would: tensors without slots are somewhere, too."""
    return next(layer.parameters(recurse=False)).device


def without_gaps(slots: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same routing with slot 0 and weight 0 in place of -1.

    SGLang's GPU kernels look for -1 only where a layer has fewer slots than experts.
    """
    return slots.clamp(min=0), torch.where(slots < 0, 0, weights)


class SglangExperts:
    """The experts that `layer` holds, computed by `method`, SGLang's own.

    `slots`: their number. `filled_as`: how they are filled while serving, None = never.
    """

    def __init__(self, layer: torch.nn.Module, method: Any, slots: int, filled_as: SlotFormat | None) -> None:
        self.layer = layer
        self.capacity = slots
        self.filled_as = filled_as
        self._method = method
        tensors = [tensor for tensor in layer.parameters(recurse=False) if tensor.shape[:1] == (slots,)]
        self.bytes_per_expert = sum(tensor.nbytes for tensor in tensors) // max(slots, 1)

    def compute(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See DeviceExperts.compute; carries the routed scaling factor where SGLang's kernels apply it."""
        if hidden.shape[0] == 0 or self.capacity == 0:
            return torch.zeros_like(hidden)
        if not hidden.is_cpu and self.capacity == self.layer.moe_runner_config.num_experts:
            slots, weights = without_gaps(slots, weights)
        routing = StandardTopKOutput(topk_weights=weights, topk_ids=slots, router_logits=None)
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
        return type(source.filled_as) is type(self.filled_as)

    def copy_slot(self, slot: int, source: SglangExperts, source_slot: int) -> None:
        """See DeviceExperts.copy_slot."""
        for name in self.filled_as.names:
            target, origin = getattr(self.layer, name), getattr(source.layer, name)
            target.data[slot].copy_(origin.data[source_slot], non_blocking=True)


def spare_experts(layer: torch.nn.Module, method: Any, slots: int, encoding: ExpertEncoding) -> SglangExperts:
    """Room for `slots` experts of `encoding` beside those of `layer`, on the same device; empty."""
    spare = copy.copy(layer)
    # The copy shares what makes the layer (sizes, dispatcher); weights and modules are its own.
    spare.__dict__.update(_parameters={}, _buffers={}, _modules={}, num_local_experts=slots)
    config = dataclasses.replace(layer.moe_runner_config, num_local_experts=slots, layer=spare)
    if slot_format(layer, method, encoding) is not None:
        method = copy.copy(method)
    else:
        method = _plain_method()
        spare.scheme = spare.quant_config = None
        if layer.should_fuse_routed_scaling_factor_in_topk:
            config.routed_scaling_factor = None  # the weights have it; this method's kernels would repeat it
    spare.moe_runner_config = config
    with torch.device(device_of(layer)):
        method.create_weights(
            layer=spare,
            num_experts=slots,
            hidden_size=config.hidden_size,
            intermediate_size_per_partition=config.intermediate_size_per_partition,
            params_dtype=config.params_dtype,
            weight_loader=None,
        )
    method.create_moe_runner(spare, config)
    return SglangExperts(spare, method, slots, slot_format(spare, method, encoding))


def _plain_method() -> UnquantizedFusedMoEMethod:
    """SGLang's unquantised experts as plain matrices, whatever backend is asked for elsewhere."""
    method = UnquantizedFusedMoEMethod()
    method.use_flashinfer_cutlass = False
    return method
