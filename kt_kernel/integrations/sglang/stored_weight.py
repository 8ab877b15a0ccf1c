"""What SGLang's loaders are given for a quantised matrix: it becomes numbers only if they look at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from kt_kernel.formats.dense_matrix import DenseMatrix


class StoredWeight(torch.Tensor):
    """A tensor [rows, columns] of `dtype` that has no memory: matrices of a checkpoint, one below the other.

    Whoever knows the class takes `matrices`. Any operation on it decodes them, except concatenating them by
    rows, as SGLang does with the matrices of some fused layers.
    """

    matrices: tuple[DenseMatrix, ...]

    @staticmethod
    def __new__(cls, matrices: Sequence[DenseMatrix], dtype: torch.dtype) -> StoredWeight:
        shape = (sum(matrix.rows for matrix in matrices), matrices[0].columns)
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")
        weight.matrices = tuple(matrices)
        return weight

    def numbers(self) -> torch.Tensor:
        """Decoded, in memory of its own."""
        decoded = [matrix.numbers(self.dtype) for matrix in self.matrices]
        for matrix in self.matrices:
            matrix.release()
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)

    def __repr__(self) -> str:
        return f"StoredWeight({', '.join(f'{matrix.name}: {matrix.format}' for matrix in self.matrices)})"

    # Names, shapes and so on are answered by torch itself.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        options = options or {}
        if function is torch.ops.aten.cat.default and _is_by_rows(*arguments, **options):
            weights = arguments[0]
            return cls([matrix for weight in weights for matrix in weight.matrices], weights[0].dtype)
        return function(*tree_map(_plain, arguments), **tree_map(_plain, options))


def _is_by_rows(tensors: Sequence[Any], axis: int = 0) -> bool:
    return (
        axis in (0, -2)
        and all(isinstance(tensor, StoredWeight) for tensor in tensors)
        and len({(tensor.shape[1], tensor.dtype) for tensor in tensors}) == 1
    )


def _plain(value: Any) -> Any:
    return value.numbers() if isinstance(value, StoredWeight) else value
