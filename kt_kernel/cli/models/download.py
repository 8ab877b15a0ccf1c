"""From the Hugging Face hub, with huggingface-hub: what was begun is continued, what is there is kept."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.models.records import FileRecord, ModelRecord, keep_record, record_of
from kt_kernel.cli.models.verify import GIT_SHA1, SHA256, difference
from kt_kernel.planning.models_dir import hub_cache

# What a file system may need beside the files themselves; less free than this is as good as none.
_SPARE_BYTES = 1 << 28
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Wanted:
    """`folder`: a directory for these files alone; None for Hugging Face's cache. Patterns as a shell's."""

    repository: str
    revision: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    folder: Path | None


@dataclass(frozen=True)
class Offer:
    """What the hub has: `files` by name, and how many bytes of them are not here yet."""

    commit: str
    files: dict[str, FileRecord]
    missing_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files.values())


def look(wanted: Wanted) -> Offer:
    """Ask the hub what there is.

    Raises:
        CommandError: the hub does not answer, has no such repository or revision, or no file is wanted.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    with _sentences(wanted):
        info = HfApi(endpoint=_endpoint()).model_info(
            wanted.repository, revision=wanted.revision, files_metadata=True
        )
    siblings = filter_repo_objects(
        info.siblings or (),
        allow_patterns=list(wanted.include) or None,
        ignore_patterns=list(wanted.exclude) or None,
        key=lambda sibling: sibling.rfilename,
    )
    files = {sibling.rfilename: _file(sibling) for sibling in siblings}
    if not files:
        raise CommandError(
            f"{wanted.repository} has no file that --include and --exclude leave: see its list of files"
        )
    missing = sum(file.size for name, file in files.items() if not _is_here(wanted, name, file))
    return Offer(str(info.sha), files, missing)


def check_space(wanted: Wanted, offer: Offer) -> tuple[Path, int]:
    """Where the files go and the bytes that are free there.

    Raises:
        CommandError: they do not fit.
    """
    place = wanted.folder or hub_cache()
    existing = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if offer.missing_bytes and offer.missing_bytes + _SPARE_BYTES > free:
        raise CommandError(
            f"{wanted.repository} needs {offer.missing_bytes / 1e9:.1f} GB more and {existing} has "
            f"{free / 1e9:.1f} GB free: make room, or give another place with --to or "
            "kt config set download-folder"
        )
    return place, free


def check_files_there(wanted: Wanted, offer: Offer, reading: Callable[[Path], None]) -> None:
    """Files of somebody else in `wanted.folder` must be the hub's; `reading` is told of each that is read.

    Raises:
        CommandError: some are not, and the download would replace them.
    """
    if wanted.folder is None:
        return
    model, others = _place(wanted, offer), []
    fetched = set((record_of(model) or ModelRecord()).fetched)
    for name, file in offer.files.items():
        if name not in fetched and (path := model / name).is_file():
            reading(path)
            if difference(path, file):
                others.append(name)
    if others:
        more = f" and {len(others) - _NAMES_SHOWN} more" if len(others) > _NAMES_SHOWN else ""
        raise CommandError(
            f"{model} has {', '.join(others[:_NAMES_SHOWN])}{more}, not downloaded by kt and different from "
            f"{wanted.repository}'s: give another place with --to, or move them away"
        )


def fetch(wanted: Wanted, offer: Offer) -> Path:
    """Download what is missing and record sizes and checksums; returns the model's directory.

    Files that were there before belong to whoever put them there. What a download that breaks off has
    fetched is recorded, too.

    Raises:
        CommandError: it did not succeed; calling again goes on from there.
    """
    from huggingface_hub import snapshot_download

    model = _place(wanted, offer)
    absent = {name for name in offer.files if not (model / name).is_file()}
    try:
        with _sentences(wanted):
            snapshot_download(
                wanted.repository,
                revision=wanted.revision,
                allow_patterns=list(wanted.include) or None,
                ignore_patterns=list(wanted.exclude) or None,
                local_dir=wanted.folder,
                cache_dir=None if wanted.folder else hub_cache(),
                endpoint=_endpoint(),
            )
    finally:
        earlier = record_of(model) or ModelRecord()
        ours = absent.union(earlier.fetched)
        there = {
            name: replace(file, fetched=name in ours)
            for name, file in offer.files.items()
            if (model / name).is_file()
        }
        if there:
            keep_record(model, ModelRecord(wanted.repository, offer.commit, earlier.files | there))
    return model


def _place(wanted: Wanted, offer: Offer) -> Path:
    """The model's directory, as huggingface-hub names it."""
    if wanted.folder is not None:
        return Path(os.path.realpath(wanted.folder))
    return _repository(wanted).absolute() / "snapshots" / offer.commit


def _repository(wanted: Wanted) -> Path:
    """Its directory in Hugging Face's cache."""
    return hub_cache() / ("models--" + wanted.repository.replace("/", "--"))


def _file(sibling: Any) -> FileRecord:
    if sibling.lfs is not None:
        return FileRecord(sibling.lfs.size, f"{SHA256}:{sibling.lfs.sha256}")
    return FileRecord(sibling.size or 0, f"{GIT_SHA1}:{sibling.blob_id}")


def _is_here(wanted: Wanted, name: str, file: FileRecord) -> bool:
    if wanted.folder is None:
        path = _repository(wanted) / "blobs" / file.checksum.partition(":")[2]
    else:
        path = wanted.folder / name
    return path.is_file() and path.stat().st_size == file.size


def _endpoint() -> str | None:
    """As huggingface-hub reads it, but at the time of the call."""
    return os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def _sentences(wanted: Wanted) -> Iterator[None]:
    """Errors of huggingface-hub and its HTTP client as one sentence."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise CommandError(_sentence(wanted, error)) from error


def _sentence(wanted: Wanted, error: Exception) -> str:
    from huggingface_hub import errors

    name = wanted.repository
    hub = _endpoint() or "huggingface.co"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} asks for an agreement: accept it on {hub}, then log in with hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no repository {name}, or a private one: check the name, or hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {wanted.revision!r}"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is no name of a repository: expected ORGANISATION/NAME"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{name} cannot be fetched from {hub} ({text[:300]}): run the same command again to go on"
