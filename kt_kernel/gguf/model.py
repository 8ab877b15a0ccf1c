"""A model in GGUF: one file, the parts of a split one, or the one model in a directory.

The parts of a split model are called `NAME-00001-of-0000N.gguf`; each says in its metadata which part it is,
of how many, and how many tensors all of them have. The first one's metadata are the model's.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping

import torch

from kt_kernel.checkpoint.mapped_file import MappedFiles
from kt_kernel.checkpoint.opened import OpenReaders
from kt_kernel.errors import CheckpointError, CheckpointPathError, MissingTensorError
from kt_kernel.gguf.cursor import damaged
from kt_kernel.gguf.file import GgufFile, TensorInfo, is_gguf_file
from kt_kernel.gguf.metadata import Metadata

ENDING = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
_MOST_PARTS = 99999  # that the names have digits for
_NOT_MODELS = ("adapter", "mmproj", "imatrix")  # values of general.type


def open_gguf(path: str | os.PathLike) -> GgufModel:
    """The model at `path`: a file, any part of a split model, or a directory that holds one model.

    Opened on first use and again only if its files changed. Raises CheckpointPathError if there is nothing
    there, CheckpointError if it is no GGUF model, damaged, or not the only one.
    """
    # Links to files stay: in the hub's cache only their names say which part they are.
    full = os.path.abspath(path)
    if not os.path.exists(full):
        raise CheckpointPathError(
            f"'{path}' does not exist; give a local {ENDING} file, or the directory with it."
        )
    return _models.open(os.path.realpath(full) if os.path.isdir(full) else full)


def release_models() -> None:
    """Close all models; views still in use keep their own file open."""
    _models.clear()


def holds_gguf(path: str | os.PathLike) -> bool:
    """Is there a GGUF file at `path`, or in that directory? Says nothing of what it holds."""
    if os.path.isdir(path):
        return any(entry.name.endswith(ENDING) for entry in os.scandir(path))
    return is_gguf_file(os.fspath(path)) or os.fspath(path).endswith(ENDING)


class GgufModel(MappedFiles):
    """The tensors of all files of a model, and the metadata of its first one.

    `path`: what was opened. `metadata`: key -> value; arrays are read-only sequences. `tensors`: name ->
    TensorInfo, in the order of the files. `files`: in the order of the parts.
    """

    def __init__(self, path: str) -> None:
        """`path`: an existing file or directory."""
        self.path = path
        self.files = _open_parts(_the_file_in(path) if os.path.isdir(path) else path)
        self.metadata: Metadata = self.files[0].metadata
        self.tensors: Mapping[str, TensorInfo] = {}
        self._home_of: dict[str, GgufFile] = {}
        for file in self.files:
            for name, info in file.tensors.items():
                if name in self._home_of:
                    raise CheckpointError(
                        f"tensor '{name}' is in both '{self._home_of[name].path}' and '{file.path}', which "
                        "cannot be parts of one model; download it again."
                    )
                self.tensors[name] = info
                self._home_of[name] = file

    @property
    def architecture(self) -> str:
        """What the metadata call the model's architecture, "qwen3moe"; raises CheckpointError."""
        said = self.metadata.get("general.architecture")
        if not isinstance(said, str):
            raise damaged(
                self.files[0].path,
                f"general.architecture is {said!r}, expected the name of an architecture",
            )
        return said

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def file_of(self, name: str) -> GgufFile:
        """The file that holds the tensor; raises MissingTensorError."""
        try:
            return self._home_of[name]
        except KeyError:
            raise MissingTensorError(f"tensor '{name}' is not in '{self.path}'.") from None

    def info(self, name: str) -> TensorInfo:
        """What the header says of the tensor; raises MissingTensorError."""
        return self.file_of(name).info(name)

    def view(self, name: str) -> torch.Tensor:
        """The tensor's bytes as a read-only view of the mapped file: uint8 `TensorInfo.stored_shape`."""
        return self.file_of(name).view(name)


# ---- the parts of a split model --------------------------------------------------------------------------


