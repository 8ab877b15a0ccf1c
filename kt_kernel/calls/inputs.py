"""Checks of the tensors of one forward call: on the hot path, so attributes are read but never the data."""

from __future__ import annotations

import torch

from kt_kernel.device_ops.block import BlockLayout
from kt_kernel.errors import InputError
from kt_kernel.layer_config import LayerConfig

# Codes of the native interface.
FLOAT_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ID_CODES = {torch.int32: 0, torch.int64: 1}

_OTHER_INTEGERS = (torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32)


def check_inputs(
    config: LayerConfig, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three tensors as the kernels take them; raises InputError.

    `hidden` [..., H] bf16/f16/f32 -> [tokens, H] contiguous; `ids` [tokens, k] of any integer type -> int32
    or int64, contiguous; `weights` [tokens, k] -> float32, contiguous. All on one device. A tensor that
    already fits is returned as it is.
    """
    if hidden.dim() != 2:
        hidden = hidden.reshape(-1, hidden.shape[-1] if hidden.dim() else 1)
    tokens, width = hidden.shape
    expected = (tokens, config.num_experts_per_tok)
    if (
        width != config.hidden_size
        or ids.shape != expected
        or weights.shape != expected
        or tokens > config.chunked_prefill_size
        or hidden.dtype not in FLOAT_CODES
        or ids.device != hidden.device
        or weights.device != hidden.device
    ):
        raise InputError(f"layer {config.layer_idx}: {_first_fault(config, hidden, ids, weights)}")
    if ids.dtype not in _ID_CODES:
        ids = _widened(config, ids)
    if weights.dtype is not torch.float32:
        weights = weights.to(torch.float32)
    return hidden.contiguous(), ids.contiguous(), weights.contiguous()


def _first_fault(config: LayerConfig, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> str:
    tokens, width = hidden.shape
    if width != config.hidden_size:
        return f"hidden_states is {width} wide, expected hidden_size {config.hidden_size}."
    if hidden.dtype not in FLOAT_CODES:
        return f"hidden_states is {hidden.dtype}, expected bfloat16, float16 or float32."
    if tokens > config.chunked_prefill_size:
        return (
            f"the call has {tokens} tokens, more than chunked_prefill_size ({config.chunked_prefill_size}); "
            "split the batch or make the layer with a larger one."
        )
    for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
        if tensor.device != hidden.device:
            return f"{name} is on {tensor.device}, expected {hidden.device} where hidden_states is."
        if tensor.shape != (tokens, config.num_experts_per_tok):
            return (
                f"{name} has shape {list(tensor.shape)}, expected [{tokens}, {config.num_experts_per_tok}] "
                "(tokens of hidden_states, num_experts_per_tok)."
            )
    raise AssertionError("called without a fault")


def _widened(config: LayerConfig, ids: torch.Tensor) -> torch.Tensor:
    if ids.dtype not in _OTHER_INTEGERS:
        raise InputError(
            f"layer {config.layer_idx}: topk_ids is {ids.dtype}, expected integers such as int32 or int64."
        )
    return ids.to(torch.int64)


def native_arguments(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, output: torch.Tensor
) -> tuple[int, ...]:
    """Checked tensors as the native calls take them: all their arguments but the last."""
    tokens, top_k = ids.shape
    code = FLOAT_CODES[hidden.dtype]
    return (
        tokens,
        top_k,
        hidden.data_ptr(),
        code,
        ids.data_ptr(),
        _ID_CODES[ids.dtype],
        weights.data_ptr(),
        output.data_ptr(),
        code,
    )


def native_arguments_of_block(
    layout: BlockLayout, block: torch.Tensor, output: torch.Tensor
) -> tuple[int, ...]:
    """The same for inputs that are packed in `block`."""
    base, code = block.data_ptr(), FLOAT_CODES[layout.dtype]
    return (
        layout.tokens,
        layout.top_k,
        base + layout.hidden_offset,
        code,
        base,
        _ID_CODES[torch.int32],
        base + layout.weights_offset,
        output.data_ptr(),
        code,
    )
