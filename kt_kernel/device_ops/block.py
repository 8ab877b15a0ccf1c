"""What the CPU reads of one call of an accelerator, as one run of bytes: one copy brings it to the host.

    [ ids int32 [T, k] | deferred ids int32 [T, k] | weights float32 [T, k] | hidden [T, H] ]

Each part begins at a multiple of 64 bytes. The deferred ids are there but not written when a call defers
nothing. The hidden states are last, so that a copy may leave them out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ALIGNMENT = 64

# Up to here the hidden states are packed too. 1 MiB takes a bus of 50 GB/s 20 us, more than a second copy
# costs to start, and packing more would hold long prompts twice in the device's memory. An estimate: no CUDA
# device has been measured yet. 73 tokens of 7168 bf16 values fit.
_MOST_PACKED_BYTES = 1 << 20


@dataclass(frozen=True)
class BlockLayout:
    """Where the parts are, for a call of `tokens` tokens; more tokens never take fewer bytes."""

    tokens: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def deferred_ids_offset(self) -> int:
        return -(-4 * self.tokens * self.top_k // _ALIGNMENT) * _ALIGNMENT

    @property
    def weights_offset(self) -> int:
        return 2 * self.deferred_ids_offset

    @property
    def hidden_offset(self) -> int:
        return 3 * self.deferred_ids_offset

    @property
    def hidden_bytes(self) -> int:
        return self.tokens * self.hidden_size * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """With the hidden states."""
        return self.hidden_offset + self.hidden_bytes

    @property
    def packs_hidden(self) -> bool:
        """Do the hidden states travel with the rest, or in a copy of their own?"""
        return self.hidden_bytes <= _MOST_PACKED_BYTES

    @property
    def packed_bytes(self) -> int:
        """What the device packs into one block."""
        return self.bytes if self.packs_hidden else self.hidden_offset

    def ids(self, block: torch.Tensor) -> torch.Tensor:
        return self._narrow(block, 0, torch.int32)

    def deferred_ids(self, block: torch.Tensor) -> torch.Tensor:
        return self._narrow(block, self.deferred_ids_offset, torch.int32)

    def weights(self, block: torch.Tensor) -> torch.Tensor:
        return self._narrow(block, self.weights_offset, torch.float32)

    def hidden(self, block: torch.Tensor) -> torch.Tensor:
        part = block[self.hidden_offset : self.bytes]
        return part.view(self.dtype).view(self.tokens, self.hidden_size)

    def _narrow(self, block: torch.Tensor, offset: int, dtype: torch.dtype) -> torch.Tensor:
        part = block[offset : offset + 4 * self.tokens * self.top_k]
        return part.view(dtype).view(self.tokens, self.top_k)


def outputs_of_route(
    ids: torch.Tensor, hidden: torch.Tensor | None, slot_of: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots, block) of a call, not yet written; empty where not asked for."""
    slots = ids.new_empty(0) if slot_of is None else torch.empty_like(ids)
    packed = 0 if hidden is None else BlockLayout(*ids.shape, hidden.shape[1], hidden.dtype).packed_bytes
    return slots, ids.new_empty(packed, dtype=torch.uint8)
