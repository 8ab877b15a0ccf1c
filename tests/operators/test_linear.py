"""Risk: a packed linear layer loses a row, a column or its bias where panels, pieces or K are not even."""

from __future__ import annotations

import pytest
import torch
from native_and_twin import native, numbers, same

# N, K: one panel, a last panel and row that are parts, many panels of few columns in one piece, long rows.
SHAPES = ((32, 64), (100, 72), (9000, 32), (64, 4096))


def linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, threads: int = 2
) -> torch.Tensor:
    return native("weight_packed_linear", threads)(x, packed, bias, True)


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("weight_type", "dtype"), [(BF16, BF16), (BF16, F32), (F32, F32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_bias_against_float64(shape, weight_type, dtype):
    rows, columns = shape
    weight = numbers(rows, columns, dtype=weight_type, seed=1, scale=columns**-0.5)
    bias = numbers(rows, dtype=torch.float32, seed=2)
    packed = native("convert_weight_packed")(weight)
    for tokens in (1, 3, 70):
        # Kernels of bf16 weights round to bf16 first; those of fp32 weights must not.
        x = numbers(tokens, columns, dtype=weight_type, seed=3).to(dtype)
        for added in (None, bias):
            expected = x.double() @ weight.double().T + (0 if added is None else added.double())
            actual = linear(x, packed, added)
            assert actual.dtype == dtype
            error = (actual.double() - expected).abs().max()
            assert error < (0.02 if dtype is torch.bfloat16 else 1e-4), (tokens, added is None, error)


@pytest.mark.parametrize(("dtype", "columns"), [(BF16, 328), (F32, 328), (F32, 320)])  # 320: not padded
def test_token_result_does_not_depend_on_neighbours_or_threads(dtype, columns):
    weight = numbers(1000, columns, dtype=dtype, seed=1)
    x = numbers(130, columns, dtype=dtype, seed=2)
    packed = native("convert_weight_packed")(weight)
    together = linear(x, packed, None)
    for threads, rows in ((1, slice(0, 130)), (2, slice(0, 1)), (1, slice(129, 130)), (2, slice(40, 73))):
        again = native("convert_weight_packed", threads)(weight)
        assert same(linear(x[rows], again, None, threads), together[rows].contiguous())


@pytest.mark.parametrize(("rows", "columns", "count"), [(96, 72, 20), (2560, 2560, 6)])
def test_matrices_that_share_memory_keep_their_own_numbers(rows, columns, count):
    """Small ones, and more than fill one buffer of 64 MiB."""
    x = numbers(2, columns, dtype=BF16, seed=0)
    packed, alone = [], []
    for seed in range(count):
        packed.append(native("convert_weight_packed")(numbers(rows, columns, dtype=BF16, seed=seed + 1)))
        alone.append(linear(x, packed[-1], None))
    assert all(same(linear(x, each, None), before) for each, before in zip(packed, alone, strict=True))


def test_a_head_gives_the_sums_that_others_round():
    weight = numbers(1000, 328, dtype=torch.bfloat16, seed=1)
    x = numbers(3, 328, dtype=torch.bfloat16, seed=2)
    packed = native("convert_weight_packed")(weight)
    rounded = linear(x, packed, None)
    torch.ops.kt_kernel.give_sums(packed)
    sums = linear(x, packed, None)
    assert sums.dtype == torch.float32 and same(sums.bfloat16(), rounded)
    assert not same(sums, rounded.float())
    with pytest.raises(ValueError, match="convert_weight_packed"):
        torch.ops.kt_kernel.give_sums(weight)
