"""A LoRA on the experts of a layer that serves: every call of the layer computes with it.

It is computed beside the packed weights, whatever their format, by the kernels of csrc/adapters/, on the CPU,
in float32.
"""

from __future__ import annotations

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.adapters.backend import ExpertLora
from kt_kernel.cpu_share import CpuShare
from kt_kernel.errors import CallOrderError, InputError
from kt_kernel.moe import KTMoEWrapper


def attach(wrapper: KTMoEWrapper, lora: ExpertLora | None) -> None:
    """From the next call on, experts that `wrapper` computes have `lora`, which is copied; None: no longer.

    `lora` is that of the whole experts, float32; of a wrapper with a share, its part of them is used. What
    `write_expert` and its kin copy out is without it. Raises InputError for other sizes, CallOrderError
    before the weights are loaded.
    """
    if wrapper.moe is None:
        raise CallOrderError(
            f"layer {wrapper.layer_idx}: the weights are not loaded; call load_weights first."
        )
    if lora is None:
        kt_kernel_ext.set_lora(wrapper.moe, tensors=None, rank=0, scale=0.0)
        return
    e, r, h, i = wrapper.num_experts, lora.rank, wrapper.hidden_size, wrapper.moe_intermediate_size
    shapes = ((e, r, h), (e, i, r), (e, r, h), (e, i, r), (e, r, i), (e, h, r))
    for tensor, shape in zip(lora.tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype is not torch.float32:
            raise InputError(
                f"layer {wrapper.layer_idx}: a matrix of the LoRA is {tensor.dtype} {list(tensor.shape)}, "
                f"expected float32 {list(shape)}."
            )
    tensors = [tensor.contiguous() for tensor in _cut(lora, wrapper.share)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    kt_kernel_ext.set_lora(wrapper.moe, tensors=addresses, rank=r, scale=lora.scale)


def _cut(lora: ExpertLora, share: CpuShare) -> tuple[torch.Tensor, ...]:
    """What belongs to rows [begin, end) of gate and up, and columns of down."""
    if share.is_whole:
        return lora.tensors
    part = slice(share.begin, share.end)
    return (
        lora.gate_a,
        lora.gate_b[:, part],
        lora.up_a,
        lora.up_b[:, part],
        lora.down_a[:, :, part],
        lora.down_b,
    )
