"""The processes that share one model (tensor parallelism), as the engine sees them.

Either each rank has its share of every expert in CPU memory, or rank 0 alone has the experts, and leaves the
others the shards of their devices in memory that all see. The ranks agree on when to switch and when to give
up; who computes what is kt_kernel/hybrid/shares.py.
"""

from __future__ import annotations

import os
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Ranks(Protocol):
    """Calls are collective: all ranks make them in the same order, on the thread that serves."""

    rank: int
    size: int

    def minimum(self, value: int) -> int:
        """The smallest `value` of all ranks."""
        ...

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        ...

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` (anything that can be pickled); what the others give is ignored."""
        ...

    def shared_memory(self, size: int) -> torch.Tensor:
        """uint8 [size], all zero, the same memory in all ranks; it lives as long as the tensor."""
        ...

    def gather(self, value: int) -> list[int]:
        """The `value` of each rank, in their order."""
        ...

    def first(self, value: T | None) -> T | None:
        """That of the first rank that gives one (anything that can be pickled); None if nobody does."""
        ...


class _Alone:
    """A model in one process."""

    rank = 0
    size = 1

    def minimum(self, value: int) -> int:
        return value

    def barrier(self) -> None:
        return None

    def broadcast(self, value: T) -> T:
        return value

    def shared_memory(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def gather(self, value: int) -> list[int]:
        return [value]

    def first(self, value: T | None) -> T | None:
        return value


ALONE: Ranks = _Alone()


class TorchRanks:
    """The ranks of a torch.distributed process group on CPU (gloo); shared memory needs one machine."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank: int = torch.distributed.get_rank(group)
        self.size: int = torch.distributed.get_world_size(group)

    def minimum(self, value: int) -> int:
        tensor = torch.tensor([value], dtype=torch.int64)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN, group=self._group)
        return int(tensor)

    def barrier(self) -> None:
        self.minimum(0)

    def broadcast(self, value: T) -> T:
        holder = [value]
        torch.distributed.broadcast_object_list(holder, group=self._group, group_src=0)
        return holder[0]

    def shared_memory(self, size: int) -> torch.Tensor:
        """Anonymous memory of rank 0, which the others open through /proc.

        Not a file in /dev/shm: containers often have 64 MiB of that, less than a few experts.
        """
        descriptor = -1
        if self.rank == 0:
            descriptor = os.memfd_create("kt_experts")
            os.truncate(descriptor, size)
        path = self.broadcast(f"/proc/{os.getpid()}/fd/{descriptor}")
        memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self.barrier()
        if self.rank == 0:
            os.close(descriptor)
        return memory

    def gather(self, value: int) -> list[int]:
        values = torch.zeros(self.size, dtype=torch.int64)
        values[self.rank] = value
        torch.distributed.all_reduce(values, group=self._group)
        return values.tolist()

    def first(self, value: T | None) -> T | None:
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return next((given for given in values if given is not None), None)
