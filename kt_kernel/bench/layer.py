"""A layer with random weights, made quickly: one expert is quantised and packed into every slot.

Each slot is memory of its own, so the weights are as cold as those of different experts.
"""

from __future__ import annotations

import torch

from kt_kernel import KTMoEWrapper
from kt_kernel.bench.random_blocks import random_blocks
from kt_kernel.bench.shapes import Call, Shape
from kt_kernel.cpu_share import CpuShare
from kt_kernel.errors import InputError
from kt_kernel.formats.matrices import LayerExperts
from kt_kernel.formats.quantize.experts import quantize_experts

_GLOBAL_SCALE_BYTES = 4


def random_expert(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 gate, up [I, H] and down [H, I] that keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(1)

    def matrix(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) * k**-0.5).bfloat16()

    gate, up = (matrix(shape.intermediate, shape.hidden) for _ in range(2))
    return gate, up, matrix(shape.hidden, shape.intermediate)


class RandomLayer(KTMoEWrapper):
    """All slots hold the same random expert; `expert_bytes` is its size in a checkpoint, scales included.

    `ggml_type`: of a LLAMAFILE layer, one of `random_blocks.BENCHED`; by default what it is quantised to.
    """

    def __init__(
        self,
        method: str,
        shape: Shape,
        *,
        threads: int,
        max_tokens: int,
        activations: str = "auto",
        ggml_type: str | None = None,
        share: CpuShare | None = None,
    ) -> None:
        super().__init__(
            layer_idx=0,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.intermediate,
            cpuinfer_threads=threads,
            threadpool_count=1,
            weight_path="",
            chunked_prefill_size=max_tokens,
            method=method,
            activations=activations,
            share=share,
        )
        self.shape, self.activations = shape, activations
        if ggml_type is None:
            experts = quantize_experts(method, *([matrix] for matrix in random_expert(shape)))
        else:
            experts = random_blocks(ggml_type, shape)
        self.format = experts.formats[0] if experts.formats else method
        self.expert_bytes = _checkpoint_bytes(experts)
        self._load(experts, [0] * shape.experts, InputError)

    def run(self, call: Call) -> torch.Tensor:
        """The layer's output [T, H] for one call."""
        return self.forward(call.hidden, call.ids, call.weights)


def _checkpoint_bytes(experts: LayerExperts) -> int:
    size = 0
    for matrix in experts.all():
        size += matrix.weight.nbytes
        size += 0 if matrix.scale is None else matrix.scale.nbytes
        size += 0 if matrix.global_scale == 1.0 else _GLOBAL_SCALE_BYTES
    return size
