"""`kt model remove`: asks, and deletes only what kt downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import typer

from kt_kernel.cli.models.finding import size_of
from kt_kernel.cli.models.known import model_named
from kt_kernel.cli.models.records import record_of
from kt_kernel.cli.models.remove import forget_name, removable_files
from kt_kernel.cli.models.remove import remove as remove_files
from kt_kernel.cli.top_view import size

Confirm = Callable[[str], object]
"""Asks a question; raises typer.Abort unless the answer is yes."""


def confirmation(yes: object) -> Confirm:
    """Asks in the terminal, unless the command line has said yes already."""
    return (lambda question: None) if yes else partial(typer.confirm, abort=True)


def remove(name: str, confirm: Confirm) -> None:
    """Delete the files of a downloaded model; forget the name of one that was added.

    Raises:
        CommandError: there is none, or somebody else put it there.
    """
    model = model_named(name)
    record = record_of(model)
    if (record is None or not record.fetched) and (place := forget_name(name)) is not None:
        typer.echo(f"{name} is forgotten; the files in {place} stay.")
        return
    files = removable_files(model)
    confirm(f"Delete {len(files)} files with {size(size_of(files))} in {model}?")
    freed = remove_files(model)
    forget_name(name)
    typer.echo(f"{model} is removed: {size(freed)}.")
