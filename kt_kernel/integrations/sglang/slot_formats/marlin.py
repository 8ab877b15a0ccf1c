"""Slots of the Marlin kernels: 4-bit codes in tiles of 16 inputs x 64 outputs, scales in the tile's order.

    stored          codes [outputs, inputs/8 words]              scales [outputs, groups]
    (GPTQ_INT4)           [inputs/8 words, outputs]                     [groups, outputs]
    slot            codes [inputs/16, outputs * 2 words]         scales [groups, outputs], permuted in 64s

The codes go through SGLang's own repacking kernel, the scales through an order learned from its functions.
Nothing here waits for the device: an index that is a Python list would.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from kt_kernel.formats.expert_image import ExpertEncoding, ExpertTensors

_TILE = 16  # inputs
_TILE_OUTPUTS = 64
# The 4-bit float kernels widen four scales at a time, in this order.
_FLOAT_ORDER = (0, 2, 1, 3)
_HALF_OF_THE_LAST_BIT = 1 << 6  # of the three bits of mantissa kept of ten


class _Marlin(ABC):
    """Gate and up in one matrix, and down; `names` are the layer's tensors in the order of ExpertTensors."""

    def __init__(self, encoding: ExpertEncoding, names: tuple[str, ...], share: int) -> None:
        self.names = names
        self._encoding = encoding
        self._share = share  # intermediate size in the slots, padded
        self._orders: dict[torch.device, torch.Tensor] = {}
        self._no_order: dict[torch.device, torch.Tensor] = {}

    def places(self, layer: torch.nn.Module, slot: int) -> None:
        """Every part is rearranged."""
        return None

    def store(self, layer: torch.nn.Module, slot: int, tensors: ExpertTensors) -> None:
        """The stored bytes cross the bus, and are rearranged on the device."""
        w13, w13_scale, w2, w2_scale = (getattr(layer, name).data[slot] for name in self.names[:4])
        there = tensors.to(w13.device)
        for place, codes in ((w13, self._inputs_first(there.w13_weight, 2)), (w2, self._w2(there))):
            place.copy_(self._repacked(codes))
        w13_scale.copy_(self._scales(self._w13_scales(there), w13_scale))
        w2_scale.copy_(self._scales(self._w2_scales(there), w2_scale))

    def is_like(self, other: Any) -> bool:
        return type(other) is type(self) and other.names == self.names

    # ---- codes -----------------------------------------------------------------------------------

    def _inputs_first(self, part: torch.Tensor, halves: int) -> torch.Tensor:
        """[outputs, n] -> [n, outputs], codes as words; each of the halves padded to the slots' size."""
        if part.dtype == torch.uint8:
            part = part.view(torch.int32)
        if self._share != self._encoding.share:
            part = part.unflatten(0, (halves, -1))
            part = torch.cat((part, part.new_zeros(halves, self._padding, part.shape[-1])), 1).flatten(0, 1)
        return part.t().contiguous()

    def _w13_scales(self, tensors: ExpertTensors) -> torch.Tensor:
        return self._inputs_first(tensors.w13_scale, 2)

    def _w2(self, tensors: ExpertTensors) -> torch.Tensor:
        return self._padded_inputs(tensors.w2_weight.view(torch.int32).t(), 8)

    def _w2_scales(self, tensors: ExpertTensors) -> torch.Tensor:
        return self._padded_inputs(tensors.w2_scale.t(), self._encoding.scale_group[1])

    def _padded_inputs(self, part: torch.Tensor, inputs_per_row: int) -> torch.Tensor:
        if self._share == self._encoding.share:
            return part.contiguous()
        rows = self._padding // inputs_per_row
        return torch.cat((part, part.new_zeros(rows, part.shape[1])))

    @property
    def _padding(self) -> int:
        return self._share - self._encoding.share

    def _repacked(self, words: torch.Tensor) -> torch.Tensor:
        from sglang.kernels.ops.quantization.gptq_marlin_repack import gptq_marlin_repack

        order = self._no_order.setdefault(
            words.device, torch.empty(0, dtype=torch.int32, device=words.device)
        )
        return gptq_marlin_repack(words, order, 8 * words.shape[0], words.shape[1], 4)

    # ---- scales ----------------------------------------------------------------------------------

    @abstractmethod
    def _scales(self, scales: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Scales [groups, outputs] as the kernels read them, in the type of `place`."""

    def _permuted(self, scales: torch.Tensor) -> torch.Tensor:
        order = self._orders.get(scales.device)
        if order is None:
            order = self._orders[scales.device] = self._order().to(scales.device)
        return scales.reshape(-1, order.numel()).index_select(1, order).view(scales.shape)

    def _order(self) -> torch.Tensor:
        from sglang.srt.layers.quantization.marlin_utils import get_scale_perms

        of_groups, of_whole_rows = get_scale_perms()
        return torch.tensor(of_groups if self._encoding.scale_group[1] else of_whole_rows)


class MarlinInt4(_Marlin):
    """INT4 with a scale per group or row in the layer's dtype: compressed-tensors' WNA16, and GPTQ."""

    @classmethod
    def of(
        cls, layer: torch.nn.Module, method: Any, encoding: ExpertEncoding, names: tuple[str, ...]
    ) -> MarlinInt4 | None:
        """None if columns are reordered, or groups are as long as rows, which SGLang permutes as such."""
        group = encoding.scale_group[1]
        if group >= min(encoding.hidden, encoding.share) or not _holds_tiles(layer, encoding, names, group):
            return None
        if any(_reorders(layer, name) for name in ("w13_g_idx_sort_indices", "w2_g_idx_sort_indices")):
            return None
        return cls(encoding, names, encoding.share)

    def _inputs_first(self, part: torch.Tensor, halves: int) -> torch.Tensor:
        return part if self._stored_inputs_first else super()._inputs_first(part, halves)

    def _w2(self, tensors: ExpertTensors) -> torch.Tensor:
        return tensors.w2_weight if self._stored_inputs_first else super()._w2(tensors)

    def _w2_scales(self, tensors: ExpertTensors) -> torch.Tensor:
        return tensors.w2_scale if self._stored_inputs_first else super()._w2_scales(tensors)

    @property
    def _stored_inputs_first(self) -> bool:
        return self._encoding.up_follows_gate_along == 1

    def _scales(self, scales: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return self._permuted(scales)


class MarlinFp4(_Marlin):
    """E2M1 with a power of two per 32 inputs (MXFP4), one byte each."""

    @classmethod
    def of(
        cls, layer: torch.nn.Module, method: Any, encoding: ExpertEncoding, names: tuple[str, ...]
    ) -> MarlinFp4 | None:
        """None if the hidden size is padded, as SGLang does where it is no multiple of 256."""
        down = getattr(layer, names[2], None)
        if down is None or down.ndim != 3:
            return None
        share = down.shape[1] * _TILE  # SGLang pads it to whole tiles
        padding = share - encoding.share
        if not 0 <= padding < 128 or padding % 32:
            return None
        return cls(encoding, names, share) if _holds_tiles(layer, encoding, names, 32, share) else None

    def _order(self) -> torch.Tensor:
        return super()._order().view(-1, 4)[:, _FLOAT_ORDER].flatten()

    def _scales(self, scales: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return self._permuted(scales).to(place.dtype)


class MarlinNvfp4(MarlinFp4):
    """E2M1 with an e4m3 per 16 inputs, and a scale of the whole matrix in the model's dtype (NVFP4).

    Of an e4m3, read as a half-precision number x 2^7, the kernels keep the eight bits that follow the sign.
    They have one scale for gate and up together: the larger one; where they differ, the smaller one's scales
    of groups shrink, rounded to the same three bits of mantissa.
    """

    @classmethod
    def of(
        cls, layer: torch.nn.Module, method: Any, encoding: ExpertEncoding, names: tuple[str, ...]
    ) -> MarlinNvfp4 | None:
        """None if other kernels than Marlin's read the layer."""
        backend = method.get_moe_runner_backend(layer)
        if backend is None or not backend.is_marlin() or not _holds_tiles(layer, encoding, names, 16):
            return None
        return cls(encoding, (*names, "w13_weight_scale_2", "w2_weight_scale_2"), encoding.share)

    def store(self, layer: torch.nn.Module, slot: int, tensors: ExpertTensors) -> None:
        """As for other formats, and the global scales."""
        from sglang.srt.layers.quantization.marlin_utils_fp4 import nvfp4_marlin_process_global_scale

        super().store(layer, slot, tensors)
        w13, w2 = layer.w13_weight_scale_2.data, layer.w2_weight_scale_2.data
        found = tensors.global_scales.to(w13.device, non_blocking=True)
        w13[slot].copy_(nvfp4_marlin_process_global_scale(found[:2].amax().to(w13.dtype))[0])
        w2[slot].copy_(nvfp4_marlin_process_global_scale(found[2].to(w2.dtype))[0])

    def _w13_scales(self, tensors: ExpertTensors) -> torch.Tensor:
        of_halves = tensors.global_scales[:2] / tensors.global_scales[:2].amax()
        scales = tensors.w13_scale.float().unflatten(0, (2, -1)) * of_halves[:, None, None]
        return self._inputs_first(scales.flatten(0, 1).to(torch.half), 2)

    def _scales(self, scales: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        bits = (self._permuted(scales.to(torch.half)) * 2**7).view(torch.int16)
        kept = ((bits + _HALF_OF_THE_LAST_BIT) << 1).view(torch.uint8)[:, 1::2]
        return kept.view(place.dtype)


def _holds_tiles(
    layer: torch.nn.Module, encoding: ExpertEncoding, names: tuple[str, ...], group: int, share: int = 0
) -> bool:
    """Has a slot of the layer's tensors the sizes of repacked codes and their scales?"""
    hidden, share = encoding.hidden, share or encoding.share
    if hidden % _TILE_OUTPUTS or share % _TILE_OUTPUTS:
        return False
    expected = []
    for inputs, outputs in ((hidden, 2 * share), (share, hidden)):
        expected.append((inputs // _TILE, 2 * outputs))
        expected.append((inputs // group if group else 1, outputs))
    found = [getattr(layer, name, None) for name in names]
    return all(
        tensor is not None and tuple(tensor.shape[1:]) == shape
        for tensor, shape in zip(found, expected, strict=True)
    )


def _reorders(layer: torch.nn.Module, name: str) -> bool:
    order = getattr(layer, name, None)
    return order is not None and order.numel() > 0
