"""What a Hugging Face directory would say of a GGUF file's model, in the user's cache: a few MB.

It holds everything but weights, and the name of the file that has them; whoever loads the model reads the
weights there (dense.py). A file that changed has another description.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kt_kernel.errors import CheckpointError
from kt_kernel.gguf.model import GgufModel, holds_gguf, open_gguf
from kt_kernel.gguf_model.architectures import require_architecture
from kt_kernel.gguf_model.config import generation_config, model_config
from kt_kernel.gguf_model.dense import DenseWeights
from kt_kernel.gguf_model.fields import Fields
from kt_kernel.gguf_model.tokenizer import save_tokenizer
from kt_kernel.user_cache import cache_root, cached_directory

LAYOUT_VERSION = 1  # raise whenever what is written changes
_MARK = "kt_gguf.json"
_PART = re.compile(r"-\d{5}-of-\d{5}$")  # ends the names of the parts of a split model


@dataclass(frozen=True)
class ModelDescription:
    """`directory`: config.json, tokenizer and so on; `name`: what to call the model; `file`: its weights."""

    directory: Path
    name: str
    file: Path


def find_gguf(path: str | os.PathLike) -> Path | None:
    """`path` if it is a model in GGUF: a file, or a directory with GGUF files and no config.json."""
    found = Path(path).expanduser()
    if found.is_dir() and (found / "config.json").exists():
        return None
    return found.absolute() if found.exists() and holds_gguf(found) else None


def describe(path: str | os.PathLike) -> ModelDescription:
    """The description of the model at `path`, written first if it is not in the cache yet.

    Raises a KTError in one sentence if the file is damaged, or of a model or with a tokenizer that cannot be
    served from it alone.
    """
    model = open_gguf(path)
    first = Path(model.files[0].path)
    identity = hashlib.sha256(repr([_state(Path(file.path)) for file in model.files]).encode()).hexdigest()
    target = cache_root() / "gguf" / f"{first.stem[:64]}-{identity[:16]}-v{LAYOUT_VERSION}"
    try:
        directory = cached_directory(
            target, f"the description of {first.name}", lambda work: _write(model, first, work)
        )
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the description of '{path}' cannot be written below {target.parent} ({error}); make it "
            "writable, or set XDG_CACHE_HOME to another directory."
        ) from error
    return ModelDescription(directory, _name(model, first), first)


def served_name(path: str | os.PathLike) -> str:
    """What to call the model at `path`; raises a KTError if it cannot be served from its file alone."""
    model = open_gguf(path)
    require_architecture(Fields(model))
    return _name(model, Path(model.files[0].path))


def described_file(directory: str | os.PathLike) -> Path | None:
    """The GGUF file with the weights of a description; None = `directory` is none."""
    mark = Path(directory) / _MARK
    return Path(json.loads(mark.read_text())["file"]) if mark.exists() else None


def _write(model: GgufModel, first: Path, directory: Path) -> None:
    fields = Fields(model)
    config = model_config(fields)
    DenseWeights(model)  # what is missing in the file is said now, not by the processes that load it
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation_config(fields)),
        (_MARK, {"file": str(first)}),
    ):
        (directory / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    save_tokenizer(model, directory, config["max_position_embeddings"])


def _state(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns


def _name(model: GgufModel, first: Path) -> str:
    said = model.metadata.get("general.name")
    return said if isinstance(said, str) and said.strip() else _PART.sub("", first.stem)
