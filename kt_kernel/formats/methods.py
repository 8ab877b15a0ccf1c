"""Which methods the interface knows, which of them this build has kernels for, and what they ask of a layer.

A method is a way to store expert weights. Which of them run depends on the kernels compiled into the
extension (`kt_kernel_ext.METHODS`), never on the records: they are the names the interface knows.
"""

from __future__ import annotations

import logging
import os

from kt_kernel import kt_kernel_ext
from kt_kernel.checkpoint.detect import detect_method
from kt_kernel.errors import ConfigurationError, MethodError
from kt_kernel.formats.record import MethodRecord
from kt_kernel.formats.records import RECORDS

logger = logging.getLogger(__name__)


AUTO = "AUTO"  # in place of a name: the method that reads the checkpoint


METHODS = RECORDS

_announced: set[str] = set()


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


def resolve_method(name: str, weight_path: str | os.PathLike | None) -> MethodRecord:
    """The record of an available method; AUTO stands for the one that reads the checkpoint at `weight_path`.

    Raises MethodError, or CheckpointError if AUTO finds no checkpoint that a method reads.
    """
    if name != AUTO:
        return require_method(name)
    if not weight_path:
        raise MethodError("method AUTO needs weight_path, the checkpoint that shows the method; name either.")
    found = detect_method(weight_path)
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


def announce_kernels(name: str) -> None:
    """Log, once per process and method, which kernels run it here and why."""
    if name in _announced:
        return
    _announced.add(name)
    chosen = [
        f"{row['operation']}: {row['kernel']} ({row['reason']})"
        for row in kt_kernel_ext.dispatch_table()
        if row["method"] == name and row["state"] == "chosen"
    ]
    logger.info("kernels for %s: %s", name, "; ".join(chosen))
