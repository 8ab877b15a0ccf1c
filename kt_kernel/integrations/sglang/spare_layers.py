"""Layers that hold nothing but room for experts: of a served layer's own kind, or unquantised.

SGLang's methods compute with whatever layer they are given, and rearrange its tensors once, after loading.
So one slot is made and rearranged by SGLang's own code, and its tensors then get as many slots as needed:
no tensor of a whole layer is ever held twice.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from kt_kernel.formats.expert_image import ExpertEncoding
from kt_kernel.integrations.sglang.slot_formats import SlotFormat, has_format, maker_of, slot_format

# What SGLang's methods leave on a layer after loading, so that they do not do it twice.
_MARKS_OF_LOADING = (
    "is_marlin_converted",
    "is_triton_converted",
    "_original_shapes",
    "_dsv4_mxfp4_backend",
    "workspace",
)


class SpareLayer(NamedTuple):
    """A layer with room for experts, the method that computes with it, and how its slots are filled."""

    layer: torch.nn.Module
    method: Any
    form: SlotFormat


def device_of(layer: torch.nn.Module) -> torch.device:
    """Where SGLang holds the layer's own experts, or would: tensors without slots are somewhere, too."""
    return next(layer.parameters(recurse=False)).device


def native_layer(
    layer: torch.nn.Module, method: Any, slots: int, encoding: ExpertEncoding
) -> SpareLayer | None:
    """Room for `slots` experts of the kind of `layer`; None if slots of that kind cannot be filled."""
    if not has_format(layer, method, encoding):
        return None
    draft = _Draft(layer)
    scheme = getattr(layer, "scheme", None)
    if isinstance(method, UnquantizedFusedMoEMethod) and scheme is None:
        if slot_format(layer, method, encoding) is None:
            return None
        return draft.as_made(copy.copy(method), slots, encoding)
    draft.layer.scheme = None if scheme is None else _copied_maker(scheme)
    return draft.as_loaded(_copied_maker(method), slots, encoding)


def weight_only_layer(layer: torch.nn.Module, slots: int, encoding: ExpertEncoding) -> SpareLayer | None:
    """Room for experts in 4-bit floats whatever kernels `layer` has: Marlin's, which leave activations as
    they are and so need no scales of them. None for other encodings.
    """
    draft = _Draft(layer)
    draft.computes_otherwise()
    if encoding.method == "NVFP4":
        from sglang.srt.layers.quantization.compressed_tensors import compressed_tensors, schemes

        draft.layer.scheme = schemes.CompressedTensorsW4A16Nvfp4MoE()
        return draft.as_loaded(compressed_tensors.CompressedTensorsFusedMoEMethod(None), slots, encoding)
    if encoding.method == "MXFP4":
        from sglang.srt.layers.quantization.mxfp4_marlin_moe import Mxfp4MarlinMoEMethod

        return draft.as_loaded(Mxfp4MarlinMoEMethod(_NothingBefore(), prefix=""), slots, encoding)
    return None


def decoded_layer(layer: torch.nn.Module, slots: int, encoding: ExpertEncoding) -> SpareLayer:
    """Room for `slots` experts in the model's dtype, computed by SGLang's unquantised kernels."""
    method = UnquantizedFusedMoEMethod()
    method.use_flashinfer_cutlass = False  # plain matrices, whatever backend is asked for elsewhere
    draft = _Draft(layer)
    draft.computes_otherwise()
    return draft.as_made(method, slots, encoding)


def name_of(layer: torch.nn.Module, method: Any) -> str:
    """Whose slots these are, for messages."""
    return type(maker_of(layer, method)).__name__


class _NothingBefore:
    """The method that SGLang's MXFP4 method calls before it rearranges a layer."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass


class _Draft:
    """A layer of the sizes of `like` with weights and modules of its own, none yet."""

    def __init__(self, like: torch.nn.Module) -> None:
        self.device = device_of(like)
        self.layer = copy.copy(like)
        # The copy shares what makes the layer (sizes, dispatcher); weights and modules are its own.
        self.layer.__dict__.update(_parameters={}, _buffers={}, _modules={})
        for mark in _MARKS_OF_LOADING:
            self.layer.__dict__.pop(mark, None)
        self.config = dataclasses.replace(like.moe_runner_config, layer=self.layer)
        self.layer.moe_runner_config = self.config

    def computes_otherwise(self) -> None:
        """The method will not be the one of the layer that this is like."""
        self.layer.scheme = self.layer.quant_config = None
        if self.layer.should_fuse_routed_scaling_factor_in_topk:
            # The router's weights have it; other kernels would repeat it.
            self.config.routed_scaling_factor = None

    def as_made(self, method: Any, slots: int, encoding: ExpertEncoding) -> SpareLayer:
        """For methods whose slots are filled as they were made."""
        self._create(method, slots)
        return SpareLayer(self.layer, method, slot_format(self.layer, method, encoding))

    def as_loaded(self, method: Any, slots: int, encoding: ExpertEncoding) -> SpareLayer | None:
        """For methods that rearrange the tensors; None if the slots cannot be filled."""
        self._create(method, 1)
        for tensor in self.layer.parameters(recurse=False):
            tensor.data.reshape(-1).view(torch.uint8).zero_()
        with torch.device(self.device):
            method.process_weights_after_loading(self.layer)
        form = slot_format(self.layer, method, encoding)
        if form is None:
            return None
        self._widen(slots, form.names)
        if hasattr(method, "_cutlass_buffers_ready"):
            method._cutlass_buffers_ready = False
            method._ensure_cutlass_buffers_initialized(self.layer)
        return SpareLayer(self.layer, method, form)

    def _create(self, method: Any, slots: int) -> None:
        config = self.config
        self.layer.num_local_experts = config.num_local_experts = slots
        with torch.device(self.device):
            method.create_weights(
                layer=self.layer,
                num_experts=slots,
                hidden_size=config.hidden_size,
                intermediate_size_per_partition=config.intermediate_size_per_partition,
                params_dtype=config.params_dtype,
                weight_loader=None,
            )
        method.create_moe_runner(self.layer, config)

    def _widen(self, slots: int, names: tuple[str, ...]) -> None:
        """Tensors of one slot become tensors of `slots`, with nothing in them.

        Not those that SGLang made for the checkpoint's sake and its kernels do not read.
        """
        for name, tensor in list(self.layer.named_parameters(recurse=False)):
            if name in names or not tensor.numel():
                room = torch.empty(slots, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
                setattr(self.layer, name, torch.nn.Parameter(room, requires_grad=False))
        self.layer.num_local_experts = self.config.num_local_experts = slots


def _copied_maker(maker: Any) -> Any:
    """A method or scheme keeps the runner of one layer, and so may a kernel that it leaves the work to."""
    copied = copy.copy(maker)
    if hasattr(copied, "kernel"):
        copied.kernel = copy.copy(copied.kernel)
    copied.__dict__.pop("_cutlass_buffers_ready", None)
    return copied
