"""Risk: a command in the documentation, or in a help text, does not exist or lacks an option it shows.

Every command is found by documented_commands.py. Those of `kt` are compared with its commands and options,
those of other programs with what their --help prints. What a reader can run as it stands, without a model, is
run here; `kt doctor`, `kt bench`, `kt run demo`, `kt chat` and `kt top` are run by tests of their own.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from documented_commands import PAGES, ROOT, Command, commands_of, of_block

from kt_kernel.cli.main import app

# They need neither a server nor a model and are done in a second.
RUN = (("kt", "version"), ("kt", "--version"), ("kt", "--help"), ("kt", "completion", "bash"))
DOCUMENTED = [command for page in PAGES for command in commands_of(page)]


def commands_under(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The full name and the object of typer of a command and all below it."""
    yield name, command
    for sub_name, sub_command in getattr(command, "commands", {}).items():
        yield from commands_under(sub_command, f"{name} {sub_name}")


def of_help_texts() -> Iterator[Command]:
    for name, command in commands_under(typer.main.get_command(app), "kt"):
        for line in (command.help or "").split("\n") + (command.epilog or "").split("\n"):
            if re.match(r"\s+kt ", line):
                yield from of_block(f"{name} --help", [line])


def output_of(*words: str) -> str:
    done = subprocess.run(
        words,
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        timeout=480,
    )
    assert done.returncode == 0, f"{words}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def options_of_help(*words: str) -> frozenset[str]:
    """The options that the help text of a Python program names."""
    return frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", output_of(sys.executable, *words, "--help")))


def check_kt(command: Command) -> None:
    """The subcommand exists and has the options; what `kt run` does not know, SGLang does."""
    found, path = typer.main.get_command(app), ["kt"]
    for word in command.words[1:]:
        if not hasattr(found, "commands") or word.startswith("-"):
            break
        if not re.fullmatch(r"[a-z-]+", word):
            return  # kt COMMAND
        assert word in found.commands, f"{command}: {' '.join(path)} has no command {word}"
        found = found.commands[word]
        path.append(word)
    names = {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = set(command.options) - names - {"-h", "--help"}
    if path[1:] == ["run"]:
        unknown -= options_of_help("-m", "sglang.launch_server") if unknown else set()
    elif path[1:2] == ["config"]:
        unknown = set()  # the options of another command are values here
    assert not unknown, f"{command}: {' '.join(path)} has no option {', '.join(sorted(unknown))}"


def check_program(command: Command) -> None:
    """A file of this repository or SGLang's server has the options."""
    words = command.program.split()[1:]
    if words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file(), f"{command}: there is no {words[0]}"
    elif words[:2] != ["-m", "sglang.launch_server"]:
        return
    if command.options:
        unknown = set(command.options) - options_of_help(*words)
        assert not unknown, f"{command}: it has no option {', '.join(sorted(unknown))}"


def check_install_sh(command: Command) -> None:
    usage = (ROOT / "install.sh").read_text().split("TEXT")[1]
    for word in command.words[1:2]:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", usage), (
            f"{command}: {word} is not in its usage"
        )


@pytest.mark.parametrize("command", [*DOCUMENTED, *of_help_texts()], ids=str)
def test_it_exists_with_these_options(command):
    if command.words[0] == "kt":
        check_kt(command)
    elif command.words[0] == "./install.sh":
        check_install_sh(command)
    elif command.words[0] == "python" and len(command.words) > 1:
        check_program(command)


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_it_runs(words):
    assert output_of(str(Path(sys.executable).with_name(words[0])), *words[1:])


def test_enough_commands_are_found():
    """Negative control: the reader of pages finds what is plainly there, with its options."""
    assert len(DOCUMENTED) > 60
    found = {(command.program, *command.options) for command in DOCUMENTED}
    assert ("kt", "--dry-run") in found
    assert ("python bench/moe.py", "--shape", "--tokens", "--method", "--method") in found
    (command,) = of_block("here", ["A=1 .venv/bin/kt bench \\", "  --frobnicate  # why"])
    with pytest.raises(AssertionError, match="kt bench has no option --frobnicate"):
        check_kt(command)
    (command,) = of_block("here", ["kt frobnicate"])
    with pytest.raises(AssertionError, match="kt has no command frobnicate"):
        check_kt(command)
