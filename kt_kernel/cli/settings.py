"""The user's defaults for the `kt` commands: `$XDG_CONFIG_HOME/kt-kernel/config.yaml`, else in `~/.config`.

A flat mapping of the keys in KEYS; `kt config` writes it, people may edit it. An option on a command line
wins over it. Options with defaults of their own get theirs through `command_defaults`; other code asks
`configured`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_kernel.cli.errors import CommandError
from kt_kernel.planning.models_dir import config_root


@dataclass(frozen=True)
class Key:
    """`parse` makes the value of what was typed or read, or raises ValueError with what is expected.
    `options`: (command, parameter) pairs of which it is the default. `check_new`: raises ValueError for a
    value that is not to be set now; in the file it may have become so.
    """

    parse: Callable[[Any], Any]
    what: str
    options: tuple[tuple[str, str], ...] = ()
    check_new: Callable[[Any], None] = lambda value: None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a text that is not empty")
    return value


def _whole(lowest: int, highest: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        digits = str(value)
        if isinstance(value, bool) or not (digits.isascii() and digits.isdigit()):
            raise ValueError(f"expected a whole number from {lowest} to {highest}")
        if not lowest <= int(digits) <= highest:
            raise ValueError(f"expected a number from {lowest} to {highest}")
        return int(digits)

    return parse


def _temperature(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError("expected a number from 0 to 2") from None
    if isinstance(value, bool) or not 0 <= number <= 2:
        raise ValueError("expected a number from 0 to 2")
    return number


def _folders(value: Any) -> list[str]:
    """A list, or folders with colons between them, as in PATH."""
    parts = value.split(":") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError("expected folders, separated by colons")
    return [str(Path(part).expanduser().absolute()) for part in parts if part]


def _must_exist(folders: list[str]) -> None:
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"there is no folder {folder}")


def _folder(value: Any) -> str:
    return str(Path(_text(value)).expanduser().absolute())


def _options(value: Any) -> str:
    try:
        words = shlex.split(_text(value))
    except ValueError:
        raise ValueError("expected options as in a shell, with closed quotes") from None
    if not words[0].startswith("-"):
        raise ValueError("expected options of the server: --context-length 8192")
    return value


_SERVER_COMMANDS = ("chat", "top", "bench serve")

KEYS = {
    "host": Key(
        _text,
        "address at which kt run serves and the other commands look for it",
        tuple((command, "host") for command in _SERVER_COMMANDS),
    ),
    "port": Key(
        _whole(1, 65535),
        "port of the same",
        tuple((command, "port") for command in _SERVER_COMMANDS),
    ),
    "threads": Key(_whole(1, 4096), "compute threads of kt run and kt bench", (("bench", "threads"),)),
    "run.options": Key(_options, "further options that kt run gives to the server"),
    "model-folders": Key(
        _folders,
        "folders whose checkpoints kt model list shows (with colons between)",
        check_new=_must_exist,
    ),
    "download-folder": Key(_folder, "where kt model download puts models; default: Hugging Face's cache"),
    "chat.system": Key(_text, "system message of kt chat", (("chat", "system"),)),
    "chat.temperature": Key(_temperature, "temperature of kt chat", (("chat", "temperature"),)),
    "chat.max-tokens": Key(_whole(1, 2**31), "length limit of an answer", (("chat", "max_tokens"),)),
}


def config_file() -> Path:
    """The file, whether it exists or not."""
    return config_root() / "config.yaml"


def load() -> dict[str, Any]:
    """All configured values, checked; {} without a file.

    Raises:
        CommandError: the file cannot be read, or has an unknown key or an impossible value.
    """
    return {key: _checked(key, value, f" in {config_file()}") for key, value in _written().items()}


def _written() -> dict[str, Any]:
    """What the file says, unchecked.

    Raises:
        CommandError: it is no mapping.
    """
    file = config_file()
    if not file.exists():
        return {}
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        sentence = " ".join(str(error).split())
        raise CommandError(f"{file} cannot be read ({sentence}): correct or remove it") from error
    if not isinstance(values, dict):
        raise CommandError(f"{file} holds a {type(values).__name__}, expected lines like 'port: 31000'")
    return {str(key): value for key, value in values.items()}


def set_value(key: str, text: str) -> None:
    """Keep a value; the others stay as they are, even impossible ones.

    Raises:
        CommandError: there is no such key, the value is not possible, or the file cannot be written.
    """
    value = _checked(key, text, "")
    try:
        KEYS[key].check_new(value)
    except ValueError as error:
        raise CommandError(f"{key} is {text!r}: {error}") from None
    _save(_written() | {key: value})


def unset(key: str) -> None:
    """Forget a value, whatever it and the others are; also one of no setting.

    Raises:
        CommandError: there is no such key, or the file cannot be written.
    """
    values = _written()
    if key in values:
        _save({name: value for name, value in values.items() if name != key})
    elif key not in KEYS:
        raise CommandError(f"There is no setting {key!r}: the settings are {', '.join(KEYS)}")


def _checked(key: str, value: Any, where: str) -> Any:
    """`value` as commands use it."""
    if key not in KEYS:
        raise CommandError(f"There is no setting {key!r}{where}: the settings are {', '.join(KEYS)}")
    try:
        return KEYS[key].parse(value)
    except ValueError as error:
        raise CommandError(f"{key} is {value!r}{where}: {error}") from None


def configured(key: str) -> Any | None:
    """The user's value of `key`, or None.

    Raises:
        CommandError: as `load`, and for a key that does not exist.
    """
    if key not in KEYS:
        raise CommandError(f"There is no setting {key!r}: the settings are {', '.join(KEYS)}")
    return load().get(key)


def _save(values: dict[str, Any]) -> None:
    """Write the whole file anew."""
    import yaml

    file = config_file()
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(yaml.safe_dump(values, sort_keys=True, allow_unicode=True), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise CommandError(f"{file} cannot be written ({error})") from error


def command_defaults() -> dict[str, Any]:
    """The configured values as click's `default_map`: {"chat": {"port": 31000}, "bench": {"threads": 8}}."""
    defaults: dict[str, Any] = {}
    for key, value in load().items():
        for command, parameter in KEYS[key].options:
            place = defaults
            for name in command.split():
                place = place.setdefault(name, {})
            place[parameter] = value
    return defaults
