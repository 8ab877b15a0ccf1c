"""How published checkpoints store one expert matrix: the `storage` of every method's record, in one list.

Which numbers the codes mean is the kernels' business (`csrc/formats/`).
"""

from __future__ import annotations

from dataclasses import dataclass

from kt_kernel.formats.record import Storage
from kt_kernel.formats.records import RECORDS
from kt_kernel.formats.shapes import any_shapes


@dataclass(frozen=True, kw_only=True)
class Format(Storage):
    """One way to store a matrix, and the method it belongs to."""

    method: str


def _in_order_of_search() -> tuple[Format, ...]:
    """The first row that fits counts: those that take any shape come after those told by it."""
    rows = [
        Format(method=record.name, **vars(storage))
        for record in RECORDS.values()
        if not record.stored_as
        for storage in record.storage
    ]
    return tuple(sorted(rows, key=lambda row: row.told_by is any_shapes))


FORMATS: tuple[Format, ...] = _in_order_of_search()
