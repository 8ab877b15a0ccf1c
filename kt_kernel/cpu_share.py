"""Which part of a layer's experts one process computes on its CPU.

    gate, up   rows [begin, end) of `whole`, the intermediate size
    down       columns [begin, end)

Every process has its part of every expert, so that all of them work on every token, whichever experts it
chose, and each reads its part of the bytes. The processes' sums add up to the layer's.
"""

from __future__ import annotations

from dataclasses import dataclass

from kt_kernel.errors import ConfigurationError


@dataclass(frozen=True)
class CpuShare:
    """[begin, end) of `whole`; raises ConfigurationError unless it lies in there."""

    begin: int
    end: int
    whole: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= self.whole:
            raise ConfigurationError(
                f"a share from {self.begin} to {self.end} was asked for of an intermediate size of "
                f"{self.whole}; expected a range inside it."
            )

    @classmethod
    def everything(cls, whole: int) -> CpuShare:
        return cls(0, whole, whole)

    @classmethod
    def nothing(cls, whole: int) -> CpuShare:
        return cls(whole, whole, whole)

    @property
    def size(self) -> int:
        return self.end - self.begin

    @property
    def is_whole(self) -> bool:
        return self.size == self.whole

    @property
    def adds_biases(self) -> bool:
        """Down's biases are added once, by whoever has the first column."""
        return self.begin == 0 and self.size > 0
