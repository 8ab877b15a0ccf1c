"""Runs a function of a test file in a process of its own: it may crash, hang, or need other variables.

    isolated("test_stray_access", "walk_every_buffer", "after", timeout=60)

calls test_stray_access.walk_every_buffer("after") in a new interpreter and fails with its output when it does
not end with status 0 in time. Arguments are strings.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools import tool

HERE = Path(__file__).parent

_CALL = "import sys, importlib; getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*sys.argv[3:])"


def interpreter(environment: dict[str, str]) -> list[str]:
    """The command that starts this interpreter, on the emulated CPU that KT_TEST_EMULATED_CPU names, if any.

    qemu-user wants the real ELF file; the virtual environment is found through argv[0]. A process started
    from inside the emulator leaves it, so the emulator is started again for each.
    """
    cpu = environment.get("KT_TEST_EMULATED_CPU")
    if not cpu:
        return [sys.executable]
    return [tool("qemu-x86_64"), "-cpu", cpu, "-0", sys.executable, str(Path(sys.executable).resolve())]


def python(*arguments: str, timeout: float = 300, **environment: str):
    """Runs this interpreter from this folder with variables added to the environment; returns the
    CompletedProcess.

    Output of both streams is in `stdout`. A process that runs out of time is killed and reported as
    returncode 124.
    """
    variables = {**os.environ, **environment}
    if "PYTHONPATH" in environment:  # what the caller itself imports comes from there, too
        variables["PYTHONPATH"] = os.pathsep.join(
            filter(None, [environment["PYTHONPATH"], os.environ.get("PYTHONPATH")])
        )
    command = [*interpreter(variables), "-X", "faulthandler", *arguments]
    try:
        return subprocess.run(
            command,
            cwd=HERE,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as stopped:
        output = (stopped.stdout or b"").decode(errors="replace")
        return subprocess.CompletedProcess(command, 124, output + f"\nstopped after {timeout} s")


def isolated(module: str, function: str, *arguments: str, timeout: float = 240, **environment: str) -> str:
    """Returns what the function printed; fails when its process does not end with status 0."""
    done = python("-c", _CALL, module, function, *arguments, timeout=timeout, **environment)
    what = f"{module}.{function}{arguments} {environment or ''}"
    assert done.returncode == 0, f"{what} ended with status {done.returncode}:\n{done.stdout}"
    return done.stdout
