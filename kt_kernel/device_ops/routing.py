"""All that is done to the ids of one call where they are, as two operators of torch.

    route              ids ─┬─> slots [T, k]    the device's part, -1 = none
                            ├─> block           the CPU's part, see block.py
                            └─> counts          + 1 per use
    protected_experts  only when the layer defers: which experts `route` must not put among the deferred ids

On a CUDA device they are Triton kernels: `route` is one launch, `protected_experts` a memset and a launch.
The twins here, plain torch, say what they compute; they run on CPU tensors and where triton is missing. All
only enqueue, so a graph can capture them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from kt_kernel.calls import deferral
from kt_kernel.device_ops.block import BlockLayout, outputs_of_route

logger = logging.getLogger(__name__)

_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class Split:
    """How one layer's ids are shared out, as tensors where the ids are; each may be missing.

    `slot_of`: int32 [E+1], the device's slots, -1 = none. `on_device`: bool [E+1], True = the CPU skips the
    expert. Their last entries stand for no expert. `counts`: int64 [E+1], to be increased by one at e + 1 for
    each use of expert e. `cpu_weight_factor`: what the CPU's weights are multiplied by.
    """

    slot_of: torch.Tensor | None = None
    on_device: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    cpu_weight_factor: float = 1.0

    # ---- one by one, for ids in the CPU's memory -------------------------------------------------

    def count(self, ids: torch.Tensor) -> None:
        if self.counts is not None:
            count_uses(self.counts, ids)

    def slots(self, ids: torch.Tensor) -> torch.Tensor | None:
        return None if self.slot_of is None else self.slot_of[ids.long()].to(ids.dtype)

    def weights_for_cpu(self, weights: torch.Tensor) -> torch.Tensor:
        return weights if self.cpu_weight_factor == 1.0 else weights * self.cpu_weight_factor


def count_uses(counts: torch.Tensor, ids: torch.Tensor) -> None:
    """Add the uses in `ids` [tokens, k], any integer type, to `counts` [E+1]; entry 0 takes the ids of -1."""
    places = ids.reshape(-1).long() + 1
    counts.index_add_(0, places, counts.new_ones(1).expand(places.numel()))


def route(
    ids: torch.Tensor, weights: torch.Tensor, hidden: torch.Tensor | None, split: Split, num_experts: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(slots [T, k] like `ids`, block) of a call that defers nothing; `split.counts` is increased.

    `ids` int32 or int64, `weights` float32, contiguous, as `check_inputs` returns them. Without `hidden` the
    block is empty. An id that is no expert has no slot and stays in the block, for the CPU to report.
    """
    return _route(ids, weights, hidden, split, None, num_experts)


def route_deferring(
    ids: torch.Tensor,
    weights: torch.Tensor,
    hidden: torch.Tensor,
    split: Split,
    protected_k: int,
    num_experts: int,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`route`, with the experts of kt_kernel/calls/deferral.py's rule among the block's deferred ids."""
    factor = split.cpu_weight_factor
    protected = torch.ops.kt_kernel.protected_experts(ids, weights, factor, protected_k, num_experts)
    return _route(ids, weights, hidden, split, protected, num_experts)


def _route(ids, weights, hidden, split, protected, num_experts):
    slots, block = torch.ops.kt_kernel.route(
        ids,
        weights,
        hidden,
        split.slot_of,
        split.on_device,
        split.counts,
        protected,
        split.cpu_weight_factor,
        num_experts,
    )
    return (None if split.slot_of is None else slots), block


# ---- the twins in torch ----------------------------------------------------------------------------


def protected_experts_reference(
    ids: torch.Tensor, weights: torch.Tensor, factor: float, protected_k: int, num_experts: int
) -> torch.Tensor:
    """bool [E+1]: the experts that are computed at once for all tokens; the last entry is of no meaning."""
    return deferral.protected_experts(ids, weights * factor, protected_k, num_experts)


def route_reference(
    ids: torch.Tensor,
    weights: torch.Tensor,
    hidden: torch.Tensor | None,
    slot_of: torch.Tensor | None,
    on_device: torch.Tensor | None,
    counts: torch.Tensor | None,
    protected: torch.Tensor | None,
    factor: float,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    slots, block = outputs_of_route(ids, hidden, slot_of)
    real = (ids >= 0) & (ids < num_experts)
    # The tables' last entry stands for all that is no expert.
    places = torch.where(real, ids, num_experts).long()
    if slot_of is not None:
        slots.copy_(slot_of[places])
    if counts is not None:
        count_uses(counts, torch.where(real, ids, -1))
    if hidden is not None:
        layout = BlockLayout(*ids.shape, hidden.shape[1], hidden.dtype)
        mine = ids.clamp(_INT32.min, _INT32.max)
        if on_device is not None:
            mine = mine.masked_fill(on_device[places], -1)
        if protected is not None:
            deferred = real & ~protected[places]
            layout.deferred_ids(block).copy_(mine.masked_fill(~deferred, -1))
            mine = mine.masked_fill(deferred, -1)
        layout.ids(block).copy_(mine)
        layout.weights(block).copy_(weights * factor)
        if layout.packs_hidden:
            layout.hidden(block).copy_(hidden)
    return slots, block


# ---- the operators ---------------------------------------------------------------------------------


@cache
def _kernels() -> ModuleType | None:
    try:
        from kt_kernel.device_ops import routing_triton
    except ImportError as error:
        logger.warning(
            "triton cannot be imported (%s): each layer's routing takes about 15 torch operations instead of "
            "one kernel; install the triton that belongs to this torch",
            error,
        )
        return None
    return routing_triton


def _protected_experts_on_device(ids, weights, factor, protected_k, num_experts):
    kernels = _kernels()
    if kernels is None:
        return protected_experts_reference(ids, weights, factor, protected_k, num_experts)
    with torch.cuda.device(ids.device):  # triton launches on the current one
        return kernels.protected_experts(ids, weights, factor, protected_k, num_experts)


def _route_on_device(ids, *arguments):
    kernels = _kernels()
    if kernels is None:
        return route_reference(ids, *arguments)
    with torch.cuda.device(ids.device):
        return kernels.route(ids, *arguments)


def _protected_experts_shape(ids, weights, factor, protected_k, num_experts):
    return ids.new_empty(num_experts + 1, dtype=torch.bool)


def _route_shape(ids, weights, hidden, slot_of, *_):
    return outputs_of_route(ids, hidden, slot_of)


_LIBRARY = torch.library.Library("kt_kernel", "DEF")
_LIBRARY.define(
    "protected_experts(Tensor ids, Tensor weights, float factor, int protected_k, int num_experts) -> Tensor"
)
_LIBRARY.define(
    "route(Tensor ids, Tensor weights, Tensor? hidden, Tensor? slot_of, Tensor? on_device, "
    "Tensor(a!)? counts, Tensor? protected, float factor, int num_experts) -> (Tensor, Tensor)"
)
for _name, _on_cpu, _on_device, _shape in (
    (
        "protected_experts",
        protected_experts_reference,
        _protected_experts_on_device,
        _protected_experts_shape,
    ),
    ("route", route_reference, _route_on_device, _route_shape),
):
    _LIBRARY.impl(_name, _on_cpu, "CPU")
    _LIBRARY.impl(_name, _on_device, "CUDA")  # ROCm's name too
    _LIBRARY.impl(_name, _shape, "Meta")
