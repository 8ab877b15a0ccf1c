"""The operators of a model's layers on a CPU, registered with torch under the names SGLang calls.

See doc/operators.md.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401 - the extension registers with the torch of this process

from kt_kernel import kt_kernel_ext


def register() -> None:
    """Register the operators in this process, once; they need an engine before they compute.

    Raises RuntimeError where torch or the CPU lacks what is needed.
    """
    from kt_kernel.operators import fakes, registration

    missing = {"avx2", "fma", "f16c"}.difference(kt_kernel_ext.cpu_features()["active"])
    if missing:
        raise RuntimeError(f"this CPU lacks {', '.join(sorted(missing))}, which all operators need")
    kt_kernel_ext.register_operators()
    registration.register_twins()
    fakes.register_fakes()


def use_engine(engine: Any) -> None:
    """Compute on the threads of `engine`, instead of those of an earlier call."""
    kt_kernel_ext.use_operator_engine(engine)


def install(engine: Any) -> None:
    """Register the native operators alone, and compute on `engine`'s threads."""
    kt_kernel_ext.register_operators()
    use_engine(engine)


def native_schemas() -> list[str]:
    """ "namespace::name(arguments) -> results" of every native operator."""
    return kt_kernel_ext.operator_schemas()
