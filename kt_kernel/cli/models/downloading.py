"""`kt model download`: says what it is about to do, asks, and does it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.models.checking import clear_reading, show_reading
from kt_kernel.cli.models.download import Wanted, check_files_there, check_space, fetch, look
from kt_kernel.cli.models.listing import name_download
from kt_kernel.cli.models.removing import Confirm
from kt_kernel.cli.settings import configured
from kt_kernel.cli.top_view import size
from kt_kernel.planning.models_dir import looks_complete


def wanted(repository: str, revision: str, include: Sequence[str], exclude: Sequence[str], to: str) -> Wanted:
    """The options, with the user's download folder; in it a model is ORGANISATION/NAME."""
    folder = Path(to).expanduser().absolute() if to else None
    if folder is None and (root := configured("download-folder")):
        folder = Path(root) / repository
    return Wanted(repository, revision, tuple(include), tuple(exclude), folder)


def download(wanted: Wanted, confirm: Confirm) -> None:
    """Download, after `confirm`; somebody who runs it in a script is not asked.

    Raises:
        CommandError: the hub has no such files, or they do not fit, or would replace the user's, or the
            connection fails.
    """
    offer = look(wanted)
    try:
        check_files_there(wanted, offer, show_reading)
    finally:
        clear_reading()
    place, free = check_space(wanted, offer)
    here = size(offer.total_bytes - offer.missing_bytes)
    typer.echo(
        f"{wanted.repository} at {offer.commit[:12]}: {len(offer.files)} files, {size(offer.total_bytes)}, "
        f"{here} of it here; {place} has {size(free)} free"
    )
    if offer.missing_bytes and sys.stdin.isatty():
        confirm(f"Download {size(offer.missing_bytes)}?")
    try:
        model = fetch(wanted, offer)
    except KeyboardInterrupt:
        raise CommandError("stopped; the same command goes on from here") from None
    if wanted.folder is not None and looks_complete(model):
        name_download(wanted.repository, model)
    else:
        typer.echo(f"{wanted.repository} is in {model}")
