"""Risk: heads turn by the wrong angle, in the wrong order or in other columns; v beside them changes."""

from __future__ import annotations

import pytest
import torch
from native_and_twin import DTYPES, assert_close, native, numbers, twin

EPS = 1e-6
POSITIONS = torch.tensor([0, 49, 7, 7, 3])
# heads of q, heads of k, columns of a head, columns that turn, halves or pairs
SHAPES = [
    (8, 2, 64, 64, True),
    (4, 1, 128, 64, True),
    (4, 4, 16, 16, False),
    (32, 4, 128, 128, True),
    (3, 1, 20, 12, False),
    (3, 1, 20, 12, True),
]


def qkv_slices(shape: tuple, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole, and its q and k."""
    q_heads, k_heads, columns, _, _ = shape
    qkv = numbers(5, (q_heads + 2 * k_heads) * columns, dtype=dtype, seed=4)
    q, k, _ = qkv.split([q_heads * columns, k_heads * columns, k_heads * columns], -1)
    return qkv, q, k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_is_its_twin_and_leaves_its_input(shape, dtype):
    q_heads, k_heads, columns, rotary, halves = shape
    cache = numbers(50, rotary, dtype=dtype, seed=5)
    for cache_dtype, position_dtype in ((dtype, torch.int64), (torch.float32, torch.int32)):
        qkv, q, k = qkv_slices(shape, dtype)
        before = qkv.clone()
        for queries, keys in (
            (q, k),
            (q.unflatten(-1, (q_heads, columns)), k.unflatten(-1, (k_heads, columns))),
        ):
            arguments = (POSITIONS.to(position_dtype), queries, keys, columns, cache.to(cache_dtype), halves)
            turned, expected = (one("rotary_embedding_cpu")(*arguments) for one in (native, twin))
            assert_close(turned[0], expected[0])
            assert_close(turned[1], expected[1])
        assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_normed_and_turned_heads_are_their_twins_and_v_stays(shape, dtype):
    columns, rotary, halves = shape[2:]
    q_weight, k_weight = numbers(columns, dtype=dtype, seed=6), numbers(columns, dtype=torch.float32, seed=7)
    cache = numbers(50, rotary, dtype=dtype, seed=5)
    rope = (halves, POSITIONS, cache, rotary)
    for name, extra in (("fused_qk_norm_cpu", ()), ("fused_qk_norm_rope_cpu", rope)):
        qkv, q, k = qkv_slices(shape, dtype)
        qkv_twin, q_twin, k_twin = qkv_slices(shape, dtype)
        native(name)(q, k, q_weight, k_weight, EPS, *extra)
        twin(name)(q_twin, k_twin, q_weight, k_weight, EPS, *extra)
        assert_close(qkv, qkv_twin, 2)
        assert torch.equal(qkv[:, q.shape[1] + k.shape[1] :], qkv_twin[:, q.shape[1] + k.shape[1] :])


def test_rotation_against_angles_in_float64():
    """A turned pair is the complex product, at positions far from the start, in both orders."""
    columns, tokens = 32, 3
    positions = torch.tensor([1, 1000, 32767])
    frequencies = 10000.0 ** (-torch.arange(0, columns, 2, dtype=torch.float64) / columns)
    angles = torch.arange(32768, dtype=torch.float64)[:, None] * frequencies
    cache = torch.cat([angles.cos(), angles.sin()], -1).float()
    x = numbers(tokens, columns, dtype=torch.float32, seed=1)
    for halves in (True, False):
        pairs = x.view(tokens, 2, -1).transpose(1, 2) if halves else x.view(tokens, -1, 2)
        turned = torch.view_as_complex(pairs.double().contiguous()) * torch.exp(1j * angles[positions])
        parts = torch.view_as_real(turned)
        expected = (parts.transpose(1, 2) if halves else parts).reshape(tokens, columns)
        actual, _ = native("rotary_embedding_cpu")(positions, x, x, columns, cache, halves)
        assert_close(actual, expected.float())


def test_slices_of_mla_heads():
    """DeepSeek: the last 64 columns of each head of q, and one key [tokens, 1, 64] inside a wider row."""
    q, latent = (
        numbers(5, 4, 192, dtype=torch.bfloat16, seed=1),
        numbers(5, 1, 576, dtype=torch.bfloat16, seed=2),
    )
    cache = numbers(50, 64, dtype=torch.float32, seed=3)
    arguments = (POSITIONS, q[..., 128:], latent[..., 512:], 64, cache, False)
    turned, expected = (one("rotary_embedding_cpu")(*arguments) for one in (native, twin))
    assert_close(turned[0], expected[0])
    assert_close(turned[1], expected[1])


def test_no_tokens():
    empty = torch.empty(0, 64, dtype=torch.bfloat16)
    cache = numbers(50, 64, dtype=torch.bfloat16, seed=1)
    q, k = native("rotary_embedding_cpu")(torch.empty(0, dtype=torch.int64), empty, empty, 64, cache, True)
    assert q.shape == k.shape == (0, 64)


def test_bad_arguments_are_named():
    q, cache = torch.zeros(2, 64), torch.zeros(50, 64)
    with pytest.raises(Exception, match="stands at position 50; expected 0 to 49"):
        native("rotary_embedding_cpu")(torch.tensor([1, 50]), q, q, 64, cache, True)
    with pytest.raises(Exception, match=r"positions are int64 \[3\]; expected int64 or int32 \[2\]"):
        native("rotary_embedding_cpu")(torch.tensor([1, 2, 3]), q, q, 64, cache, True)
    with pytest.raises(Exception, match="turns 64 columns; expected at most a head's 32"):
        native("rotary_embedding_cpu")(torch.tensor([1, 2]), q, q, 32, cache, True)
