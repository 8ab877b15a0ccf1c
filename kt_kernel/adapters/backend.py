"""What computes the experts of one layer for training: the seam between autograd and the kernels.

    function.py (autograd)  ->  Backend.forward(call, save)              -> output [T, H], saved tensors
                            ->  Backend.backward(call, saved, dout, ...) -> Gradients

Sizes: T tokens, k experts each, so R = T k pairs, pair p being token p // k; E experts, hidden size H,
intermediate size I, rank r. Of the rows of expert e, with s the scale of the LoRA:

    g = x Wg^T + s (x Ag^T) Bg^T     u likewise     h = act(g, u)     y = h Wd^T + s (h Ad^T) Bd^T
    out[t] = sum over j of w[t, j] y[t, j]

reference.py is the yardstick in torch, kernel_backend.py runs the extension's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Saved = tuple[torch.Tensor, ...]
"""What `forward` keeps for `backward` besides the call: the backend's own choice, each tensor made by it."""


@dataclass(frozen=True)
class ExpertLora:
    """LoRA of all experts of a layer: contiguous CPU tensors, float32 (float64 under gradcheck).

    gate_a, up_a [E, r, H]; gate_b, up_b [E, I, r]; down_a [E, r, I]; down_b [E, H, r]. `scale`: alpha / r.
    """

    gate_a: torch.Tensor
    gate_b: torch.Tensor
    up_a: torch.Tensor
    up_b: torch.Tensor
    down_a: torch.Tensor
    down_b: torch.Tensor
    scale: float

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], scale: float) -> ExpertLora:
        """From the six in the order of the fields."""
        gate_a, gate_b, up_a, up_b, down_a, down_b = tensors
        return cls(gate_a, gate_b, up_a, up_b, down_a, down_b, scale)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The six, in the order of the fields."""
        return (self.gate_a, self.gate_b, self.up_a, self.up_b, self.down_a, self.down_b)

    @property
    def rank(self) -> int:
        return self.gate_a.shape[1]


@dataclass(frozen=True)
class Dropout:
    """Which inputs of the LoRA's A matrices are kept, by pair: bool gate, up [R, H] and down [R, I].

    What is kept is multiplied by `factor`, 1 / (1 - p). The base matrices see their inputs complete.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    factor: float

    @classmethod
    def of(cls, masks: Sequence[torch.Tensor], factor: float) -> Dropout:
        """From the three in the order of the fields."""
        gate, up, down = masks
        return cls(gate, up, down, factor)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.gate, self.up, self.down)


@dataclass(frozen=True)
class Call:
    """The inputs of one call, all on the CPU.

    `x` [T, H] float32, bfloat16 (float64 under gradcheck); `ids` int64 [T, k], an id outside 0..E-1 is
    skipped; `weights` [T, k] float32 (float64). An expert may appear twice in a row of `ids`.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    lora: ExpertLora | None = None
    dropout: Dropout | None = None


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for."""

    x: bool
    weights: bool
    lora: bool
    base: bool = False

    @property
    def any(self) -> bool:
        return self.x or self.weights or self.lora or self.base


@dataclass(frozen=True)
class Gradients:
    """`x` [T, H] in x's dtype, `weights` [T, k] in that of the weights, `lora`: six tensors like the LoRA's.

    `base`: of the matrices themselves, gate, up [E, I, H] and down [E, H, I], float32 (float64 under
    gradcheck). None where they were not asked for.
    """

    x: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    lora: tuple[torch.Tensor, ...] | None = None
    base: tuple[torch.Tensor, ...] | None = None


class Backend(Protocol):
    """The experts of one layer. Calls of one backend do not depend on each other: any number may be saved."""

    num_experts: int
    hidden_size: int
    intermediate_size: int

    def forward(self, call: Call, needs: Needs) -> tuple[torch.Tensor, Saved]:
        """The output [T, H] in x's dtype, and what `backward` needs for `needs`: nothing if there are none.

        The saved tensors are not changed afterwards.
        """

    def backward(self, call: Call, saved: Saved, dout: torch.Tensor, needs: Needs) -> Gradients:
        """The gradients for `dout` [T, H] in x's dtype. `call` and `saved` equal those of the forward call,
        but need not be the same objects."""


@dataclass(frozen=True)
class ExpertWeights:
    """Decoded matrices of one expert: gate, up [I, H], down [H, I], each with a bias for its rows or None."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class WeightSource(Protocol):
    """The experts of one layer, decoded one at a time."""

    num_experts: int
    hidden_size: int
    intermediate_size: int

    def expert(self, expert: int) -> ExpertWeights:
        """The matrices of that expert, in any float dtype; the caller does not change them."""
