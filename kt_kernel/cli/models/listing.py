"""`kt model list`, `add` and `scan`: names for models that are on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.models.finding import model_files, models_below, size_of
from kt_kernel.cli.models.known import known_models
from kt_kernel.cli.tables import wrapped_rows
from kt_kernel.cli.top_view import size
from kt_kernel.planning.models_dir import LocalModels, looks_complete, read_local_models, write_local_models


def lines() -> list[str]:
    """A table of all known models."""
    models = known_models()
    if not models:
        return ["No models: kt model download fetches one, kt model scan and kt model add name what is here."]
    rows = [(model.name, _size(model.path), model.state, _short(model.path)) for model in models]
    return list(wrapped_rows(("model", "size", "state", "where"), rows))


def scan_lines(folder: Path) -> list[str]:
    """A table of what is below `folder`.

    Raises:
        CommandError: it is no folder.
    """
    if not folder.is_dir():
        raise CommandError(f"There is no folder {folder}")
    found = list(models_below(folder))
    if not found:
        return [f"There is no checkpoint (config.json with safetensors) and no .gguf file below {folder}."]
    rows = [(_size(path), "ready" if looks_complete(path) else "incomplete", _short(path)) for path in found]
    return list(wrapped_rows(("size", "state", "where"), rows))


def add_model(name: str, path: Path) -> None:
    """Put one name on the user's list.

    Raises:
        CommandError: there is no complete model at `path`, or the name stands for another.
    """
    if not looks_complete(path):
        raise CommandError(
            f"{path} is no complete model: expected config.json with safetensors, or a .gguf file"
        )
    _write([(name, path)])


def name_download(name: str, path: Path) -> None:
    """The name stands for the last download; files that it stood for before stay where they are."""
    local = read_local_models()
    if (earlier := local.models.pop(name, str(path))) != str(path):
        typer.echo(f"{name} was {earlier}, whose files stay; kt model add gives them another name.")
    _write_names(local, [(name, path)])


def add_found(folder: Path) -> None:
    """Each complete model below `folder` that has no name yet gets that of its directory or file.

    Raises:
        CommandError: such a name stands for another model.
    """
    named = set(read_local_models().models.values())
    found = [path for path in models_below(folder) if looks_complete(path) and str(path) not in named]
    _write([(path.name.removesuffix(".gguf"), path) for path in found])


def _write(named: Sequence[tuple[str, Path]]) -> None:
    local = read_local_models()
    for name, path in named:
        if local.models.get(name, str(path)) != str(path):
            raise CommandError(f"{name} is already the name of {local.models[name]}: give another name")
    _write_names(local, named)


def _write_names(local: LocalModels, named: Sequence[tuple[str, Path]]) -> None:
    local.models.update((name, str(path)) for name, path in named)
    try:
        write_local_models(local)
    except OSError as error:
        raise CommandError(f"the list of models cannot be written ({error})") from error
    for name, path in named:
        typer.echo(f"{name} is {path}; kt run {name} serves it.")


def _size(path: Path) -> str:
    return size(size_of(model_files(path))) if path.exists() else "-"


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
