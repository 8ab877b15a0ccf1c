"""A checkpoint: one safetensors file or a directory of them, with or without an index.

Readers are opened once per real path and shared by all layers; one is replaced when its files change on disk.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable

import torch

from kt_kernel.checkpoint.mapped_file import MappedFiles
from kt_kernel.checkpoint.opened import OpenReaders
from kt_kernel.checkpoint.safetensors_file import SafetensorsFile, TensorInfo, without_repetition
from kt_kernel.errors import CheckpointError, CheckpointPathError, MissingTensorError

_INDEX_SUFFIX = ".safetensors.index.json"
_EXPERTS = ".experts."
# Of a converted directory (numa_parts.py), and of Step-3.5, whose experts are called otherwise.
_CUT_EXPERTS = re.compile(
    r"(blk\.\d+)\.(ffn_\w+_exps\..+)|(?P<base>.*\blayers\.\d+\.moe)\.(?P<tail>(gate|up|down)_proj\b.*)"
)
MANIFEST = "kt_manifest.json"  # of a directory that kt_kernel.convert writes
_CONFIGS = ("config.json", "quantize_config.json", MANIFEST)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The reader of `path`, opened on first use and again only if its files changed.

    Raises CheckpointPathError if there is nothing there, CheckpointError if it cannot be a checkpoint.
    """
    real_path = os.path.realpath(path)
    if not os.path.exists(real_path):
        raise CheckpointPathError(
            f"checkpoint path '{path}' does not exist; give a local directory with .safetensors files, or "
            "one such file."
        )
    return _readers.open(real_path)


def release_checkpoints() -> None:
    """Close all readers; views still in use keep their own file open."""
    _readers.clear()


class Checkpoint(MappedFiles):
    """Names, checks and maps the tensors of one checkpoint. Files are opened when a tensor of theirs is
    needed."""

    def __init__(self, path: str) -> None:
        """`path`: an existing file or directory."""
        self.path = path
        self._files: dict[str, SafetensorsFile] = {}
        self._home_of = self._list_tensors()
        self._experts: dict[str, list[str]] | None = None
        self._configs: dict[str, dict] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._home_of

    def __len__(self) -> int:
        return len(self._home_of)

    def names(self) -> Iterable[str]:
        """All tensors, in no particular order."""
        return self._home_of.keys()

    def file_of(self, name: str) -> SafetensorsFile:
        """The file that holds the tensor; raises MissingTensorError."""
        try:
            return self._open(self._home_of[name])
        except KeyError:
            raise MissingTensorError(f"tensor '{name}' is not in the checkpoint '{self.path}'.") from None

    def info(self, name: str) -> TensorInfo:
        """What the file's header says of the tensor."""
        return self.file_of(name).info(name)

    def view(self, name: str) -> torch.Tensor:
        """The tensor as a read-only view of the mapped file."""
        return self.file_of(name).view(name)

    def expert_groups(self) -> dict[str, list[str]]:
        """Names of all expert tensors, cut at '.experts.': {'model.layers.0.mlp.experts':
        ['0.up_proj.weight', ...]}, or behind the layer: {'blk.0': ['ffn_up_exps.0.numa.0.weight', ...]}."""
        if self._experts is None:
            groups = defaultdict(list)
            for name in self._home_of:
                head, found, tail = name.partition(_EXPERTS)
                if found:
                    groups[head + ".experts"].append(tail)
                elif cut := _CUT_EXPERTS.fullmatch(name):
                    groups[cut[1] or cut["base"]].append(cut[2] or cut["tail"])
            self._experts = dict(groups)
        return self._experts

    def config(self, file_name: str = "config.json") -> dict:
        """A JSON file beside the weights; {} if there is none. Raises CheckpointError for a damaged one."""
        if file_name not in self._configs:
            directory = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
            self._configs[file_name] = _read_config(os.path.join(directory, file_name))
        return self._configs[file_name]

    def _open(self, path: str) -> SafetensorsFile:
        if path not in self._files:
            self._files[path] = SafetensorsFile(path)
        return self._files[path]

    def _list_tensors(self) -> dict[str, str]:
        """Tensor name -> path of the file that holds it."""
        if os.path.isfile(self.path):
            return dict.fromkeys(self._open(self.path).tensors, self.path)
        index = _find_index(self.path)
        if index is not None:
            return _read_index(index)
        paths = sorted(entry.path for entry in os.scandir(self.path) if entry.name.endswith(".safetensors"))
        if not paths:
            raise CheckpointPathError(
                f"directory '{self.path}' holds no .safetensors file; give the directory with the model's "
                "weights."
            )
        home_of: dict[str, str] = {}
        for path in paths:
            for name in self._open(path).tensors:
                if name in home_of:
                    raise CheckpointError(
                        f"tensor '{name}' is in both '{home_of[name]}' and '{path}', and no index says which "
                        "one counts; remove the file that does not belong."
                    )
                home_of[name] = path
        return home_of


def _find_index(directory: str) -> str | None:
    usual = os.path.join(directory, "model" + _INDEX_SUFFIX)
    if os.path.exists(usual):
        return usual
    indices = sorted(entry.path for entry in os.scandir(directory) if entry.name.endswith(_INDEX_SUFFIX))
    if len(indices) > 1:
        raise CheckpointError(
            f"directory '{directory}' has {len(indices)} index files and none is called "
            f"model{_INDEX_SUFFIX}: {', '.join(os.path.basename(path) for path in indices)}; keep the one "
            "that counts."
        )
    return indices[0] if indices else None


def _read_index(index_path: str) -> dict[str, str]:
    directory = os.path.dirname(index_path)
    try:
        with open(index_path, encoding="utf-8") as file:
            weight_map = json.load(file, object_pairs_hook=without_repetition)["weight_map"]
        home_of = {name: os.path.join(directory, file_name) for name, file_name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"index file '{index_path}' is damaged (no readable 'weight_map': {error}); download it again."
        ) from error
    for path in sorted(set(home_of.values())):
        if not os.path.normpath(path).startswith(os.path.normpath(directory) + os.sep):
            raise CheckpointError(
                f"index file '{index_path}' names '{path}', which is not in its directory; expected names "
                "of files beside it."
            )
        if not os.path.exists(path):
            raise CheckpointPathError(
                f"index file '{index_path}' names '{os.path.basename(path)}', which is not there; download "
                "the missing file."
            )
    return home_of


def _read_config(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"file '{path}' is damaged ({error}); download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"file '{path}' holds a {type(config).__name__}, expected an object; download it again."
        )
    return config


_readers = OpenReaders(Checkpoint, (".safetensors", _INDEX_SUFFIX, *_CONFIGS))
