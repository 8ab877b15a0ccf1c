"""`kt run`: one SGLang server command from a model, a plan for this machine, and the user's options.

Our choices come first on the command line and the user's options after them, so that the user's win
wherever the server sees an option twice. What the server can decide itself (attention backend) and what it
checks itself (the port, the --kt flags against each other) is left to it. The server is a child that this
process supervises (supervise.py).
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass

import typer

from kt_kernel.cli import planned, settings
from kt_kernel.cli.machine import Machine, this_machine
from kt_kernel.cli.model import Found, Model, find_model, planned_model
from kt_kernel.cli.server_key import without_key
from kt_kernel.cli.start import run_with_banner
from kt_kernel.planning.errors import DoesNotFitError
from kt_kernel.planning.plan import Fit
from kt_kernel.planning.render import plan_json, plan_text
from kt_kernel.planning.user_options import given
from kt_kernel.user_cache import cache_root

METHOD = "AUTO"  # the server finds out, before it loads anything, which method reads the checkpoint


@dataclass(frozen=True)
class DryRun:
    """What `--dry-run` prints: `plan` on standard error, `command` or `json` on standard output."""

    plan: str
    command: str
    json: str


def dry_run(name: str, options: list[str], fit: Fit = Fit.REFUSE) -> DryRun:
    """The plan and the command of `serve`; nothing is built or started, and no cache begun.

    Raises:
        KTError: there is no such model, or it does not fit.
    """
    found = planned_model(name)
    options, key = without_key(_with_settings(options))
    made = _planned(found, options, fit)
    command = server_command(found.model, this_machine(), options, _flags(made))
    if made.plan is None:
        content: dict = {"model": found.model.served_name, "no_plan": made.reason, "command": command}
    else:
        content = plan_json(made.plan, command)
    if cache_root().is_dir():
        planned.keep(found.model, options, made)
    notice = f"kt: not here yet: kt model download {found.missing}" if found.missing else ""
    if key:
        notice = "\n".join(filter(None, [notice, "kt: the key is not in the command: give it in KT_API_KEY"]))
    text = "\n".join(filter(None, [_text(made), notice]))
    return DryRun(text, shlex.join(command), json.dumps(content, indent=1))


def serve(name: str, options: list[str], fit: Fit = Fit.REFUSE) -> int:
    """Run the server until it ends or this process is told to stop; returns the exit status.

    Raises:
        KTError: the model or its weights cannot be used, or it does not fit.
    """
    found = find_model(name)
    options, key = without_key(_with_settings(options))
    made = _planned(found, options, fit)
    command = server_command(found.model, this_machine(), options, _flags(made))
    typer.echo(_text(made), err=True)
    planned.keep(found.model, options, made)
    return run_with_banner(found.model.served_name, command, key)


def _with_settings(options: list[str]) -> list[str]:
    """The user's options behind those of `kt config`, which they override."""
    values = settings.load()
    words = shlex.split(values.get("run.options", ""))
    for key, flag in (("host", "--host"), ("port", "--port"), ("threads", "--kt-cpuinfer")):
        if key in values and not given(words + options, flag):
            words += [flag, str(values[key])]
    return words + options


def _planned(found: Found, options: list[str], fit: Fit) -> planned.Planned:
    try:
        return planned.plan_for(found.model, options, found.entry, fit)
    except DoesNotFitError as error:
        if fit is Fit.REFUSE:
            raise
        return planned.Planned(None, str(error))


def _text(made: planned.Planned) -> str:
    return f"kt: no plan: {made.reason}" if made.plan is None else plan_text(made.plan)


def _flags(made: planned.Planned) -> dict[str, list[str]]:
    return {} if made.plan is None else made.plan.flags


def server_command(
    model: Model, machine: Machine, options: list[str], chosen: dict[str, list[str]] | None = None
) -> list[str]:
    """The full command: interpreter, SGLang's server module, our choices, the user's options.

    `chosen`: the plan's choices, which replace the plain ones here.
    """
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
    if not (given(options, "--kt-threadpool-count") or given(options, "--kt-numa-nodes")):
        nodes = machine.numa_nodes
        choices["--kt-threadpool-count"] = [str(len(nodes))]
        if nodes != list(range(len(nodes))):  # the server's own choice would be the nodes 0, 1, ...
            choices["--kt-numa-nodes"] = [str(node) for node in nodes]
    command = [sys.executable, "-m", "sglang.launch_server"]
    for flag, values in (choices | (chosen or {})).items():
        if not given(options, flag):
            command += [flag, *values]
    return command + options
