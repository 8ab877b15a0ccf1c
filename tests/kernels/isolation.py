"""Runs a function of a test file in a process of its own: it may crash, hang, or need other variables.

    isolated("test_stray_access", "walk_every_buffer", "after", timeout=60)

calls test_stray_access.walk_every_buffer("after") in a new process and fails with its output when it does not
end with status 0 in time. Arguments are strings. The process is forked from one that has imported torch
(warm_interpreter.py).
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

from tools import tool
from warm_interpreter import OUT_OF_TIME, WarmInterpreter

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
    variables = _variables(environment)
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
    variables = _variables(environment)
    if variables.get("KT_TEST_EMULATED_CPU") or "LD_PRELOAD" in variables:
        # A fork inside the emulator, or of a sanitizer's threads, would be another thing than a new process.
        done = python("-c", _CALL, module, function, *arguments, timeout=timeout, **environment)
        status, printed = done.returncode, done.stdout
    else:
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            warm = _warm(tuple(sorted(variables.items())))
            status = warm.call(module, function, list(arguments), Path(output.name), timeout)
            printed = output.read()
        if status == OUT_OF_TIME:
            printed += f"\nstopped after {timeout} s"
    what = f"{module}.{function}{arguments} {environment or ''}"
    assert status == 0, f"{what} ended with status {status}:\n{printed}"
    return printed


# Tests ask for two or three environments in turn.
_MOST_WARM = 4
_WARM: OrderedDict[tuple[tuple[str, str], ...], WarmInterpreter] = OrderedDict()


def _warm(variables: tuple[tuple[str, str], ...]) -> WarmInterpreter:
    """The one for this environment; the one that was not asked for longest goes."""
    warm = _WARM.pop(variables, None)
    if warm is None or not warm.is_alive():
        warm = WarmInterpreter(dict(variables))
    _WARM[variables] = warm
    if len(_WARM) > _MOST_WARM:
        _WARM.popitem(last=False)[1].close()
    return warm


@atexit.register
def _close_all() -> None:
    while _WARM:
        _WARM.popitem()[1].close()


def _variables(environment: dict[str, str]) -> dict[str, str]:
    variables = {**os.environ, **environment}
    variables.pop("PYTEST_CURRENT_TEST", None)
    # What the caller itself imports comes from there, too: pythonpath in pyproject.toml.
    shared = [path for path in sys.path if Path(path).is_relative_to(HERE.parent)]
    paths = [environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH"), *shared]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return variables
