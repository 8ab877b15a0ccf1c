"""The refusal of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from kt_kernel.errors import KTError


class DoesNotFitError(KTError, MemoryError):
    """A model that cannot be loaded here: `missing` bytes at `place`, and what would fit."""

    def __init__(self, place: str, needed: float, available: float, would_fit: Sequence[str]) -> None:
        self.place = place
        self.missing = needed - available
        self.would_fit = tuple(would_fit)
        ways = "; ".join(would_fit) or "a smaller model, or a machine with more memory"
        super().__init__(
            f"It does not fit: {place} needs {gigabytes(needed)}, {gigabytes(available)} are available, "
            f"{gigabytes(self.missing)} too little. What would fit: {ways}. (--force starts it all the same.)"
        )


def gigabytes(size: float) -> str:
    """ "12.3 GB", with more digits for small sizes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.2f} GB"
