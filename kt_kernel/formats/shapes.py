"""How many elements a tensor of one matrix has: rules from N outputs and K inputs to the shapes allowed."""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]

# (N, K, group size in columns or 0 for one group per row) -> the shapes allowed, the usual one first.
ShapeRule = Callable[[int, int, int], tuple[Shape, ...]]

BLOCK = 128  # rows and columns that share a scale in block-scaled float8


def plain(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k),)


def two_per_byte(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k // 2),)


def sixteen_per_32_columns(n: int, k: int, group: int) -> tuple[Shape, ...]:
    """Bytes of two codes, those that share a scale in a dimension of their own."""
    return ((n, k // 32, 16),)


def eight_per_word(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, -(-k // 8)),)


def eight_per_word_down_k(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((k // 8, n),)


def per_block(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((-(-n // BLOCK), -(-k // BLOCK)),)


def per_row(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, 1), (n,))


def per_32_columns(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k // 32),)


def per_16_columns(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k // 16),)


def per_group(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((n, k // group),) if group else ((n, 1), (n,))


def per_group_down_k(n: int, k: int, group: int) -> tuple[Shape, ...]:
    return ((k // group, n),) if group else ((1, n), (n,))


# Shapes of codes and scales that tell a method from another with the same dtypes.


def any_shapes(weight: Shape, scale: Shape) -> bool:
    return True


def one_scale_per_row(weight: Shape, scale: Shape) -> bool:
    return len(scale) == 1 or scale == (weight[0], 1)


def scales_in_every_row(weight: Shape, scale: Shape) -> bool:
    return len(scale) == 2 and scale[0] == weight[0]
