"""Matrices of a checkpoint as the weight of one linear layer, packed by the extension."""

from __future__ import annotations

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.engine import get_engine
from kt_kernel.formats.dense_matrix import DenseMatrix
from kt_kernel.gguf.experts import METHOD as GGUF
from kt_kernel.integrations.options import ExpertOptions
from kt_kernel.integrations.sglang.kept_layers import Pack, Packed

_AUTO, _BF16 = "auto", "bf16"


def packer(options: ExpertOptions) -> Pack:
    """Packs on the engine that computes the experts, for the activations that they have."""

    def pack(matrices: list[DenseMatrix], like: torch.Tensor) -> Packed:
        linear = kt_kernel_ext.Linear(
            get_engine(options.cpuinfer, options.threadpool_count, options.numa_nodes),
            k=matrices[0].columns,
            parts=[matrix.as_part() for matrix in matrices],
            activations=_activations(matrices, options.activations),
        )
        return Packed(
            torch.ops.kt_kernel.packed_weight(linear.handle, like),
            linear.weight_bytes,
            tuple(matrix.format for matrix in matrices),
        )

    return pack


def _activations(matrices: list[DenseMatrix], asked: str) -> str:
    """As asked for the experts; "auto" where a format of the layer has only other kernels."""
    rows = kt_kernel_ext.dispatch_table()
    able = {(row["method"], row["format"]) for row in rows if row["activations"] == asked}
    if asked == _BF16:  # the blocks of any type of a GGUF file have kernels for them
        able |= {(row["method"], row["format"]) for row in rows if row["method"] == GGUF}
    return asked if all((matrix.method, matrix.format) in able for matrix in matrices) else _AUTO
