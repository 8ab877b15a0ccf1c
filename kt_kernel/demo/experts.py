"""Cutting a dense MLP into equally weighted experts.

A dense SwiGLU MLP is a sum over its neurons i:

    y = sum_i down[:, i] * silu(gate[i] . x) * (up[i] . x)

Any partition of the neurons splits that sum into partial sums with the same shape: experts.  A
router whose weights are all zero gives each of E experts the probability 1/E, and choosing all E
keeps it after renormalisation, so multiplying `down` by E restores the dense result.  With E a
power of two, E * down is exact in binary floating point and so is the weight 1/E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_EXPERTS = 8


@dataclass(frozen=True)
class Expert:
    """One expert: gate and up [neurons, hidden], down [hidden, neurons]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def split_mlp(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> list[Expert]:
    """Cut gate/up [I, H] and down [H, I] into `NUM_EXPERTS` experts of I/8 neighbouring neurons.

    Raises:
        ValueError: I is not a multiple of the number of experts.
    """
    intermediate = gate.shape[0]
    if intermediate % NUM_EXPERTS:
        raise ValueError(f"intermediate size {intermediate} is not a multiple of {NUM_EXPERTS} experts")
    neurons = intermediate // NUM_EXPERTS
    return [
        Expert(
            gate=gate[start : start + neurons].contiguous(),
            up=up[start : start + neurons].contiguous(),
            down=(down[:, start : start + neurons] * NUM_EXPERTS).contiguous(),
        )
        for start in range(0, intermediate, neurons)
    ]
