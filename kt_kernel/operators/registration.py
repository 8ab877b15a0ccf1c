"""Operators in Python: those that have a slow twin and no native kernel, and those that have nothing.

SGLang looks many operators up while its modules are imported, whether or not the model needs them, so each
must exist by name. One with a twin computes by it, and says so once; one without raises when called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kt_kernel import kt_kernel_ext
from kt_kernel.operators import absent, processes
from kt_kernel.operators.reference import (
    attention,
    embedding,
    gated_delta,
    gates,
    heads,
    linear,
    mla,
    norms,
    router,
    sampling,
)

logger = logging.getLogger(__name__)

# These would get packed weights, which only native operators read.
_NATIVE_ONLY = (linear, mla)


@dataclass(frozen=True)
class PythonOperator:
    """`schema` is what follows the name: "(Tensor x) -> Tensor"."""

    name: str
    schema: str
    function: Callable[..., Any]


def _table(modules: Iterable[Any]) -> dict[str, PythonOperator]:
    return {
        name: PythonOperator(name, schema, function)
        for module in modules
        for name, (schema, function) in module.OPERATORS.items()
    }


TWINS = _table([attention, embedding, gated_delta, gates, heads, norms, router, sampling, *_NATIVE_ONLY])

# torch keeps what a library defines only as long as the library lives.
_libraries: list[torch.library.Library] = []


def native_names() -> set[str]:
    return {schema.partition("(")[0] for schema in kt_kernel_ext.operator_schemas()}


def python_operators() -> dict[str, PythonOperator]:
    """name -> what is to be registered beside the native operators."""
    twins = {name: _announced(one) for name, one in TWINS.items() if name not in _table(_NATIVE_ONLY)}
    missing = {name: _refusing(name, schema) for name, schema in _absent_schemas().items()}
    every = {**missing, **twins, **_table([processes])}
    return {name: one for name, one in every.items() if name not in native_names()}


def register_twins() -> None:
    """Register these, once, for tensors of any device."""
    if _libraries:
        return
    for name, operator in python_operators().items():
        namespace, _, short = name.partition("::")
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(short + operator.schema)
        library.impl(short, operator.function, "CompositeExplicitAutograd")
        _libraries.append(library)


def _absent_schemas() -> dict[str, str]:
    packed = {name: one.schema for name, one in _table(_NATIVE_ONLY).items()}
    return {**absent.ABSENT, **packed}


def _announced(operator: PythonOperator) -> PythonOperator:
    said: list[bool] = []

    def function(*arguments: Any, **named: Any) -> Any:
        if not said:
            said.append(True)
            logger.warning("kt-kernel: %s has no native kernel and is computed by torch", operator.name)
        return operator.function(*arguments, **named)

    return PythonOperator(operator.name, operator.schema, function)


def _refusing(name: str, schema: str) -> PythonOperator:
    def function(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"{name} is not computed by kt-kernel; --kt-cpu-operators off serves this model by torch"
        )

    return PythonOperator(name, schema, function)
