"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`before` stands once in `file`; the tests must fail where `after` stands in its place.

    `file`: under kt_kernel/, or under csrc/ where sources are compiled.
    `tests`: arguments of pytest.
    `compiled`: the sources under csrc/ that are compiled with the defect, all others are without it. Kernels
    of AVX2 are enough: the tests use that then.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    compiled: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}: {self.before.strip()!r} -> {self.after.strip()!r}"

    @property
    def path(self) -> str:
        return f"csrc/{self.file}" if self.compiled else f"kt_kernel/{self.file}"
