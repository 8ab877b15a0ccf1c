"""What SGLang asks of its library about the processes of one host: threads, and sums over ranks.

Threads are those of our engine. SGLang sums over its own process groups (gloo) unless LOCAL_SIZE says that
all ranks share this host, which it sets right before it calls `initialize`.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def init_cpu_threads_env(cpu_ids: str) -> str:
    """Nothing: torch's threads stay where they are."""
    return ""


def initialize(size: int, rank: int) -> None:
    """Makes SGLang use its own process groups, which know who belongs to them; the sums below do not."""
    os.environ["LOCAL_SIZE"] = "0"


def shm_allreduce(data: Tensor, op: int) -> None:
    """Over all ranks there are, in place."""
    if op != int(dist.ReduceOp.SUM):
        raise ValueError(f"shm_allreduce got the operation {op}; expected {int(dist.ReduceOp.SUM)}, the sum")
    dist.all_reduce(data)


def shm_allgather(data: Tensor, dim: int) -> Tensor:
    """The tensors of all ranks there are, one after the other along `dim`."""
    parts = [torch.empty_like(data) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, data.contiguous())
    return torch.cat(parts, dim)


OPERATORS = {
    "sgl_kernel::init_cpu_threads_env": ("(str cpu_ids) -> str", init_cpu_threads_env),
    "sgl_kernel::initialize": ("(int size, int rank) -> ()", initialize),
    "sgl_kernel::shm_allreduce": ("(Tensor(a!) data, int op) -> ()", shm_allreduce),
    "sgl_kernel::shm_allgather": ("(Tensor data, int dim) -> Tensor", shm_allgather),
}
