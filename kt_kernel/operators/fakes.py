"""What native operators return, without computing it: shapes and types, for torch's tracers and compilers.

A twin in torch says that too, run on tensors without memory. Functions here are those of operators without
a twin, and of operators whose twin reads numbers to know what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kt_kernel import kt_kernel_ext
from kt_kernel.operators.registration import TWINS, native_names


def _nothing(*_: Any, **__: Any) -> None:
    """All results are arguments."""


def _like(argument: int) -> Callable[..., Tensor]:
    def fake(*arguments: Any, **_: Any) -> Tensor:
        return torch.empty_like(arguments[argument], memory_format=torch.contiguous_format)

    return fake


def _linear(layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], kt_kernel_ext.linear_rows(layer))


def _packed_weight(layer: int, like: Tensor) -> Tensor:
    return torch.empty_like(like)


FAKES: dict[str, Callable[..., Any]] = {
    "kt_kernel::linear": _linear,
    "kt_kernel::packed_weight": _packed_weight,
    "kt_kernel::give_sums": _nothing,
    "kt_kernel::experts": _like(1),
    "sgl_kernel::store_cache_cpu": _nothing,
    "sgl_kernel::decode_attention_cpu": _nothing,
    "sgl_kernel::extend_attention_cpu": _nothing,
    "sgl_kernel::causal_conv1d_fwd_cpu": _like(0),
    "sgl_kernel::causal_conv1d_update_cpu": _like(0),
    "sgl_kernel::chunk_gated_delta_rule_cpu": _like(2),
    "sgl_kernel::fused_sigmoid_gating_delta_rule_update_cpu": _like(4),
}


def fake_of(name: str) -> Callable[..., Any]:
    """Raises KeyError for an operator that has neither a fake nor a twin."""
    return FAKES[name] if name in FAKES else TWINS[name].function


def register_fakes() -> None:
    """For all native operators, which must be registered; once more changes nothing.

    SGLang's own, which it registers when it compiles a step, replace these.
    """
    for name in sorted(native_names()):
        torch.library.register_fake(name, fake_of(name), allow_override=True)
