"""Help texts: complete, at most 80 columns, with examples, and without loading what a command needs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from kt_kernel.cli.main import app

WITHOUT_EXAMPLES = {("version",)}


def every_command() -> list[tuple[str, ...]]:
    """("run",), ("bench", "serve"), ...: every path of names that ends in a command that runs."""
    paths = []

    def walk(command, path: tuple[str, ...]) -> None:
        for name, found in command.commands.items():
            walk(found, (*path, name)) if hasattr(found, "commands") else paths.append((*path, name))

    walk(typer.main.get_command(app), ())
    return paths


def kt(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_list_of_commands_is_not_cut(flag):
    text = kt(flag)
    assert "..." not in text.partition("Commands:")[2]
    assert all(f"\n  {path[0]} " in text for path in every_command())


@pytest.mark.parametrize("path", [(), *every_command()], ids=" ".join)
def test_help_fits_80_columns_and_ends_in_examples(path):
    text = kt(*path, "-h")
    assert max(map(len, text.splitlines())) <= 80
    if path and path not in WITHOUT_EXAMPLES:
        examples = text.partition("Examples:\n")[2]
        assert examples.strip().startswith(f"kt {' '.join(path)}"), text


def test_version_is_one_line():
    assert kt("--version").split()[0] == "kt-kernel"
    assert len(kt("--version").splitlines()) == 1


def test_help_loads_nothing_heavy():
    heavy = "{'torch', 'sglang', 'openai', 'huggingface_hub', 'prompt_toolkit', 'httpx', 'yaml', 'numpy'}"
    code = f"import sys, kt_kernel.cli.main; print(sorted({heavy} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"
