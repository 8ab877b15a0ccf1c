"""`kt config`: values are checked when they are kept and when they are read, and an option wins over them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kt_kernel.cli import settings
from kt_kernel.cli.main import app
from kt_kernel.errors import KTError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "kt-kernel" / "config.yaml"


def kt(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def written(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_what_was_set_is_got_and_listed_and_can_be_forgotten(file):
    assert kt("config", "path").stdout.strip() == str(file)
    assert kt("config", "get", "port").exit_code == 1
    assert kt("config", "set", "port", "31000").exit_code == 0
    assert kt("config", "set", "chat.system", "be brief").exit_code == 0
    assert kt("config", "get", "port").stdout == "31000\n"
    assert settings.load() == {"port": 31000, "chat.system": "be brief"}
    assert "31000" in kt("config", "list").stdout
    assert kt("config", "unset", "port").exit_code == 0
    assert settings.load() == {"chat.system": "be brief"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", "70000"),
        ("port", "1.5"),
        ("threads", "0"),
        ("chat.temperature", "hot"),
        ("chat.temperature", "3"),
        ("host", " "),
        ("run.options", "context-length 3"),
        ("run.options", "--a 'open"),
        ("model-folders", "/no/such/folder"),
        ("colour", "red"),
    ],
)
def test_an_impossible_value_is_one_sentence_and_is_not_kept(file, key, value):
    result = kt("config", "set", key, value)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1 and key in result.stderr
    assert not file.exists()


@pytest.mark.parametrize("text", ["port: [", "- port", "port: true", "prot: 1", "\x00"])
def test_a_file_edited_wrongly_is_one_sentence_with_its_name(file, text):
    written(file, text)
    result = kt("config", "list")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1 and str(file) in result.stderr
    assert kt("version").exit_code == 0 and kt("config", "path").exit_code == 0


def test_folders_are_a_list_in_the_file_and_a_path_on_the_command_line(file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    assert kt("config", "set", "model-folders", f"{one}:{two}").exit_code == 0
    assert settings.configured("model-folders") == [str(one), str(two)]
    assert kt("config", "get", "model-folders").stdout == f"{one}:{two}\n"


def test_a_folder_that_has_vanished_keeps_nothing_from_working(file, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    assert kt("config", "set", "model-folders", str(folder)).exit_code == 0
    folder.rmdir()
    assert kt("model", "list").exit_code == 0
    assert kt("config", "set", "port", "31000").exit_code == 0
    assert kt("config", "unset", "model-folders").exit_code == 0
    assert settings.load() == {"port": 31000}


def test_an_impossible_value_can_be_unset_and_replaced(file):
    written(file, "prot: 1\nport: many\nthreads: none\n")
    assert kt("config", "unset", "prot").exit_code == 0
    assert kt("config", "set", "port", "31000").exit_code == 0
    assert kt("config", "unset", "threads").exit_code == 0
    assert settings.load() == {"port": 31000}
    assert "no setting 'prot'" in kt("config", "unset", "prot").stderr


def test_every_option_that_a_key_stands_for_exists(file):
    root = typer.main.get_command(app)
    for key in settings.KEYS.values():
        for path, parameter in key.options:
            command = root
            for name in path.split():
                command = command.commands[name]
            assert parameter in {found.name for found in command.params}, (path, parameter)


def test_a_configured_port_is_used_and_an_option_wins(file):
    written(file, "port: 9\nhost: 127.0.0.2\n")
    assert "127.0.0.2:9/" in kt("top").stderr
    assert "127.0.0.1:10/" in kt("top", "-p", "10", "-H", "127.0.0.1").stderr


def test_asking_for_a_key_that_does_not_exist_is_an_error(file):
    with pytest.raises(KTError, match="no setting 'prot'"):
        settings.configured("prot")


def test_bash_completes_commands(tmp_path):
    script = tmp_path / "kt.bash"
    script.write_text(kt("completion", "bash").stdout)
    ask = f"source {script}; COMP_WORDS=(kt conf) COMP_CWORD=1; _kt_completion kt; echo ${{COMPREPLY[@]}}"
    # The script asks the kt that the shell finds.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "config\n"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell):
    assert "kt" in kt("completion", shell).stdout
