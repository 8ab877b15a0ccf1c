"""`kt run`: one SGLang server command from a model, this machine and the user's options.

Our choices come first on the command line and the user's options after them, so that the user's win
wherever the server sees an option twice.  What the server can decide itself (KV cache, attention backend)
and what it checks itself (the port, the --kt flags against each other) is left to it.
"""

from __future__ import annotations

import logging
import shlex
import sys

from kt_kernel.cli.machine import Machine, server_environment, this_machine
from kt_kernel.cli.model import DEMO, Model, demo_model, local_model, planned_demo_model
from kt_kernel.cli.supervise import run_until_stopped

log = logging.getLogger(__name__)

METHOD = "AUTO"  # the server finds out, before it loads anything, which method reads the checkpoint
_ALIASES = {"--model-path": ("--model",)}


def dry_run_text(name: str, options: list[str]) -> str:
    """The command `serve` would run, quoted for a shell; nothing is built or started."""
    model = planned_demo_model() if name == DEMO else local_model(name)
    return shlex.join(server_command(model, this_machine(), options))


def serve(name: str, options: list[str]) -> int:
    """Run the server until it ends or this process is told to stop; returns the exit status.

    Raises:
        KTError: the model or its weights cannot be used.
    """
    model = demo_model() if name == DEMO else local_model(name)
    command = server_command(model, this_machine(), options)
    log.info(
        "starting %s at http://%s:%s/v1 (ready when the server says so); Ctrl-C stops it",
        model.served_name,
        last_value(command, "--host"),
        last_value(command, "--port"),
    )
    return run_until_stopped(command, server_environment())


def server_command(model: Model, machine: Machine, options: list[str]) -> list[str]:
    """The full command: interpreter, SGLang's server module, our choices, the user's options."""
    choices = {
        "--model-path": [str(model.path)],
        "--served-model-name": [model.served_name],
        "--host": ["127.0.0.1"],
        "--port": ["30000"],
        "--kt-weight-path": [str(model.path)],
        "--kt-method": [METHOD],
        "--kt-cpuinfer": [str(machine.threads)],
        "--kt-num-gpu-experts": ["0"],
    }
    if model.dtype is not None:
        choices["--dtype"] = [model.dtype]
    if not (_given(options, "--kt-threadpool-count") or _given(options, "--kt-numa-nodes")):
        nodes = machine.numa_nodes
        choices["--kt-threadpool-count"] = [str(len(nodes))]
        if nodes != list(range(len(nodes))):  # the server's own choice would be the nodes 0, 1, ...
            choices["--kt-numa-nodes"] = [str(node) for node in nodes]
    command = [sys.executable, "-m", "sglang.launch_server"]
    for flag, values in choices.items():
        if not _given(options, flag):
            command += [flag, *values]
    return command + options


def last_value(options: list[str], flag: str) -> str | None:
    """The value that argparse would take for `flag`: the last one given."""
    value = None
    for position, option in enumerate(options):
        if _matches(option, flag):
            _, equals, joined = option.partition("=")
            value = joined if equals else next(iter(options[position + 1 :]), None)
    return value


def _given(options: list[str], flag: str) -> bool:
    return any(_matches(option, flag) for option in options)


def _matches(option: str, flag: str) -> bool:
    names = (flag, *_ALIASES.get(flag, ()))
    return any(option == name or option.startswith(name + "=") for name in names)
