"""Where models are looked for, by every command: the user's own list, their folders, Hugging Face's cache.

The list is `local_models.json` in the user's folder of settings (`$XDG_CONFIG_HOME/kt-kernel`, else
`~/.config/kt-kernel`), written by `kt model`:

    {"models": {"my-qwen": "/data/Qwen3-30B-A3B"}, "folders": ["/data/models"]}

A folder holds models as NAME or as ORGANISATION/NAME. Nothing here imports huggingface-hub: `kt run` must
start quickly, and the layout of its cache is public (models--ORG--NAME/refs/main, snapshots/COMMIT).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kt_kernel.errors import ConfigurationError


@dataclass
class LocalModels:
    """`models`: name -> path of a model; `folders`: directories with models in them. Absolute paths."""

    models: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)


def config_root() -> Path:
    """The user's folder of settings, whether it exists or not."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "kt-kernel"


def hub_cache() -> Path:
    """Hugging Face's cache of models, as huggingface-hub finds it; it may not exist."""
    if explicit := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(explicit).expanduser()
    home = os.environ.get("HF_HOME")
    if home is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def read_local_models() -> LocalModels:
    """What the user has added; raises ConfigurationError for a file that cannot be read."""
    path = _list_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        models = {str(name): str(place) for name, place in content.get("models", {}).items()}
        return LocalModels(models, [str(folder) for folder in content.get("folders", [])])
    except FileNotFoundError:
        return LocalModels()
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}): correct it, or delete it and add your models again."
        ) from error


def write_local_models(local: LocalModels) -> Path:
    """Replace the user's list, whole or not at all; returns its path. Raises OSError."""
    path = _list_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        json.dump(asdict(local), part, indent=1)
        part.write("\n")
    os.replace(part.name, path)
    return path


def find_model(name: str, folders: Sequence[str] = ()) -> Path | None:
    """The complete model that `name` means, None if there is none.

    `name`: one of the user's list, or a hub id ORGANISATION/NAME that is in a folder of theirs, in one of
    `folders`, or in Hugging Face's cache. Raises ConfigurationError as `read_local_models` does.
    """
    local = read_local_models()
    if name in local.models:
        return Path(local.models[name])
    return next(
        (path for path in _candidates(name, [*local.folders, *folders]) if looks_complete(path)), None
    )


def looks_complete(path: Path) -> bool:
    """Does the directory hold a configuration and every weight file that its index names, or a GGUF file?"""
    if not path.is_dir():
        return path.suffix == ".gguf" and path.is_file()
    if any(path.glob("*.gguf")):
        return True
    return (path / "config.json").is_file() and not missing_files(path) and any(path.glob("*.safetensors"))


def missing_files(path: Path) -> list[str]:
    """Names of the weight files that the index promises and that are not there."""
    for index in path.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [index.name]
        return sorted(name for name in named if not (path / name).is_file())
    return []


def hub_snapshot(hub_id: str) -> Path | None:
    """The directory of a hub id in Hugging Face's cache, complete or not; None if it is not there."""
    repository = hub_cache() / ("models--" + hub_id.replace("/", "--"))
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _candidates(name: str, folders: Sequence[str]) -> Iterator[Path]:
    for folder in map(Path, folders):
        yield folder / name
        yield folder / name.rpartition("/")[2]
    if name.count("/") == 1 and (snapshot := hub_snapshot(name)) is not None:
        yield snapshot


def _list_file() -> Path:
    return config_root() / "local_models.json"
