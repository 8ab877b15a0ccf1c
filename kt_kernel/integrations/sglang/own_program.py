"""`kt_kernel.Engine`: SGLang's engine inside a program of the user's, set up as `kt run` sets up a server."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sglang

logger = logging.getLogger(__name__)

_SHIMS = "kt_sglang_cpu_shims"  # third_party/: installed exactly where SGLang has to do without a GPU
_OPERATORS = "KT_CPU_OPERATORS"


def Engine(model_path: str | os.PathLike, **arguments: Any) -> sglang.Engine:
    """An `sglang.Engine` for the model at `model_path`, a directory or GGUF file, with experts on the CPU.

    `arguments` are SGLang's own and this package's flags as keywords (`kt_num_gpu_experts=8`; doc/serving.md
    has their defaults). `kt_weight_path` is `model_path` unless given; None turns CPU experts off. The
    processes that the engine starts import the main module again, so a program makes its engine below
    `if __name__ == "__main__":`. Raises what SGLang raises; wrong flags are a KTError.
    """
    path = os.fspath(model_path)
    arguments.setdefault("kt_weight_path", path)
    if importlib.util.find_spec(_SHIMS) is not None:
        if arguments["kt_weight_path"] is not None and arguments.get("kt_cpu_operators", "on") == "on":
            _ask_for_operators()
        _bring_stand_ins()
    from sglang.srt.entrypoints.engine import Engine as SGLangEngine

    return SGLangEngine(model_path=path, **arguments)


def _ask_for_operators() -> None:
    """SGLang looks for operators while it is imported."""
    os.environ.setdefault(_OPERATORS, "on")
    if "sglang.srt" in sys.modules:
        logger.warning(
            "sglang was imported before kt_kernel.Engine was called: torch computes the layers around "
            "the experts; import it later, or set %s=on",
            _OPERATORS,
        )


def _bring_stand_ins() -> None:
    shims = importlib.import_module(_SHIMS)
    if os.environ.get(shims.SWITCH) != "0" and not shims.has_gpu_device_node():
        shims.activate()
