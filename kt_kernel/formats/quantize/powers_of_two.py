"""Power-of-two scales of the OCP microscaling formats: 2 ** (byte - 127)."""

from __future__ import annotations

import torch

_BIAS = 127


def shared_powers(groups: torch.Tensor, largest_exponent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., columns] -> (ue8m0 bytes [...], the same as float32 [..., 1]).

    The exponent is that of the group's largest value less that of the largest code, as the OCP specification
    says; values that round to more than the largest code saturate.
    """
    _, exponents = groups.abs().amax(dim=-1, keepdim=True).frexp()  # value = m * 2**e with m in [0.5, 1)
    exponents = (exponents - 1 - largest_exponent).clamp(-_BIAS, _BIAS)
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    return (exponents.squeeze(-1) + _BIAS).to(torch.uint8), powers
