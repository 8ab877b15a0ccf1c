"""The operators of a model's layers on a CPU, registered with torch under the names SGLang calls.

`install` registers the native ones; see doc/operators.md.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401 - the extension registers with the torch of this process

from kt_kernel import kt_kernel_ext


def install(engine: Any) -> None:
    """Register all native operators in this process; they compute on `engine`'s threads.

    A second call changes the engine. Raises RuntimeError where torch lacks what is needed.
    """
    kt_kernel_ext.install_operators(engine)


def native_schemas() -> list[str]:
    """ "namespace::name(arguments) -> results" of every native operator."""
    return kt_kernel_ext.operator_schemas()
