"""The operators of routing.py as Triton kernels; what they compute stands in the twins there.

    mark_protected   a program per token: ranks its k experts, marks those that must not be deferred
    route_call       program p routes token p and copies the p-th piece of the hidden states

Ids that are no expert are read from nowhere: their table entry is the last one, E.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kt_kernel.device_ops.block import BlockLayout, outputs_of_route

# Hidden values per program: 8 of 2 bytes for each of 128 threads, one 16-byte access. Not tuned: no CUDA
# device has been measured yet.
_PIECE = 1024


def protected_experts(
    ids: torch.Tensor, weights: torch.Tensor, factor: float, protected_k: int, num_experts: int
) -> torch.Tensor:
    """One memset and one kernel."""
    protected = torch.zeros(num_experts + 1, dtype=torch.uint8, device=ids.device)
    tokens, top_k = ids.shape
    if tokens:
        mark_protected[(tokens,)](
            ids, weights, protected, factor, num_experts, protected_k, top_k, triton.next_power_of_2(top_k)
        )
    return protected.view(torch.bool)


def route(
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
    """One kernel."""
    slots, block = outputs_of_route(ids, hidden, slot_of)
    tokens, top_k = ids.shape
    if tokens == 0:
        return slots, block
    parts, copied, values = (None, None, None), (None, None), 0
    if hidden is not None:
        layout = BlockLayout(tokens, top_k, hidden.shape[1], hidden.dtype)
        parts = layout.ids(block), layout.deferred_ids(block), layout.weights(block)
        if layout.packs_hidden:
            # As integers: nothing may touch the bits of a NaN.
            bits = torch.int32 if hidden.dtype.itemsize == 4 else torch.int16
            copied, values = (hidden.view(bits), layout.hidden(block).view(bits)), hidden.numel()
    programs = max(tokens, triton.cdiv(values, _PIECE))
    route_call[(programs,)](
        ids,
        weights,
        slot_of,
        _bytes(on_device),
        _bytes(protected),
        counts,
        slots,
        *parts,
        *copied,
        factor,
        tokens,
        num_experts,
        values,
        top_k,
        triton.next_power_of_2(top_k),
        _PIECE,
    )
    return slots, block


def _bytes(table: torch.Tensor | None) -> torch.Tensor | None:
    return None if table is None else table.view(torch.uint8)


@triton.jit
def mark_protected(
    ids,
    weights,
    protected,
    factor,
    num_experts,
    protected_k,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
):
    """`protected` [E+1], zeros: 1 for each expert among the `protected_k` heaviest of this token."""
    lane = tl.arange(0, LANES)
    inside = lane < TOP_K
    place = tl.program_id(0).to(tl.int64) * TOP_K + lane
    expert = tl.load(ids + place, mask=inside, other=-1).to(tl.int64)
    real = (expert >= 0) & (expert < num_experts)
    weight = tl.load(weights + place, mask=inside, other=0.0) * factor
    weight = tl.where(real, weight, float("-inf"))
    # As torch sorts: a NaN is larger than all numbers, and of equal ones the earlier comes first.
    undefined = weight != weight
    mine, other = weight[:, None], weight[None, :]
    mine_undefined, other_undefined = undefined[:, None], undefined[None, :]
    larger = (other > mine) | (other_undefined & (mine == mine))
    smaller = (mine > other) | (mine_undefined & (other == other))
    level = (larger == 0) & (smaller == 0)
    ahead = (larger | (level & (lane[None, :] < lane[:, None]))) & inside[None, :]
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    tl.store(protected + expert, 1, mask=inside & real & (rank < protected_k))


# `tokens` changes from call to call and is only compared: a version for each kind of number would be compiled
# for nothing, perhaps while a graph is being captured.
@triton.jit(do_not_specialize=["tokens"])
def route_call(
    ids,
    weights,
    slot_of,
    on_device,
    protected,
    counts,
    slots,
    cpu_ids,
    cpu_deferred_ids,
    cpu_weights,
    hidden,
    cpu_hidden,
    factor,
    tokens,
    num_experts,
    values,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The pointers that are None belong to what was not asked for; `values` of `hidden` are copied."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = (lane < TOP_K) & (program < tokens)
    place = program * TOP_K + lane
    expert = tl.load(ids + place, mask=inside, other=-1).to(tl.int64)
    real = (expert >= 0) & (expert < num_experts)
    entry = tl.where(real, expert, num_experts)
    if slot_of is not None:
        tl.store(slots + place, tl.load(slot_of + entry), mask=inside)
    if counts is not None:
        tl.atomic_add(counts + 1 + entry, tl.full([LANES], 1, tl.int64), mask=inside & real, sem="relaxed")
    if cpu_ids is not None:
        mine = tl.minimum(tl.maximum(expert, -2147483648), 2147483647).to(tl.int32)
        if on_device is not None:
            mine = tl.where(tl.load(on_device + entry) != 0, -1, mine)
        if protected is not None:
            deferred = real & (tl.load(protected + entry) == 0)
            tl.store(cpu_deferred_ids + place, tl.where(deferred, mine, -1), mask=inside)
            mine = tl.where(deferred, -1, mine)
        tl.store(cpu_ids + place, mine, mask=inside)
        weight = tl.load(weights + place, mask=inside, other=0.0)
        tl.store(cpu_weights + place, weight * factor, mask=inside)
    if hidden is not None:
        value = program * PIECE + tl.arange(0, PIECE)
        within = value < values
        tl.store(cpu_hidden + value, tl.load(hidden + value, mask=within, other=0), mask=within)
