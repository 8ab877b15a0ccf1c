"""Speculative decoding on machines without a GPU: what stands in its way in SGLang 0.5.23 (hooks.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


def share_embedding(original: Callable, worker: Any) -> None:
    """Around `EagleDraftWorker.init_lm_head`, after whose assignments the models wait for a CUDA device."""
    with mock.patch.object(torch.cuda, "synchronize", lambda *_: None):
        original(worker)


def commit_states(
    caches: Any,
    slots: torch.Tensor,
    steps: torch.Tensor,
    track_slots: torch.Tensor | None,
    track_steps: torch.Tensor | None,
    src_indices_raw: torch.Tensor | None = None,
) -> None:
    """Instead of `scatter_mamba_states_after_mtp_verify`: of the states that verification kept after each
    draft, those after the last accepted one become the requests' own. `slots`, `steps`: [requests], a step of
    -1 is none; `track_slots`, `track_steps`: the same for prefixes that are kept.
    """
    rows = torch.arange(len(steps)) if src_indices_raw is None else src_indices_raw
    for places, accepted in ((slots, steps), (track_slots, track_steps)):
        if places is None:
            continue
        is_there = accepted >= 0
        to, of_row, of_step = (index[is_there].long() for index in (places, rows, accepted))
        for pool, kept in _pools(caches):
            pool[:, to] = kept[:, of_row, of_step]


def _pools(caches: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[layers, slots, ..] with what verification kept of it, [layers, rows, steps, ..]."""
    pairs = [(caches.temporal, caches.intermediate_ssm)]
    pairs += zip(caches.conv, caches.intermediate_conv_window, strict=True)
    return [(pool, kept) for pool, kept in pairs if pool.numel()]
