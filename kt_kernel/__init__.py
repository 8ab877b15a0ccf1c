"""kt-kernel: mixture-of-experts layers on the CPU, beside or without an accelerator.

Importing this package loads neither torch nor the native extension: each public name is fetched
when first used, so command-line programs start quickly and a broken CPU setting
(`KT_KERNEL_CPU_VARIANT`) is reported by the call that needs the CPU, not by the import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kt_kernel import kt_kernel_ext as kt_kernel_ext
    from kt_kernel.calls.masks import generate_gpu_experts_masks as generate_gpu_experts_masks
    from kt_kernel.checkpoint.sources import detect_method as detect_method
    from kt_kernel.integrations.sglang.own_program import Engine as Engine
    from kt_kernel.integrations.transformers.patching import patch as patch
    from kt_kernel.moe import KTMoEWrapper as KTMoEWrapper
    from kt_kernel.training.sft_layer import SftLayer as SftLayer

    __cpu_variant__: str
    __version__: str

__all__ = [
    "Engine",
    "KTMoEWrapper",
    "SftLayer",
    "detect_method",
    "generate_gpu_experts_masks",
    "kt_kernel_ext",
    "patch",
    "__cpu_variant__",
    "__version__",
]

_HOMES = {
    "Engine": "kt_kernel.integrations.sglang.own_program",
    "KTMoEWrapper": "kt_kernel.moe",
    "SftLayer": "kt_kernel.training.sft_layer",
    "detect_method": "kt_kernel.checkpoint.sources",
    "generate_gpu_experts_masks": "kt_kernel.calls.masks",
    "patch": "kt_kernel.integrations.transformers.patching",
}


def __getattr__(name: str) -> Any:
    """Fetch a public name on first use.

    Raises ValueError for `__cpu_variant__` when `KT_KERNEL_CPU_VARIANT` holds an unknown value.
    """
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name == "kt_kernel_ext":
        value = importlib.import_module("kt_kernel.kt_kernel_ext")
    elif name == "__cpu_variant__":
        value = importlib.import_module("kt_kernel.kt_kernel_ext").cpu_features()["variant"]
    elif name == "__version__":
        value = importlib.import_module("importlib.metadata").version("kt-kernel")
    else:
        raise AttributeError(f"module 'kt_kernel' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
