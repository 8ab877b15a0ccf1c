"""The packed experts of a layer as training uses them: in the format asked for, and decoded one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from kt_kernel.adapters.backend import ExpertWeights
from kt_kernel.errors import ConfigurationError, FeatureUnavailableError
from kt_kernel.formats.decoding import decode_expert
from kt_kernel.formats.methods import METHODS
from kt_kernel.formats.quantize.experts import quantize_experts
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.layer_config import PACKED
from kt_kernel.moe import KTMoEWrapper

AS_STORED = "as stored"

# What `experts` of `load` may be, besides AS_STORED: the name of a method.
_FORMATS = {"bf16": "BF16", "int8": "AMXINT8", "int4": "AMXINT4"}


class PackedWeights:
    """A `WeightSource` over a loaded layer: experts are decoded from their packed form when asked for."""

    def __init__(self, wrapper: KTMoEWrapper) -> None:
        self._wrapper = wrapper
        self._encoding = wrapper.encoding_of_matrices(1)
        self._image = self._encoding.views(torch.empty(self._encoding.bytes, dtype=torch.uint8))
        self.num_experts = wrapper.num_experts
        self.hidden_size = wrapper.hidden_size
        self.intermediate_size = wrapper.moe_intermediate_size

    def expert(self, expert: int) -> ExpertWeights:
        """In float32, exactly what the packed form means."""
        self._wrapper.write_expert(expert, [self._image])
        gate_up, down = decode_expert(self._image, self._encoding, torch.float32)
        gate, up = gate_up.chunk(2)
        return ExpertWeights(gate, up, down, *self._wrapper.biases(expert))


def method_of(experts: str, stored: str) -> str:
    """The method for `experts`, one of the names of `load`; `stored`: that of the checkpoint.

    Raises ConfigurationError for another name.
    """
    if experts == AS_STORED:
        return stored
    if experts not in _FORMATS:
        raise ConfigurationError(
            f"experts is {experts!r}, expected one of {', '.join(map(repr, (AS_STORED, *_FORMATS)))}."
        )
    wanted = _FORMATS[experts]
    return stored if METHODS[stored].file_method == wanted else wanted


def load_experts(options: ExpertOptions, method: str, layer: dict[str, Any]) -> KTMoEWrapper:
    """The experts of a layer, loaded and packed for `method`; `layer`: arguments of KTMoEWrapper.

    `options` are `with_method` and `with_threads`. Experts that are stored otherwise are decoded to bfloat16
    and quantised anew, a layer at a time.
    """
    wrapper = options.wrapper(**layer)
    wrapper.load_weights(None)
    if method == options.method:
        return wrapper
    if any(bias is not None for bias in wrapper.biases(0)):
        raise FeatureUnavailableError(
            f"the experts of layer {wrapper.layer_idx} have biases, and are stored as {options.method}: "
            f"such experts are not turned into {method}; give experts='{AS_STORED}'."
        )
    source = PackedWeights(wrapper)
    sizes = (source.num_experts, source.intermediate_size, source.hidden_size)
    gate, up = (torch.empty(sizes, dtype=torch.bfloat16) for _ in range(2))
    down = torch.empty(sizes[0], sizes[2], sizes[1], dtype=torch.bfloat16)
    for expert in range(source.num_experts):
        weights = source.expert(expert)
        gate[expert], up[expert], down[expert] = weights.gate, weights.up, weights.down
    wrapper = dataclasses.replace(options, method=method).wrapper(**layer)
    wrapper.load_weights_from_tensors(gate, up, down)
    return wrapper


def pack_anew(wrapper: KTMoEWrapper, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    """What the loaded layer, of method BF16, computes with from now on; calls that run keep what they had.

    `gate_up` [E, 2I, H], gate over up, and `down` [E, H, I], both bfloat16, are not kept.
    """
    gate, up = gate_up.chunk(2, dim=1)
    experts = quantize_experts(wrapper.method, list(gate), list(up), list(down))
    assert wrapper.moe is not None, "pack_anew before load_weights"
    experts.hand_over(wrapper.moe, list(range(wrapper.num_experts)), PACKED)
