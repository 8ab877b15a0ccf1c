"""Is a model complete, are its headers sound, and is each byte what was recorded?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kt_kernel.cli.models.finding import model_files, weight_files
from kt_kernel.cli.models.records import FileRecord, ModelRecord
from kt_kernel.errors import KTError
from kt_kernel.planning.models_dir import missing_files

_BLOCK_BYTES = 1 << 22
SHA256, GIT_SHA1 = "sha256", "git-sha1"


@dataclass
class Result:
    """`problems`: sentences; `record`: with the checksums of files that had none."""

    record: ModelRecord
    problems: list[str] = field(default_factory=list)
    compared: int = 0
    recorded: int = 0


def check_structure(model: Path) -> list[str]:
    """What is wrong with names and headers; no weight is read."""
    problems = []
    if model.is_dir():
        problems += [f"{name} is missing; the index names it" for name in missing_files(model)]
        if not (model / "config.json").is_file() and not any(model.glob("*.gguf")):
            problems.append("config.json is missing")
    files = weight_files(model)
    if not files:
        problems.append("there are no weights: neither .safetensors nor .gguf")
    return problems + [sentence for file in files if (sentence := _header_problem(file))]


def check_bytes(model: Path, record: ModelRecord, progress: Callable[[Path], None]) -> Result:
    """Compare every file with its record, and record those that have none; reads everything once."""
    root = model if model.is_dir() else model.parent
    result = Result(record)
    files = dict(record.files)
    for name in files:
        if not (root / name).is_file():
            result.problems.append(f"{name} is missing")
    for path in model_files(model):
        name = str(path.relative_to(root))
        progress(path)
        known = files.get(name)
        if known is None:
            files[name] = FileRecord(path.stat().st_size, checksum(path, SHA256))
            result.recorded += 1
            continue
        result.compared += 1
        if problem := difference(path, known):
            result.problems.append(f"{name} {problem}")
    result.record = ModelRecord(record.repository, record.commit, files)
    return result


def difference(path: Path, known: FileRecord) -> str:
    """What sets the file apart from what is known of it, "" if nothing does; reads it where sizes agree."""
    size = path.stat().st_size
    if size != known.size:
        return f"has {size} bytes, recorded were {known.size}"
    seen = checksum(path, known.checksum.partition(":")[0])
    return "" if seen == known.checksum else f"has changed: {seen}, recorded was {known.checksum}"


def checksum(path: Path, kind: str) -> str:
    """ "sha256:..." of the file, or "git-sha1:...", by which git names its content."""
    digest = hashlib.sha256() if kind == SHA256 else hashlib.sha1(usedforsecurity=False)
    if kind == GIT_SHA1:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"


def _header_problem(file: Path) -> str:
    from kt_kernel.checkpoint.safetensors_file import SafetensorsFile
    from kt_kernel.gguf.file import GgufFile

    try:
        GgufFile(str(file)) if file.suffix == ".gguf" else SafetensorsFile(str(file))
    except KTError as error:
        return f"{file.name}: {error}"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return ""
