"""Operators in Python: those that have a slow twin and no native kernel, and those that have nothing.

SGLang looks many operators up while its modules are imported, whether or not the model needs them, so each
must exist by name. One with a twin computes by it, and says so once; one without raises when called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kt_kernel.operators.reference import embedding, gates, heads, norms, router

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PythonOperator:
    """`schema` is what follows the name: "(Tensor x) -> Tensor"."""

    name: str
    schema: str
    function: Callable[..., Any]

    @property
    def full_schema(self) -> str:
        return self.name + self.schema


def _table(modules: Iterable[Any]) -> dict[str, PythonOperator]:
    return {
        name: PythonOperator(name, schema, function)
        for module in modules
        for name, (schema, function) in module.OPERATORS.items()
    }


TWINS = _table([embedding, gates, heads, norms, router])
