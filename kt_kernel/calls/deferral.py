"""Expert deferral: a layer's less important experts are computed while the next layer's attention runs.

Of each token's k experts the `protected_k` with the largest weights are computed at once; an expert protected
for any token of the batch is computed at once for all. The rest is deferred: its sum is added to the output
of the next decoder layer, one residual step late. Nothing is lost: a layer defers only if the next decoder
layer is a MoE layer with CPU experts, so neither the last layer nor one before a dense layer does.
"""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kt_kernel.errors import InputError

logger = logging.getLogger(__name__)


def select_deferred_experts(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, protected_k: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split ids [tokens, k] into (immediate, deferred) of the same shape; -1 where the other has the id.

    `topk_weights` [tokens, k] ranks the experts of a token; equal weights: the earlier place wins. Ids of -1
    protect nothing and stay -1 in both. Other impossible ids go to `immediate`, where the forward call
    reports them. Runs on the device of its inputs without waiting for it.
    """
    skipped = torch.full_like(topk_ids, -1)
    if protected_k <= 0:
        return skipped, topk_ids.clone()
    if protected_k >= topk_ids.shape[1]:
        return topk_ids.clone(), skipped
    protected = protected_experts(topk_ids, topk_weights, protected_k, num_experts)
    slots = torch.where((topk_ids >= 0) & (topk_ids < num_experts), topk_ids, num_experts).long()
    immediate = protected[slots]
    return torch.where(immediate, topk_ids, skipped), torch.where(immediate, skipped, topk_ids)


def protected_experts(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, protected_k: int, num_experts: int
) -> torch.Tensor:
    """bool [num_experts + 1]: the experts among the `protected_k` heaviest of any token, and, in the last
    entry, True for the ids that are no expert.
    """
    real = (topk_ids >= 0) & (topk_ids < num_experts)
    rank = topk_weights.masked_fill(~real, float("-inf"))
    places = rank.argsort(dim=1, descending=True, stable=True)[:, :protected_k]
    # One entry more than there are experts takes the ids that are none.
    slots = torch.where(real, topk_ids, num_experts).long()
    protected = torch.zeros(num_experts + 1, dtype=torch.bool, device=topk_ids.device)
    protected.index_fill_(0, slots.gather(1, places).reshape(-1), value=True)
    protected[num_experts] = True
    return protected


def without_experts(ids: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """`ids` [tokens, k] with -1 in place of the experts that `skipped` (bool [E+1], last entry False) marks.

    Impossible ids stay, for the forward call to report.
    """
    # -1 and everything too large index the last entry.
    return torch.where(skipped[ids.long().clamp(-1, skipped.numel() - 1)], -1, ids)


@dataclass
class DeferredOutput:
    """The deferred sum of layer `layer_idx`: `output` [tokens, H] is valid once the queued task is done.

    `keep_alive` holds what the task reads.
    """

    layer_idx: int
    output: torch.Tensor
    keep_alive: Any


class ChainedLayer(Protocol):
    """What a chain asks of its layers."""

    @property
    def has_cpu_experts(self) -> bool: ...


class DeferralChain:
    """The MoE layers of one model, and the deferred sum on its way from one to the next."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._layers: weakref.WeakValueDictionary[int, ChainedLayer] = weakref.WeakValueDictionary()
        self.pending: DeferredOutput | None = None

    def join(self, layer: ChainedLayer, layer_idx: int) -> None:
        """Count `layer` among the model's MoE layers for as long as it lives.

        Of two with the same number, the one that joined last is the model's.
        """
        self._layers[layer_idx] = layer

    def leave(self, layer: ChainedLayer, layer_idx: int) -> None:
        """`layer` now belongs to another chain."""
        if self._layers.get(layer_idx) is layer:
            del self._layers[layer_idx]

    def may_defer(self, layer_idx: int) -> bool:
        """Is the next decoder layer one that can add what this layer defers?"""
        following = self._layers.get(layer_idx + 1)
        return following is not None and following.has_cpu_experts

    def take(self, layer_idx: int, hidden: torch.Tensor) -> DeferredOutput | None:
        """What an earlier layer deferred for the batch of `hidden` [tokens, H], to be added to the output.

        A sum that comes from this or a later layer belongs to a pass that was given up; it is dropped.
        Raises InputError if the batch is not the one that deferred.
        """
        if self.pending is None:
            return None
        if self.pending.layer_idx >= layer_idx:
            logger.warning(
                "layer %d starts a new pass; what layer %d deferred in the pass before was never fetched "
                "and is dropped",
                layer_idx,
                self.pending.layer_idx,
            )
            self.drop()
            return None
        deferred = self.pending
        if deferred.output.shape != hidden.shape or deferred.output.dtype != hidden.dtype:
            self.drop()
            raise InputError(
                f"layer {layer_idx}: the call has {hidden.shape[0]} tokens of {hidden.dtype}, but layer "
                f"{deferred.layer_idx} deferred experts for {deferred.output.shape[0]} tokens of "
                f"{deferred.output.dtype}; run one batch through all layers before the next."
            )
        self.pending = None
        return deferred

    def drop(self) -> None:
        """Forget the pending sum once no queued task can still touch its memory."""
        if self.pending is not None:
            wait_ignoring_errors(self._engine)
            self.pending = None

    def __del__(self) -> None:
        self.drop()


_chains: weakref.WeakValueDictionary[tuple, DeferralChain] = weakref.WeakValueDictionary()


def chain_of_model(engine: Any, hidden_size: int, weight_path: str | None) -> DeferralChain:
    """The chain shared by the layers of one model: those of the same weights, width and engine.

    A guess, for callers who know single layers only; `KTMoEWrapper.join_chain` tells it for certain.
    """
    key = (id(engine), hidden_size, None if weight_path is None else os.path.realpath(weight_path))
    chain = _chains.get(key)
    if chain is None:
        chain = DeferralChain(engine)
        _chains[key] = chain
    return chain


def wait_ignoring_errors(engine: Any) -> None:
    """Wait for all queued tasks; a stored error belongs to a call that was given up, so it is only logged.

    Not in a forked child, where the queue has no thread.
    """
    while engine.in_own_process:
        try:
            engine.sync(0)
            return
        except (ValueError, RuntimeError) as error:
            logger.warning("a queued call that was given up had failed: %s", error)
