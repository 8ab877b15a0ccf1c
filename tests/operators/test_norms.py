"""Risk: a norm differs from SGLang's torch code, in its weight's offset, its rounding, strides or types."""

from __future__ import annotations

import pytest
import torch
from native_and_twin import DTYPES, assert_close, native, numbers, same, twin

EPS = 1e-6
# Whole vectors, parts of vectors and less than one vector on every instruction set.
COLUMNS = (2048, 4097, 64, 20, 7)


def norm_arguments(name: str, weight: torch.Tensor) -> tuple:
    return {
        "rmsnorm_cpu": (weight, EPS),
        "gemma_rmsnorm_cpu": (weight, EPS),
        "gemma3_rmsnorm_cpu": (weight, EPS),
        "gemma4_rmsnorm_cpu": (weight, EPS, 0.5, True),
        "l2norm_cpu": (EPS,),
        "layernorm_cpu": (weight, weight * 3, EPS),
    }[name]


NAMES = (
    "rmsnorm_cpu",
    "gemma_rmsnorm_cpu",
    "gemma3_rmsnorm_cpu",
    "gemma4_rmsnorm_cpu",
    "l2norm_cpu",
    "layernorm_cpu",
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_norm_is_its_twin(name, dtype):
    for seed, columns in enumerate(COLUMNS):
        for weight_dtype in (dtype, torch.float32):
            x, weight = (
                numbers(3, columns, dtype=dtype, seed=seed),
                numbers(columns, dtype=weight_dtype, seed=9),
            )
            arguments = norm_arguments(name, weight)
            assert_close(native(name)(x, *arguments), twin(name)(x, *arguments))


def test_norm_without_weight_or_bias():
    x, weight = numbers(3, 80, dtype=torch.bfloat16, seed=1), numbers(80, dtype=torch.bfloat16, seed=2)
    for name, arguments in (
        ("gemma4_rmsnorm_cpu", (weight, EPS, 1.0, False)),
        ("layernorm_cpu", (weight, None, EPS)),
    ):
        assert_close(native(name)(x, *arguments), twin(name)(x, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_right_to_half_a_unit(dtype):
    x, weight = numbers(8, 512, dtype=dtype, seed=3), numbers(512, dtype=dtype, seed=4)
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert_close(
        native("rmsnorm_cpu")(x, weight, EPS), exact.to(dtype), 0.1 if dtype == torch.float32 else 1.01
    )
    wrong = native("rmsnorm_cpu")(x, weight, EPS) != exact.to(dtype)
    # Rounding a number that lies between two as nearly as fp32 can tell.
    assert dtype == torch.float32 or wrong.float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fused_add_rmsnorm_cpu", "gemma_fused_add_rmsnorm_cpu"])
def test_added_norm_updates_both_in_place(name, dtype):
    for seed, columns in enumerate(COLUMNS):
        x, residual = numbers(3, columns, dtype=dtype, seed=seed), numbers(3, columns, dtype=dtype, seed=7)
        weight = numbers(columns, dtype=dtype, seed=8)
        x_twin, residual_twin = x.clone(), residual.clone()
        assert native(name)(x, residual, weight, EPS) is None
        twin(name)(x_twin, residual_twin, weight, EPS)
        assert torch.equal(residual, residual_twin)
        assert_close(x, x_twin, 2)


def test_added_norm_sees_the_sum_before_it_is_rounded_and_gemmas_after():
    """8 + 2^-7 rounds to 8 in bf16: only one of the two norms sees the difference."""
    x = torch.full((1, 64), 2.0**-7, dtype=torch.bfloat16)
    x[0, 0] = 100
    for name, total in (("fused_add_rmsnorm_cpu", 8 + 2.0**-7), ("gemma_fused_add_rmsnorm_cpu", 8.0)):
        y, residual = x.clone(), torch.full((1, 64), 8.0, dtype=torch.bfloat16)
        weight = torch.full((64,), 1000.0 if name.startswith("fused") else 999.0, dtype=torch.float32)
        native(name)(y, residual, weight, EPS)
        sums = torch.full((64,), total, dtype=torch.float64)
        sums[0] = 108 if name.startswith("fused") else torch.tensor(108.0).bfloat16().double()
        expected = sums / sums.pow(2).mean().sqrt() * 1000
        assert_close(y[0], expected.bfloat16(), 0.6)
        assert residual[0, 1] == 8


def test_rows_of_slices_and_of_more_dimensions():
    qkv = numbers(5, 96, dtype=torch.bfloat16, seed=1)
    weight = numbers(16, dtype=torch.bfloat16, seed=2)
    for x in (
        qkv[:, 16:32],
        qkv[:, 32:64].unflatten(1, (2, 16)),  # heads of a slice: rows not at equal distances
        qkv.view(5, 1, 6, 16),
        qkv[:, :16].unsqueeze(1),
        qkv.view(5, 6, 16)[1:1],
        qkv[2, :16],
    ):
        before = qkv.clone()
        assert_close(native("rmsnorm_cpu")(x, weight, EPS), twin("rmsnorm_cpu")(x, weight, EPS))
        assert torch.equal(qkv, before)


def test_bad_arguments_are_named():
    x, weight = torch.zeros(2, 32), torch.zeros(31)
    with pytest.raises(Exception, match=r"weight is float32 \[31\]; expected 32 elements"):
        native("rmsnorm_cpu")(x, weight, EPS)
    with pytest.raises(
        Exception, match=r"residual is bfloat16 \[2, 32\]; expected input's float32 \[2, 32\]"
    ):
        native("fused_add_rmsnorm_cpu")(x, x.bfloat16(), torch.zeros(32), EPS)
    with pytest.raises(Exception, match=r"input is int64.*expected float32, bfloat16 or float16"):
        native("rmsnorm_cpu")(x.long(), torch.zeros(32), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_q_and_k_over_all_heads(dtype):
    """MiniMax: in one step, and by sums that ranks add up in between."""
    qkv = numbers(4, 700, dtype=dtype, seed=1)
    q, k, _ = qkv.split([400, 100, 200], -1)
    q_weight, k_weight = numbers(400, dtype=dtype, seed=2), numbers(100, dtype=dtype, seed=3)
    whole = native("fused_qk_rmsnorm_cpu")(q, k, q_weight, k_weight, EPS)
    for actual, expected in zip(
        whole, twin("fused_qk_rmsnorm_cpu")(q, k, q_weight, k_weight, EPS), strict=True
    ):
        assert_close(actual, expected)
    sums = native("fused_qk_rmsnorm_sumsq_cpu")(q, k)
    assert_close(sums, twin("fused_qk_rmsnorm_sumsq_cpu")(q, k))
    arguments = (q, k, q_weight, k_weight, sums, 1, EPS)
    assert same(native("fused_qk_rmsnorm_apply_from_stats_cpu")(*arguments), whole)
    arguments = (q, k, q_weight, k_weight, sums * 3, 2, EPS)
    pairs = (native, twin)
    actual, expected = (one("fused_qk_rmsnorm_apply_from_stats_cpu")(*arguments) for one in pairs)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_q_and_k_by_heads_with_gates_between_them(dtype):
    """Qwen3.5: slices of qkv, whose q has a gate behind each head."""
    qkv = numbers(5, 4 * 2 * 20 + 2 * 20 + 7, dtype=dtype, seed=1)
    q_gate, k = qkv[:, :160], qkv[:, 160:200]
    q_weight, k_weight = numbers(20, dtype=dtype, seed=2), numbers(20, dtype=dtype, seed=3)
    for name, queries, extra in (
        ("fused_qk_gemma_rmsnorm_with_gate_cpu", q_gate, (20, 4)),
        ("fused_qk_gemma_rmsnorm_cpu", q_gate, (20,)),
    ):
        arguments = (queries, k, q_weight, k_weight, EPS, *extra)
        actual, expected = (one(name)(*arguments) for one in (native, twin))
        for mine, wanted in zip(actual, expected, strict=True):
            assert_close(mine, wanted)
            assert mine.is_contiguous()


def test_infinities_and_nan_stay():
    x = numbers(4, 40, dtype=torch.bfloat16, seed=1)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    y = native("rmsnorm_cpu")(x, torch.ones(40), EPS)
    assert y[0].isfinite().all() and y[3].isfinite().all()
    assert y[1].isnan().all() and y[2, 39].isnan() and (y[2, :39] == 0).all()
