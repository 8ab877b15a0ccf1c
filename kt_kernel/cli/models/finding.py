"""Checkpoints and GGUF files below a folder, found by names: nothing is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


def models_below(folder: Path) -> Iterator[Path]:
    """Directories with a config.json and safetensors, and GGUF files (of a split one the first part).

    Hidden folders are left out, and links are not followed: a model is found where its files are.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "config.json" in files and any(name.endswith(".safetensors") for name in files):
            yield Path(place)
        yield from (Path(place) / name for name in sorted(files) if is_first_gguf(name))


def is_first_gguf(name: str) -> bool:
    """Whether this name is that of a GGUF file, or of the first part of a split one."""
    part = _PART.search(name)
    return name.endswith(".gguf") and (part is None or int(part[1]) == 1)


def weight_files(model: Path) -> list[Path]:
    """The safetensors of a checkpoint, or the parts of a GGUF file, or all GGUF files of a directory."""
    if model.is_dir():
        return sorted([*model.glob("*.safetensors"), *model.glob("*.gguf")])
    if (part := _PART.search(model.name)) is not None:
        return sorted(model.parent.glob(f"{model.name[: part.start()]}-?????-of-?????.gguf"))
    return [model]


def model_files(model: Path) -> list[Path]:
    """All files that belong to a model: those of its directory, hidden ones excepted."""
    if not model.is_dir():
        return weight_files(model)
    files = (path for path in sorted(model.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(model).parts)]


def size_of(files: list[Path]) -> int:
    """Bytes of the files, whatever they are links to."""
    return sum(path.stat().st_size for path in files)
