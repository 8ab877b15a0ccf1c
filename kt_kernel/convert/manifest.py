"""What an output folder says of itself (kt_manifest.json), and the other small files beside the shards.

The manifest is there from the first moment, "complete" only at the end: a second conversion into the same
folder sees what it would disturb, and a reader that the folder is not finished.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kt_kernel.checkpoint.reader import MANIFEST
from kt_kernel.convert.layout import VERSION, ShardLayout, shard_name
from kt_kernel.convert.shard import remove_unfinished, write_small
from kt_kernel.convert.targets import Target
from kt_kernel.errors import ConversionError

INDEX = "model.safetensors.index.json"

logger = logging.getLogger(__name__)

# Small files of a model that whoever reads the folder may want: configuration and tokenizer.
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "preprocessor_config.json",
)
_LARGEST_COPY = 64 << 20  # above the largest vocabularies; weights of another format are larger


@dataclass(frozen=True)
class Identity:
    """What makes two conversions the same. `source_name` is for people."""

    target: Target
    source_name: str
    source_tensors: str  # fingerprint of the input


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Only one conversion at a time writes here. Raises ConversionError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConversionError(f"'{directory}' cannot be made or opened: {error.strerror}.") from error
    try:
        _lock(handle, directory)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConversionError(
            f"another conversion is writing to '{directory}'; wait for it, or choose another output folder."
        ) from None
    except OSError as error:
        # Network file systems that cannot lock a folder: the user must not start two by himself.
        logger.info("'%s' cannot be locked (%s): start no second conversion there", directory, error.strerror)


def check_apart(source: Path, output: Path) -> None:
    """Raise ConversionError if writing to `output` would touch the input."""
    source, output = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    source = source.parent if source.is_file() else source
    if output == source or source in output.parents:
        raise ConversionError(
            f"the output '{output}' is the input or lies inside it, and the input is never touched; choose "
            "another output folder."
        )


def claim(directory: Path, identity: Identity) -> None:
    """Make the locked folder this conversion's, or find that it is.

    Raises ConversionError if it holds another one, or other files.
    """
    remove_unfinished(directory)
    path = directory / MANIFEST
    if not path.exists():
        others = sorted(entry.name for entry in directory.iterdir())
        if others:
            raise ConversionError(
                f"'{directory}' holds files that no conversion wrote ('{others[0]}' and {len(others) - 1} "
                "more); choose an empty output folder."
            )
        write_small(path, _json(_manifest(identity, None)))
        return
    found = _read(path)
    for what, expected in _manifest(identity, None).items():
        if what not in ("complete", "shards", "source") and found.get(what) != expected:
            raise ConversionError(
                f"'{directory}' holds a conversion with {what} {found.get(what)!r}, but this one has "
                f"{expected!r}; choose another output folder, or delete that one."
            )
    source = found.get("source")
    if not isinstance(source, dict) or source.get("tensors") != identity.source_tensors:
        name = source.get("name") if isinstance(source, dict) else None
        raise ConversionError(
            f"'{directory}' holds the conversion of another model ({name!r}, and this is "
            f"{identity.source_name!r}); choose another output folder, or delete that one."
        )


def complete(
    directory: Path, source: Path, identity: Identity, shards: dict[int, tuple[ShardLayout, str]]
) -> None:
    """Write what comes last: copies, index, and the manifest that says so.

    `shards`: layer -> its layout and the hash of its source. Raises ConversionError.
    """
    for name, content in _small_files(source):
        write_small(directory / name, content)
    weight_map = {
        tensor: shard_name(layer) for layer, (layout, _) in shards.items() for tensor in layout.places
    }
    total = sum(layout.file_bytes - len(layout.header) for layout, _ in shards.values())
    write_small(directory / INDEX, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    entries = {
        shard_name(layer): {"bytes": layout.file_bytes, "source_sha256": digest}
        for layer, (layout, digest) in shards.items()
    }
    write_small(directory / MANIFEST, _json(_manifest(identity, entries)))


def _manifest(identity: Identity, shards: dict | None) -> dict:
    return {
        "version": int(VERSION),
        "method": identity.target.method,
        "group_size": identity.target.group_size,
        "complete": shards is not None,
        "source": {"name": identity.source_name, "tensors": identity.source_tensors},
        "shards": shards or {},
    }


def _small_files(source: Path) -> Iterator[tuple[str, bytes]]:
    folder = source if source.is_dir() else source.parent
    for path in sorted({path for pattern in _COPIED for path in folder.glob(pattern)}):
        if path.is_file() and path.stat().st_size <= _LARGEST_COPY:
            yield path.name, path.read_bytes()


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"'{path}' cannot be read ({error}); choose an empty output folder.") from error
    if not isinstance(found, dict):
        raise ConversionError(
            f"'{path}' holds a {type(found).__name__}, expected an object; choose an empty output folder."
        )
    return found


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
