"""One real expert layer per method through `KTMoEWrapper`, compared with the same layer in double precision.

`kt doctor` runs it because a list of CPU flags proves nothing: this loads weights, routes tokens and runs
the very kernels a server would. The weights are -1, 0 or 1 times a number for which every scale is exact, so
that each method computes with the very same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kt_kernel import KTMoEWrapper, kt_kernel_ext
from kt_kernel.formats.records import RECORDS

TOLERANCE_NMSE = {"bf16": 1e-5, "int8": 2e-4}
"""By the activations: the promised squared error over the squared norm of the exact result."""

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 256, 192
TOKEN_COUNTS = (1, 16)  # the few-token and the many-token driver


@dataclass(frozen=True)
class ForwardResult:
    """Error of one forward pass against the exact result."""

    method: str
    activations: str
    tokens: int
    nmse: float

    @property
    def accepted(self) -> bool:
        """Whether the promise is kept; a NaN is not."""
        return self.nmse <= TOLERANCE_NMSE[self.activations]


def check_layers(threads: int) -> list[ForwardResult]:
    """Run a random layer of every method and kind of activations; raises whatever the layer raises."""
    kinds = dict.fromkeys((row["method"], row["activations"]) for row in kt_kernel_ext.dispatch_table())
    return [result for kind in kinds for result in check_layer(*kind, threads)]


def check_layer(method: str, activations: str, threads: int) -> list[ForwardResult]:
    """Run a random layer for each of `TOKEN_COUNTS`; raises whatever the layer raises."""
    generator = torch.Generator().manual_seed(0)
    largest = RECORDS[method].largest_code

    def random(*shape: int) -> torch.Tensor:
        return (largest * torch.randint(-1, 2, shape, generator=generator)).to(torch.bfloat16)

    gate, up = random(EXPERTS, INTERMEDIATE, HIDDEN), random(EXPERTS, INTERMEDIATE, HIDDEN)
    down = random(EXPERTS, HIDDEN, INTERMEDIATE)
    layer = KTMoEWrapper(
        layer_idx=0,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        gpu_experts_mask=None,
        cpuinfer_threads=threads,
        threadpool_count=1,
        weight_path="",
        chunked_prefill_size=max(TOKEN_COUNTS),
        method=method,
        activations=activations,
    )
    layer.load_weights_from_tensors(gate, up, down, torch.arange(EXPERTS))

    results = []
    for tokens in TOKEN_COUNTS:
        hidden = torch.randn(tokens, HIDDEN, generator=generator) / (largest * HIDDEN**0.5)
        hidden = hidden.to(torch.bfloat16)
        probabilities = torch.rand(tokens, EXPERTS, generator=generator)
        weights, ids = torch.topk(probabilities, TOP_K)
        expected = exact_layer(hidden, ids, weights, gate, up, down)
        # float32 in, so that the result is not rounded to bfloat16 once more on the way out
        got = layer.forward(hidden.float(), ids, weights, None).double()
        results.append(
            ForwardResult(
                method,
                activations,
                tokens,
                float((got - expected).square().sum() / expected.square().sum()),
            )
        )
    return results


def exact_layer(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """SwiGLU experts in double precision: hidden [T, H], ids and weights [T, k] -> [T, H]."""
    x, gate, up, down = hidden.double(), gate.double(), up.double(), down.double()
    total = torch.zeros_like(x)
    for choice in range(ids.shape[1]):
        for token, expert in enumerate(ids[:, choice].tolist()):
            inner = torch.nn.functional.silu(gate[expert] @ x[token]) * (up[expert] @ x[token])
            total[token] += weights[token, choice].double() * (down[expert] @ inner)
    return total
