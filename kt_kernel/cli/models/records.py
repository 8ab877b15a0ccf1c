"""What is known of the files of models: `model_records.json` in the user's folder of settings.

    {"/data/Qwen3-30B-A3B": {"repository": "Qwen/Qwen3-30B-A3B", "commit": "ad44e7...", "files":
     {"config.json": {"size": 963, "checksum": "git-sha1:0a3c...", "fetched": true},
      "notes.txt": {"size": 12, "checksum": "sha256:7f1b...", "fetched": false}}}}

The hub gives the SHA-256 of large files, and of small ones the checksum by which git names them.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kt_kernel.cli.errors import CommandError
from kt_kernel.planning.models_dir import config_root


@dataclass(frozen=True)
class FileRecord:
    """`checksum`: "sha256:..." or "git-sha1:...". `fetched`: by kt, which may then remove the file; else it
    was only seen.
    """

    size: int
    checksum: str
    fetched: bool = False


@dataclass(frozen=True)
class ModelRecord:
    """`repository`, `commit`: of the hub, "" for a model from elsewhere. `files`: names relative to the
    model's folder.
    """

    repository: str = ""
    commit: str = ""
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def fetched(self) -> list[str]:
        """Names of the files that kt downloaded."""
        return [name for name, file in self.files.items() if file.fetched]


def records_file() -> Path:
    """The file, whether it exists or not."""
    return config_root() / "model_records.json"


def read_records() -> dict[str, ModelRecord]:
    """Absolute path of a model -> its record.

    Raises:
        CommandError: the file is damaged.
    """
    file = records_file()
    try:
        return {path: _record(found) for path, found in json.loads(file.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CommandError(
            f"{file} cannot be read ({error}): delete it; kt model verify then records anew what it finds"
        ) from error


def _record(found: dict) -> ModelRecord:
    files = {name: FileRecord(**said) for name, said in found["files"].items()}
    return ModelRecord(found["repository"], found["commit"], files)


def record_of(path: Path) -> ModelRecord | None:
    """Of the model at `path`."""
    return read_records().get(str(path.absolute()))


def keep_record(path: Path, record: ModelRecord | None) -> None:
    """Replace the record of the model at `path`; None forgets it.

    Raises:
        CommandError: the file cannot be read or written.
    """
    records = read_records()
    records.pop(str(path.absolute()), None)
    if record is not None:
        records[str(path.absolute())] = record
    file = records_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False) as part:
            json.dump({path: asdict(found) for path, found in records.items()}, part, indent=1)
        os.replace(part.name, file)
    except OSError as error:
        raise CommandError(f"{file} cannot be written ({error})") from error
