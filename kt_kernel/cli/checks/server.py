"""SGLang with the plug-in: do the hooks take effect, in a process like a server's?"""

from __future__ import annotations

import os
import subprocess
import sys

from kt_kernel.cli import environment
from kt_kernel.cli.checks.finding import Finding, Status
from kt_kernel.cli.machine import server_environment

SERVER_SECONDS = 180.0  # importing SGLang takes 10-30 s on two cores; a hang must still end

_MARK = "kt doctor: "

# What a server does first. Its last line of output is the answer.
_PROBE = f"""
import argparse
from sglang.srt.plugins import load_plugins
load_plugins()
from kt_kernel.integrations.sglang import hooking
from sglang.srt.server_args import ServerArgs
try:
    hooking.verify()
except hooking.HookError as error:
    raise SystemExit("{_MARK}" + str(error))
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
flags = [flag for flag in parser._option_string_actions if flag.startswith("--kt-")]
print("{_MARK}%d hooks, %d --kt flags" % (len(hooking.registered()), len(flags)))
"""


def hooks() -> Finding:
    """Each function of SGLang that the plug-in replaces or wraps leads to the plug-in's code."""
    chosen = os.environ.get("SGLANG_PLUGINS", "")
    if chosen and "kt" not in [name.strip() for name in chosen.split(",")]:
        return Finding(
            Status.FAIL,
            f"SGLANG_PLUGINS={chosen} leaves out this package's plug-in, kt",
            "unset it, or add kt",
        )
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(
            command,
            env=server_environment(),
            capture_output=True,
            text=True,
            timeout=SERVER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            Status.FAIL,
            f"SGLang was not imported in {SERVER_SECONDS:.0f} s",
            "try python -m sglang.launch_server --help",
        )
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"]
    answer = next((line.removeprefix(_MARK) for line in said if line.startswith(_MARK)), None)
    if done.returncode == 0 and answer is not None:
        return Finding(Status.OK, answer)
    if answer is not None:
        return Finding(Status.FAIL, answer, environment.advice_for_sglang())
    return Finding(
        Status.FAIL,
        f"SGLang cannot be imported (exit status {done.returncode}): {said[-1]}",
        environment.advice_for_sglang(),
        detail=done.stderr[-2000:],
    )
