"""Which methods the interface knows, which of them this build has kernels for, and what they ask of a layer.

A method is a way to store expert weights. Which of them run depends on the kernels compiled into the
extension (`kt_kernel_ext.METHODS`), never on the records: they are the names the interface knows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from kt_kernel import kt_kernel_ext
from kt_kernel.checkpoint.sources import detect_method
from kt_kernel.errors import ConfigurationError, MethodError
from kt_kernel.formats.record import MethodRecord
from kt_kernel.formats.records import RECORDS
from kt_kernel.layer_config import MAPPED

logger = logging.getLogger(__name__)


AUTO = "AUTO"  # in place of a name: the method that reads the checkpoint


METHODS = RECORDS

_AUTO_ACTIVATIONS = "auto"

_announced: set[tuple[str, str]] = set()


def available_methods() -> tuple[str, ...]:
    """Names of the methods this build has kernels for, in the order of the table."""
    compiled = set(kt_kernel_ext.METHODS)
    return tuple(name for name in METHODS if name in compiled)


def require_method(name: str) -> MethodRecord:
    """The record of an available method; raises MethodError for an unknown or unavailable one."""
    available = ", ".join(available_methods())
    if name not in METHODS:
        raise MethodError(
            f"method {name!r} is unknown (names are case-sensitive); the methods are {', '.join(METHODS)} "
            f"and {AUTO}, and this build has {available}."
        )
    if name not in kt_kernel_ext.METHODS:
        raise MethodError(
            f"method {name!r} is not available in this build, which has {available}; use one of these."
        )
    return METHODS[name]


def resolve_method(name: str, weight_path: str | os.PathLike | None, asked: str = "") -> MethodRecord:
    """The record of an available method; AUTO stands for the one that reads the checkpoint at `weight_path`.

    `asked`: the method that decides which container counts, where there are several.

    Raises MethodError, or CheckpointError if AUTO finds no checkpoint that a method reads.
    """
    if name != AUTO:
        return require_method(name)
    if not weight_path:
        raise MethodError("method AUTO needs weight_path, the checkpoint that shows the method; name either.")
    found = detect_method(weight_path, asked)
    if found not in kt_kernel_ext.METHODS:
        raise MethodError(
            f"'{weight_path}' holds {found}, but this build has {', '.join(available_methods())}; use a "
            "checkpoint in one of these formats."
        )
    return METHODS[found]


def check_sizes(method: MethodRecord, **sizes: int) -> None:
    """Raise ConfigurationError unless all `sizes` are multiples of what the method packs together."""
    for name, size in sizes.items():
        if size % method.columns_multiple:
            raise ConfigurationError(
                f"{name} is {size}, but method {method.name} needs a multiple of {method.columns_multiple}."
            )


def check_activations(method: MethodRecord, activations: str, option: str = "activations") -> None:
    """Raise ConfigurationError unless the method has kernels for these activations, "bf16" or "int8".

    `option`: how whoever chose them spells that.
    """
    rows = kt_kernel_ext.dispatch_table()
    able = dict.fromkeys(row["method"] for row in rows if row["activations"] == activations)
    if activations != _AUTO_ACTIVATIONS and method.name not in able:
        raise ConfigurationError(
            f"{option} is {activations}, but method {method.name} has no kernels for them, only "
            f"{', '.join(able)} have; use {_AUTO_ACTIVATIONS}."
        )


def check_weight_storage(
    method: MethodRecord, storage: str, activations: str, option: str = "weight_storage"
) -> None:
    """Raise ConfigurationError unless the method's weights can be "packed" or "mapped", as asked.

    `option`: how whoever chose it spells that.
    """
    if storage != MAPPED:
        return
    if not method.computes_from_files:
        able = [name for name in available_methods() if METHODS[name].computes_from_files]
        raise ConfigurationError(
            f"{option} asks for weights in their mapped file, but method {method.name} packs them, only "
            f"{', '.join(able) or 'no method of this build'} can do without; leave it out."
        )
    if activations == "int8":
        raise ConfigurationError(
            f"{option} asks for weights in their mapped file, which no kernel multiplies with int8 "
            "activations; leave one of them out."
        )


def announce_kernels(method: str, formats: Iterable[str], activations: str) -> None:
    """Log, once per process, format and kind of activations, which kernels run it here and why."""
    for name in dict.fromkeys(formats):
        label = name if name == method else f"{method} {name}"
        if (label, activations) in _announced:
            continue
        _announced.add((label, activations))
        rows = (
            row for row in kt_kernel_ext.dispatch_table() if (row["method"], row["format"]) == (method, name)
        )
        row = next((row for row in rows if _is_taken(row, activations)), None)
        if row is not None:
            kernel = f"{row['kernel']}, {row['activations']} activations ({row['reason']})"
            logger.info("kernels for %s: %s: %s", label, row["operation"], kernel)


def announce_mapped(method: str, kernels: str) -> None:
    """Log, once per process, which kernels read a method's weights in their mapped file."""
    if (method, kernels) not in _announced:
        _announced.add((method, kernels))
        logger.info("kernels for %s: experts: %s, weights in the mapped file", method, kernels)


def _is_taken(row: dict, activations: str) -> bool:
    """Of a format's rows in the order of the table, the first that this is true of is the one in use."""
    if activations == _AUTO_ACTIVATIONS:
        return row["state"] == "chosen"
    return row["state"] != "unavailable" and row["activations"] == activations
