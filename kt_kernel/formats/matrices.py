"""The experts of one layer in the form the extension packs: codes, scales and global scales, by address."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.calls.inputs import FLOAT_CODES
from kt_kernel.layer_config import MAPPED


@dataclass(frozen=True)
class ExpertMatrix:
    """One contiguous matrix in the layout of a checkpoint; `name` is what messages call it.

    `bias`: contiguous float32 [rows], added to what the matrix gives. The layouts of `weight` and `scale` are
    those of `MoeLayer.load_experts` (csrc/bindings.cc).
    """

    name: str
    weight: torch.Tensor
    scale: torch.Tensor | None = None
    global_scale: float = 1.0
    bias: torch.Tensor | None = None

    def addresses(self) -> tuple[int, int, float]:
        """(weight, scale, global scale), 0 for no scale."""
        return (self.weight.data_ptr(), _address(self.scale), self.global_scale)


@dataclass
class LayerExperts:
    """gate, up [I, H] and down [H, I] of all experts, by logical (checkpoint) id.

    `group_size`: columns that share a scale, for the methods where it is free; 0 = a whole row. `formats`: of
    gate, up and down, for the methods that have several.
    """

    gate: list[ExpertMatrix] = field(default_factory=list)
    up: list[ExpertMatrix] = field(default_factory=list)
    down: list[ExpertMatrix] = field(default_factory=list)
    group_size: int = 0
    formats: tuple[str, str, str] | None = None

    def addresses(self, order: list[int]) -> tuple[list[tuple[int, int, float]], ...]:
        """gate, up, down: one `ExpertMatrix.addresses` per slot, `order[slot]` being the expert in it."""
        return tuple(
            [matrices[expert].addresses() for expert in order] for matrices in (self.gate, self.up, self.down)
        )

    def bias_addresses(self, order: list[int]) -> list[list[int]]:
        """gate, up, down: the address of a bias per slot, 0 for none; [] if there are no biases at all."""
        if all(matrix.bias is None for matrix in self.all()):
            return []
        return [
            [_address(matrices[expert].bias) for expert in order]
            for matrices in (self.gate, self.up, self.down)
        ]

    def biases(self, order: list[int]) -> tuple[tuple[torch.Tensor | None, ...], ...]:
        """By slot: copies of the biases of gate, up and down; () if there are no biases at all."""
        if all(matrix.bias is None for matrix in self.all()):
            return ()
        return tuple(
            tuple(
                None if (bias := matrices[expert].bias) is None else bias.clone() for matrices in self._three
            )
            for expert in order
        )

    @property
    def _three(self) -> tuple[list[ExpertMatrix], ...]:
        return (self.gate, self.up, self.down)

    def hand_over(self, native: kt_kernel_ext.MoeLayer, order: list[int], storage: str) -> None:
        """Load these experts into a layer; `storage` is one of WEIGHT_STORAGES. Raises ValueError.

        Of "mapped" ones the caller keeps this object as long as the layer.
        """
        if storage == MAPPED:
            native.borrow_experts(
                *self.addresses(order), formats=self.formats, biases=self.bias_addresses(order)
            )
            return
        options = {
            "group_size": self.group_size,
            "scale_dtype": self.scale_code,
            "biases": self.bias_addresses(order),
        }
        if self.formats is not None:
            options["formats"] = self.formats
        native.load_experts(*self.addresses(order), **options)

    def all(self) -> list[ExpertMatrix]:
        return self.gate + self.up + self.down

    @property
    def scale_code(self) -> int:
        """The extension's code of the scales' dtype; float32's where there is nothing to choose."""
        scale = self.gate[0].scale
        return FLOAT_CODES[torch.float32] if scale is None else FLOAT_CODES.get(scale.dtype, 2)

    def with_undefined_scale(self) -> list[str]:
        """Names of the matrices that hold byte 255, NaN, among their power-of-two scales."""
        return [
            matrix.name
            for matrix in self.all()
            if matrix.scale is not None
            and matrix.scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
            and bool((matrix.scale.view(torch.uint8) == 255).any())
        ]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
