"""Removing what kt downloaded, and nothing else."""

from __future__ import annotations

from pathlib import Path

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.models.finding import size_of
from kt_kernel.cli.models.records import keep_record, record_of
from kt_kernel.planning.models_dir import hub_cache, read_local_models, write_local_models


def forget_name(name: str) -> Path | None:
    """Take a name off the user's list; its files stay. Returns where they are, None if there is no such name.

    Raises:
        KTError: the list cannot be read or written.
    """
    local = read_local_models()
    place = local.models.pop(name, None)
    if place is None:
        return None
    try:
        write_local_models(local)
    except OSError as error:
        raise CommandError(f"the list of models cannot be written ({error})") from error
    return Path(place)


def removable_files(model: Path) -> list[Path]:
    """Those that kt downloaded into `model`.

    Raises:
        CommandError: kt did not.
    """
    record = record_of(model)
    if record is None or not record.downloaded:
        raise CommandError(
            f"{model} was not downloaded by kt model download, so its files stay: delete them yourself"
        )
    return [path for name in record.files if (path := model / name).is_file()]


def remove(model: Path) -> int:
    """Delete what `removable_files` says; returns the bytes. Other files, and folders with some, stay.

    Raises:
        CommandError: kt did not download them, or they cannot be deleted.
    """
    files = removable_files(model)
    size = size_of(files)
    try:
        if model.is_relative_to(hub_cache().absolute()):
            _remove_from_cache(model)
        else:
            _remove_files(model, files)
    except OSError as error:
        raise CommandError(f"{model} cannot be removed ({error})") from error
    keep_record(model, None)
    return size


def _remove_from_cache(snapshot: Path) -> None:
    """As huggingface-hub does it: what other revisions share with this one stays."""
    from huggingface_hub import scan_cache_dir

    scan_cache_dir(hub_cache()).delete_revisions(snapshot.name).execute()


def _remove_files(model: Path, files: list[Path]) -> None:
    import shutil

    for path in files:
        path.unlink()
    shutil.rmtree(model / ".cache" / "huggingface", ignore_errors=True)  # the hub's notes on these files
    folders = sorted((path for path in model.rglob("*") if path.is_dir()), reverse=True)
    for folder in [*folders, model]:
        if not any(folder.iterdir()):
            folder.rmdir()