def _open_parts(path: str) -> list[GgufFile]:
    """The file itself, or all parts of the model that it is a part of."""
    opened = GgufFile(path)
    parts = _said(opened, "split.count", 1)
    directory, name = os.path.split(path)
    named = _PART.fullmatch(name)
    if not 1 <= parts <= _MOST_PARTS:
        raise damaged(path, f"its split.count is {parts}, expected 1 to {_MOST_PARTS}")
    if parts == 1 and (named is None or int(named["parts"]) == 1):
        return [opened]
    if named is None or int(named["parts"]) != parts:
        raise CheckpointError(
            f"file '{path}' is one of {parts} parts by its metadata, but its name does not end in "
            f"-00001-of-{parts:05}{ENDING}; give all parts the names under which they were published."
        )
    paths = [
        os.path.join(directory, f"{named['stem']}-{part:05}-of-{parts:05}{ENDING}")
        for part in range(1, parts + 1)
    ]
    missing = [part for part in paths if not os.path.exists(part)]
    if missing:
        raise CheckpointPathError(
            f"file '{missing[0]}' does not exist, {len(missing)} of the model's {parts} parts are missing; "
            "download them into the same directory."
        )
    files = [opened if part == path else GgufFile(part) for part in paths]
    _check_parts(files)
    return files


def _check_parts(files: list[GgufFile]) -> None:
    first, tensors = files[0], sum(len(file.tensors) for file in files)
    total = _said(first, "split.tensors.count", tensors)
    for number, file in enumerate(files):
        for key, expected, seen in (
            ("split.no", number, _said(file, "split.no", None)),
            ("split.count", len(files), _said(file, "split.count", None)),
            ("split.tensors.count", total, _said(file, "split.tensors.count", total)),
        ):
            if seen != expected:
                raise CheckpointError(
                    f"file '{file.path}' has {key} {seen}, expected {expected} by its name and the other "
                    "parts; download all parts of one model again."
                )
        architecture = first.metadata.get("general.architecture")
        its = file.metadata.get("general.architecture", architecture)
        if its != architecture:
            raise CheckpointError(
                f"file '{file.path}' is of the architecture {its!r} and '{first.path}' of {architecture!r}; "
                "take all parts from one model."
            )
    if tensors != total:
        raise CheckpointError(
            f"the {len(files)} parts of '{first.path}' have {tensors} tensors, expected {total} by their "
            "split.tensors.count; download them again."
        )


def _said(file: GgufFile, key: str, if_absent: int | None) -> int | None:
    value = file.metadata.get(key, if_absent)
    if value is not None and type(value) is not int:
        raise damaged(file.path, f"its {key} is {value!r}, expected an integer")
    return value


# ---- the model in a directory ----------------------------------------------------------------------------


def _the_file_in(directory: str) -> str:
    """One file of the only model in the directory."""
    models: dict[str, str] = {}
    for name in sorted(os.listdir(directory)):
        if name.endswith(ENDING):
            named = _PART.fullmatch(name)
            models.setdefault(f"{named['stem']}-of-{named['parts']}" if named else name, name)
    if not models:
        raise _nothing_in(directory)
    paths = [os.path.join(directory, name) for name in models.values()]
    if len(paths) > 1:  # a projector for images, or an importance matrix, may lie beside the model
        paths = [path for path in paths if _is_model(path)] or paths
    if len(paths) > 1:
        raise CheckpointError(
            f"directory '{directory}' holds {len(paths)} models: "
            f"{', '.join(os.path.basename(path) for path in paths)}; give the file of the one you mean."
        )
    return paths[0]


def _is_model(path: str) -> bool:
    """A later part of a split model says nothing, and counts."""
    metadata = GgufFile(path).metadata
    return metadata.get("general.type") not in _NOT_MODELS and metadata.get("general.architecture") != "clip"


def _nothing_in(directory: str) -> CheckpointPathError:
    below = glob.glob(os.path.join(glob.escape(directory), "*", "*" + ENDING))
    with_files = sorted({os.path.basename(os.path.dirname(path)) for path in below})
    where = f", but its directories {', '.join(with_files[:8])} do" if with_files else ""
    return CheckpointPathError(
        f"directory '{directory}' holds no {ENDING} file{where}; give the directory with the model's file."
    )


_models = OpenReaders(GgufModel, (ENDING,))
