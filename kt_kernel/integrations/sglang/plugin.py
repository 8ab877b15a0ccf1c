"""The entry point of group `sglang.srt.plugins`: SGLang calls `register` in every process it starts."""

from __future__ import annotations

import logging
import multiprocessing
import sys

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the hooks. SGLang swallows what a plug-in raises, so a failure that matters leaves as
    SystemExit.
    """
    try:
        _register()
    except Exception as error:
        sentence = f"the SGLang plug-in of kt-kernel cannot start: {type(error).__name__}: {error}"
        if _kt_is_asked_for():
            raise SystemExit(f"error: {sentence}") from error
        logger.warning("%s (no --kt flag is given, so SGLang goes on without it)", sentence)


def _kt_is_asked_for() -> bool:
    """By this server's command line; the processes that multiprocessing starts have it, too."""
    return any(argument.startswith(("--kt-", "--record-kt-")) for argument in sys.argv)


def _register() -> None:
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.utils import is_cpu

    from kt_kernel.integrations.sglang import (
        cpu_operators,
        engine_arguments,
        hooking,
        hooks,
        interrupt,
        startup,
        temporary_files,
    )

    hooking.register(hooks.EVERYWHERE)
    if multiprocessing.parent_process() is None:
        hooking.register(hooks.HTTP)  # whose modules the processes that SGLang starts do without
    if is_cpu():
        hooking.register(hooks.CPU_ONLY)
        if cpu_operators.is_open():
            hooking.register(hooks.CPU_OPERATORS)
    register_resolution_hook(startup.PIPELINE_STEP)(startup.configure)
    engine_arguments.install()
    temporary_files.use_names()
    if _kt_is_asked_for():
        interrupt.stop_quietly()
