"""What a conversion writes for a matrix of N rows and K columns.

weight         AMXINT8: int8 [N, K]; AMXINT4: uint8 [N, K/2], code + 8, the even column in the low half
weight_scale   float32 [N, K / group size], or [N, 1] for whole rows: absmax / 127 or absmax / 7
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kt_kernel.errors import ConversionError
from kt_kernel.formats.record import WHOLE_ROW
from kt_kernel.formats.records import RECORDS

GROUP_SIZES = (WHOLE_ROW, 32, 64, 128)

# Names of the command line, and those that mean the same -> method and bits.
_METHODS = {
    "int4": ("AMXINT4", 4),
    "moe_int4": ("AMXINT4", 4),
    "amxint4": ("AMXINT4", 4),
    "int8": ("AMXINT8", 8),
    "moe_int8": ("AMXINT8", 8),
    "amxint8": ("AMXINT8", 8),
}


@dataclass(frozen=True)
class Target:
    """Codes of `bits` bits and a scale per `group_size` columns (WHOLE_ROW: per row).

    None = what is usual for the method, or the largest smaller size that divides the matrices: `fitted`.
    """

    method: str
    bits: int
    group_size: int | None

    @property
    def code_dtype(self) -> str:
        """The safetensors name of the codes' type."""
        return "I8" if self.bits == 8 else "U8"

    def group_columns(self, columns: int) -> int:
        """Columns that share a scale."""
        return columns if self.group_size == WHOLE_ROW else self.group_size

    def code_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return (rows, columns * self.bits // 8)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return (rows, columns // self.group_columns(columns))

    def fitted(self, widths: Mapping[str, int]) -> Target:
        """With a group size for matrices of these widths, by what to call them.

        Raises ConversionError unless rows of so many columns can be stored.
        """
        chosen = (
            self if self.group_size is not None else replace(self, group_size=self._usual(widths.values()))
        )
        for what, columns in widths.items():
            chosen._check_columns(what, columns)
        return chosen

    def _usual(self, widths: Iterable[int]) -> int:
        usual = RECORDS[self.method].usual_group_size
        fitting = (
            size
            for size in GROUP_SIZES
            if size <= usual and not any(width % size for width in widths if size)
        )
        return max(fitting)

    def _check_columns(self, what: str, columns: int) -> None:
        if self.group_size and columns % self.group_size:
            fitting = [size for size in GROUP_SIZES if not size or columns % size == 0]
            raise ConversionError(
                f"--group-size is {self.group_size}, but {what} is {columns}, which it does not divide; use "
                f"one of {', '.join(map(str, fitting))} (0 = one scale per row)."
            )
        if self.bits == 4 and columns % 2:
            raise ConversionError(
                f"{what} is {columns}, an odd number, and two 4-bit codes share a byte; use method int8."
            )


def target(name: str, group_size: int | None = None) -> Target:
    """The target of a method's name, in any case; `group_size` as in `Target`.

    Raises ConversionError for an unknown name or group size.
    """
    known = _METHODS.get(name.lower())
    if known is None:
        raise ConversionError(
            f"the method is {name!r}, expected int4 or int8 (or moe_int4, moe_int8, AMXINT4, AMXINT8, which "
            "mean the same)."
        )
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ConversionError(
            f"--group-size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))} (0 = one "
            "scale per row)."
        )
    return Target(*known, group_size)
