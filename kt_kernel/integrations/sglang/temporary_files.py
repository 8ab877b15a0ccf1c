"""The end of a server that lost a process: soon, and with nothing left behind (kt_kernel/server_files.py).

Stock SGLang 0.5.23 first waits 65 seconds for dumps of CUDA's, also on machines without it.
"""

from __future__ import annotations

import atexit
from typing import Any

from kt_kernel import server_files
from kt_kernel.integrations.sglang.cli import COMMAND_LINE_ATTRIBUTE
from kt_kernel.server_files import use_names

__all__ = ["choose_environment", "own_name", "use_names"]


def choose_environment(server_args: Any) -> None:
    """For the launching process and those that it starts, before it chooses names.

    The temporary files of a program that has an `Engine` are its own affair.
    """
    from sglang.srt.environ import envs

    for dump in (envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH, envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH):
        if not dump.is_set():
            dump.set(False)
    if getattr(server_args, COMMAND_LINE_ATTRIBUTE, False):
        server_files.begin()
        atexit.register(server_files.end)


def own_name(path: str, *arguments: Any) -> str:
    """After `load_snapshot.shm_path_for`."""
    return server_files.own_name(path)
