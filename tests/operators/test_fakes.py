"""Risk: a compiler believes that an operator returns another shape, type or layout than it does."""

from __future__ import annotations

import pytest
import torch
from native_and_twin import native, numbers
from torch._subclasses.fake_tensor import FakeTensorMode

from kt_kernel import operators
from kt_kernel.engine import get_engine
from kt_kernel.operators import fakes, registration

BF16 = torch.bfloat16
EPS = 1e-6


def examples() -> dict[str, tuple]:
    """name -> arguments of a call."""
    x, weight = numbers(5, 64, dtype=BF16, seed=1), numbers(64, dtype=BF16, seed=2)
    qkv = numbers(5, 96, dtype=BF16, seed=3)
    q, k = qkv[:, :64], qkv[:, 64:80]
    head = numbers(16, dtype=BF16, seed=4)
    cache, positions = numbers(9, 16, dtype=BF16, seed=5), torch.arange(5)
    logits, bias = numbers(5, 16, dtype=BF16, seed=6), torch.zeros(16)
    matrix = numbers(48, 64, dtype=BF16, seed=7)
    native("rmsnorm_cpu")  # registers
    packed = torch.ops.sgl_kernel.convert_weight_packed(matrix)
    gate = torch.ops.sgl_kernel.convert_weight_packed(matrix[:1])
    groups = (4, True, 4, 2, 0)
    return {
        "convert_weight_packed": (matrix,),
        "weight_packed_linear": (x, packed, None, True),
        "fused_input_proj_cpu": (x, packed, packed, True),
        "rmsnorm_cpu": (x, weight, EPS),
        "gemma_rmsnorm_cpu": (qkv[:, 16:80], weight, EPS),
        "gemma3_rmsnorm_cpu": (x.view(1, 5, 64), weight, EPS),
        "gemma4_rmsnorm_cpu": (x, weight, EPS, 1.0, True),
        "l2norm_cpu": (x, EPS),
        "layernorm_cpu": (x, weight, None, EPS),
        "fused_add_rmsnorm_cpu": (x, x.clone(), weight, EPS),
        "gemma_fused_add_rmsnorm_cpu": (x, x.clone(), weight, EPS),
        "fused_qk_rmsnorm_cpu": (q, k, weight, head, EPS),
        "fused_qk_rmsnorm_sumsq_cpu": (q, k),
        "fused_qk_rmsnorm_apply_from_stats_cpu": (q, k, weight, head, torch.ones(5, 2), 2, EPS),
        "fused_qk_gemma_rmsnorm_cpu": (q, k, head, head, EPS, 16),
        "fused_qk_gemma_rmsnorm_with_gate_cpu": (q, k, head, head, EPS, 16, 2),
        "rotary_embedding_cpu": (positions, q, k, 16, cache, True),
        "fused_qk_norm_cpu": (q, k, head, head, EPS),
        "fused_qk_norm_rope_cpu": (q, k, head, head, EPS, True, positions, cache, 16),
        "topk_softmax_cpu": (x, logits, 4, True),
        "topk_sigmoid_cpu": (x, logits, 4, True, bias),
        "grouped_topk_cpu": (x, logits, *groups, None, None),
        "biased_grouped_topk_cpu": (x, logits, bias, *groups, 2.5, None),
        "silu_and_mul_cpu": (x,),
        "gelu_and_mul_cpu": (x,),
        "gelu_tanh_and_mul_cpu": (x,),
        "fused_sigmoid_mul_cpu": (x.clone(), x),
        "fused_linear_sigmoid_mul": (x, gate, None, True, x),
        "kt_kernel::embedding": (positions, cache),
        "kt_kernel::sample": (
            *(torch.randn(5, 64), torch.ones(5, 1), torch.full((5,), 9, dtype=torch.int32)),
            *(torch.ones(5), torch.zeros(5), torch.rand(5, dtype=torch.float64)),
        ),
    }


EXAMPLES = examples()


def layout(result: object) -> list[tuple]:
    tensors = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    return [(tuple(one.shape), one.dtype, one.stride()) for one in tensors]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_fake_has_the_layout_of_the_result(name):
    operator = native(name)
    fakes.register_fakes()
    arguments = EXAMPLES[name]
    with FakeTensorMode() as mode:
        without_memory = [
            mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in arguments
        ]
        promised = layout(operator(*without_memory))
    assert promised == layout(operator(*arguments))


def test_every_native_operator_has_a_fake():
    operators.install(get_engine(2))
    assert all(callable(fakes.fake_of(name)) for name in registration.native_names())
    fakes.register_fakes()
    fakes.register_fakes()
    assert fakes.FAKES.keys() <= registration.native_names()
