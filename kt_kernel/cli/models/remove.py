"""Removing what kt downloaded, file by file, and nothing else."""

from __future__ import annotations

import os
import shutil
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
    if record is None or not record.fetched:
        raise CommandError(
            f"{model} was not downloaded by kt model download, so its files stay: delete them yourself"
        )
    return [path for name in record.fetched if (path := model / name).is_file()]


def remove(model: Path) -> int:
    """Delete what `removable_files` says; returns the bytes. Other files, and folders with some, stay.

    Raises:
        CommandError: kt did not download them, or they cannot be deleted.
    """
    files = removable_files(model)
    size = size_of(files)
    try:
        if model.is_relative_to(hub_cache().absolute()):
            _remove_from_cache(model, files)
        else:
            _remove_from_folder(model, files)
    except OSError as error:
        raise CommandError(f"{model} cannot be removed ({error})") from error
    keep_record(model, None)
    return size


def _remove_from_cache(snapshot: Path, files: list[Path]) -> None:
    """Names of a snapshot, and the content that no other name refers to; the last name takes the revision."""
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir(hub_cache())
    if hasattr(cache, "delete_files"):  # which knows the store that repositories share in newer versions
        names = {path.relative_to(snapshot) for path in files}
        place = snapshot.resolve()
        revisions = (revision for repository in cache.repos for revision in repository.revisions)
        own = (file for revision in revisions if revision.snapshot_path == place for file in revision.files)
        cache.delete_files(*(file for file in own if file.file_path.relative_to(place) in names)).execute()
    # Of an older version all, of this one the files of a repository with a damaged entry, which it skips.
    _unlink_with_content(snapshot.parent, [path for path in files if path.is_file()])
    repository = snapshot.parent.parent
    _remove_empty_folders(snapshot)
    if not snapshot.exists():
        for ref in (repository / "refs").rglob("*"):
            if ref.is_file() and ref.read_text(encoding="utf-8").strip() == snapshot.name:
                ref.unlink()
        (repository / "trees" / f"{snapshot.name}.json").unlink(missing_ok=True)  # its list of files
        _remove_empty_folders(repository)


def _unlink_with_content(snapshots: Path, files: list[Path]) -> None:
    """As `delete_files` of newer versions of huggingface-hub."""
    content = {_content(path) for path in files}
    for path in files:
        path.unlink()
    for path in content - {_content(path) for path in snapshots.rglob("*") if path.is_symlink()}:
        path.unlink(missing_ok=True)


def _content(name: Path) -> Path:
    return Path(os.path.normpath(name.parent / name.readlink())) if name.is_symlink() else name


def _remove_from_folder(model: Path, files: list[Path]) -> None:
    notes = model / ".cache" / "huggingface"  # the hub's, on each file
    for path in files:
        path.unlink()
        (notes / "download" / f"{path.relative_to(model)}.metadata").unlink(missing_ok=True)
    if not any(notes.rglob("*.metadata")):
        shutil.rmtree(notes, ignore_errors=True)
    _remove_empty_folders(model)


def _remove_empty_folders(root: Path) -> None:
    folders = sorted(
        (path for path in root.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True
    )
    for folder in [*folders, root]:
        if not any(folder.iterdir()):
            folder.rmdir()
