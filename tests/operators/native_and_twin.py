"""An operator as torch calls it, and its slow twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kt_kernel import operators
from kt_kernel.engine import get_engine
from kt_kernel.operators.registration import TWINS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One unit in the last place (sums in another order may round to the neighbour), and a few of fp32.
UNIT = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def native(name: str, threads: int = 2) -> Callable[..., Any]:
    """`name` of sgl_kernel, or with its namespace; computes on so many threads until the next call."""
    operators.install(get_engine(threads))
    namespace, _, operator = name.rpartition("::")
    return getattr(getattr(torch.ops, namespace or "sgl_kernel"), operator)


def twin(name: str) -> Callable[..., Any]:
    return TWINS[name if "::" in name else f"sgl_kernel::{name}"].function


def numbers(*sizes: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*sizes, generator=generator) * scale).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, units: float = 1.01) -> None:
    """Equal up to `units` units in the last place of each number, or of a small share of the largest."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype}, expected {expected.dtype}"
    share = 0.1 if actual.dtype == torch.float32 else 1e-3  # sums cancel
    wide, wanted = actual.double(), expected.double()
    floor = share * wanted.nan_to_num().abs().max() if wanted.numel() else 0.0
    wrong = (wide - wanted).abs() > UNIT[actual.dtype] * units * (wanted.abs() + floor) + 1e-30
    wrong |= wide.isnan() != wanted.isnan()
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} differ: {wide[wrong][:4]} and {wanted[wrong][:4]}"
    )


def same(actual: Any, expected: Any) -> bool:
    """Bit for bit, of one tensor or several."""
    if isinstance(actual, torch.Tensor):
        return torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    return len(actual) == len(expected) and all(same(a, e) for a, e in zip(actual, expected, strict=True))
