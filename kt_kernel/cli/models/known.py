"""The models of this machine: the user's list, the folders they have named, Hugging Face's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.model import DEMO, demo_model, model_folders
from kt_kernel.cli.models.finding import models_below
from kt_kernel.planning.models_dir import hub_cache, hub_snapshot, looks_complete, read_local_models


@dataclass(frozen=True)
class KnownModel:
    """`name`: what `kt run` takes; `source`: "list", "folder" or "cache"; `path`: may not be complete."""

    name: str
    path: Path
    source: str

    @property
    def state(self) -> str:
        """One word."""
        if not self.path.exists():
            return "missing"
        return "ready" if looks_complete(self.path) else "incomplete"


def known_models() -> list[KnownModel]:
    """Each path once, under the first name that it has.

    Raises:
        KTError: the user's list or settings cannot be read.
    """
    found: dict[Path, KnownModel] = {}
    for model in [*_listed(), *_in_folders(), *_in_cache()]:
        found.setdefault(model.path, model)
    return list(found.values())


def model_named(name: str) -> Path:
    """The model that `name` means: a path, a name of `kt model list`, or an ORGANISATION/NAME of the hub.

    Raises:
        CommandError: there is none.
    """
    if name == DEMO:
        return demo_model().path
    for model in known_models():
        if model.name == name:
            return model.path
    path = Path(name).expanduser()
    if path.exists():
        return path.absolute()
    if name.count("/") == 1 and (snapshot := hub_snapshot(name)) is not None:
        return snapshot
    raise CommandError(
        f"There is no model {name!r}: kt model list shows those of this machine, kt model download fetches "
        "others"
    )


def _listed() -> Iterator[KnownModel]:
    for name, path in read_local_models().models.items():
        yield KnownModel(name, Path(path), "list")


def _in_folders() -> Iterator[KnownModel]:
    for folder in map(Path, dict.fromkeys([*model_folders(), *read_local_models().folders])):
        for path in models_below(folder):
            yield KnownModel(str(path.relative_to(folder)), path, "folder")


def _in_cache() -> Iterator[KnownModel]:
    """Repositories with a config.json or GGUF files; the cache holds others' models and data, too."""
    for repository in sorted(hub_cache().glob("models--*--*")):
        name = repository.name.removeprefix("models--").replace("--", "/", 1)
        snapshot = hub_snapshot(name)
        if snapshot and ((snapshot / "config.json").exists() or any(snapshot.glob("*.gguf"))):
            yield KnownModel(name, snapshot, "cache")
