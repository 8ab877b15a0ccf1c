"""The table of weight methods: their names, and what each expects under `weight_path`.

A method is a way to store expert weights. Which of them run depends on the kernels compiled into the
extension (`kt_kernel_ext.METHODS`), never on this table: it is the list of names the interface knows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kt_kernel import kt_kernel_ext
from kt_kernel.errors import MethodError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """One row: `weights` says in plain words what a checkpoint for this method holds."""

    name: str
    weights: str


_TABLE = (
    Method("BF16", "safetensors with bfloat16 experts, as published"),
    Method("FP8", "safetensors with float8_e4m3 experts and one scale per 128x128 block"),
    Method("FP8_PERCHANNEL", "safetensors with float8_e4m3 experts and one scale per output row"),
    Method("RAWINT4", "safetensors with symmetric 4-bit experts in groups of 32 (compressed-tensors)"),
    Method("MXFP4", "safetensors with E2M1 experts and one power-of-two scale per 32 inputs"),
    Method("MXFP8", "safetensors with float8_e4m3 experts and one power-of-two scale per 32 inputs"),
    Method("NVFP4", "safetensors with E2M1 experts, one float8 scale per 16 inputs and a global scale"),
    Method("GPTQ_INT4", "safetensors with symmetric GPTQ 4-bit experts, without activation reordering"),
    Method("AMXINT4", "a directory made by scripts/convert_cpu_weights.py --quant-method int4"),
    Method("AMXINT8", "a directory made by scripts/convert_cpu_weights.py --quant-method int8"),
    Method("MOE_INT4", "a directory made by scripts/convert_cpu_weights.py --quant-method moe_int4"),
    Method("MOE_INT8", "a directory made by scripts/convert_cpu_weights.py --quant-method moe_int8"),
    Method("LLAMAFILE", "GGUF files with any quantisation of ffn_{gate,up,down}_exps"),
)

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}

_announced: set[str] = set()


def available_methods() -> tuple[str, ...]:
    """Names of the methods this build has kernels for, in the order of the table."""
    compiled = set(kt_kernel_ext.METHODS)
    return tuple(name for name in METHODS if name in compiled)


def require_method(name: str) -> Method:
    """The row of an available method; raises MethodError for an unknown or unavailable one."""
    available = ", ".join(available_methods())
    if name not in METHODS:
        raise MethodError(
            f"method {name!r} is unknown (names are case-sensitive); the methods are {', '.join(METHODS)}, "
            f"and this build has {available}."
        )
    if name not in kt_kernel_ext.METHODS:
        raise MethodError(
            f"method {name!r} is not available in this build, which has {available}; use one of these."
        )
    return METHODS[name]


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
