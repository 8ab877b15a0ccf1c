"""Rows of an embedding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids [..] int64 or int32, weight [rows, columns] of any type -> [.., columns]."""
    return F.embedding(ids, weight)


OPERATORS = {"kt_kernel::embedding": ("(Tensor ids, Tensor weight) -> Tensor", embedding)}
