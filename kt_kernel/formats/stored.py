"""StoredExperts: what the packed bytes of a layer's experts leave open."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel.calls.inputs import FLOAT_CODES
from kt_kernel.formats.matrices import LayerExperts


@dataclass(frozen=True)
class StoredExperts:
    """`global_scales`: float32 [E, 3] by physical slot. `biases`: by slot, those of gate, up and down; empty
    without any. `formats`: of gate, up and down, for the methods that have several.
    """

    group_size: int
    scale_dtype: torch.dtype | None
    global_scales: torch.Tensor
    biases: tuple[tuple[torch.Tensor | None, ...], ...]
    formats: tuple[str, ...] | None

    @classmethod
    def of(cls, experts: LayerExperts, order: list[int]) -> StoredExperts:
        scale = experts.gate[0].scale
        factors = [
            [matrices[expert].global_scale for matrices in (experts.gate, experts.up, experts.down)]
            for expert in order
        ]
        return cls(
            experts.group_size,
            None if scale is None else scale.dtype,
            torch.tensor(factors, dtype=torch.float32),
            experts.biases(order),
            experts.formats,
        )

    @classmethod
    def read(cls, fields: dict[str, Any]) -> StoredExperts:
        """From what `fields` gave."""
        dtype, formats = fields["scale_dtype"], fields["formats"]
        return cls(
            fields["group_size"],
            None if dtype is None else getattr(torch, dtype),
            torch.tensor(fields["global_scales"], dtype=torch.float32),
            tuple(tuple(map(_read_bias, biases)) for biases in fields["biases"]),
            None if formats is None else tuple(formats),
        )

    def fields(self) -> dict[str, Any]:
        """As JSON can hold it, for another process."""
        dtype = None if self.scale_dtype is None else str(self.scale_dtype).removeprefix("torch.")
        return {
            **vars(self),
            "scale_dtype": dtype,
            "global_scales": self.global_scales.tolist(),
            "biases": [[_written_bias(bias) for bias in biases] for biases in self.biases],
        }

    def attach_arguments(self) -> dict[str, Any]:
        """Of `MoeLayer.attach_experts`."""
        code = FLOAT_CODES[torch.float32]
        if self.scale_dtype is not None:
            code = FLOAT_CODES.get(self.scale_dtype, code)
        return {"formats": list(self.formats or ()), "group_size": self.group_size, "scale_dtype": code}


def _written_bias(bias: torch.Tensor | None) -> str | None:
    return None if bias is None else base64.b64encode(bias.numpy().tobytes()).decode()


def _read_bias(text: str | None) -> torch.Tensor | None:
    return None if text is None else torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
