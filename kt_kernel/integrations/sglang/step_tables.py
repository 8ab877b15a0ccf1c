"""What SGLang's attention backends look up for each decode step, kept at one address per batch size.

Stock backends allocate these tensors anew for each step: where a layer with a sliding window finds its keys,
and which recurrent states are a request's. A recorded step (recorded_decode.py) reads them where they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch


class StepTables:
    """Those of one batch size, on a CPU."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], torch.Tensor] = {}

    def __bool__(self) -> bool:
        """Whether the model's backends have any."""
        return bool(self._kept)

    def plan(self, backend: Any, batch: Any) -> None:
        """`backend.init_forward_metadata(batch)`, with its results in the memory of the first time."""
        backend.init_forward_metadata(batch)
        for part in _parts(backend):
            self._keep_window(part, batch)
            self._keep_states(part)

    def _keep_window(self, part: Any, batch: Any) -> None:
        """As `IntelAMXAttnBackend._swa_kv_indices`, which would look up in the first layer with a window."""
        locations = getattr(part, "swa_out_cache_loc", None)
        if locations is None:
            return
        part.swa_out_cache_loc = self._keep(part, "locations", locations)
        of_requests = part.req_to_token_pool.req_to_token
        longest = int(batch.seq_lens.max())
        full = of_requests[batch.req_pool_indices, :longest]
        key = (id(part), "keys")
        if key not in self._kept:
            self._kept[key] = of_requests.new_zeros((batch.batch_size, of_requests.shape[1]))
        keys = self._kept[key]
        keys[:, :longest] = part.token_to_kv_pool.translate_loc_from_full_to_swa(full)
        rows = self._keep(part, "rows", torch.arange(batch.batch_size))
        part._swa_req_to_token = (of_requests, keys, rows)

    def _keep_states(self, part: Any) -> None:
        metadata = getattr(part, "forward_metadata", None)
        if not dataclasses.is_dataclass(metadata) or isinstance(metadata, type):
            return
        for field in dataclasses.fields(metadata):
            value = getattr(metadata, field.name)
            if isinstance(value, torch.Tensor):
                setattr(metadata, field.name, self._keep(part, field.name, value))

    def _keep(self, part: Any, name: str, value: torch.Tensor) -> torch.Tensor:
        kept = self._kept.setdefault((id(part), name), value)
        if kept.shape != value.shape:
            raise RuntimeError(f"{name} of a step was {tuple(kept.shape)}, and is now {tuple(value.shape)}")
        return kept.copy_(value)


def _parts(backend: Any) -> Iterator[Any]:
    """A hybrid of attention and recurrent layers has a backend for each."""
    inner = getattr(backend, "attn_backend_list", None)
    if inner is None:
        yield backend
    else:
        for each in inner:
            yield from _parts(each)
