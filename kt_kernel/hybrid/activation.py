"""How often experts were used in an earlier run, from a file: what the `frequency` placement starts from.

    .pt     a tensor, or a dict with the tensor `logical_count` (what recorders write); no pickled code is run
    .json   nested lists, or an object with them under "logical_count"
    .npy    an array

Shapes: [layers, experts], or [steps, layers, experts], which are summed.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from kt_kernel.errors import ConfigurationError

COUNTS_KEY = "logical_count"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _read_npy(path: Path) -> Any:
    return numpy.load(path, allow_pickle=False)


def _read_pt(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch explains how to run the code that is in the file
        raise ValueError(
            "it holds other things than tensors and numbers, and no code of a file is run"
        ) from None


_READERS: dict[str, Callable[[Path], Any]] = {".pt": _read_pt, ".json": _read_json, ".npy": _read_npy}


def read_activation_counts(path: str | Path, num_layers: int, num_experts: int) -> torch.Tensor:
    """Uses per expert, float64 [num_layers, num_experts]. Raises ConfigurationError, naming the file."""
    path = Path(path)
    counts = _as_tensor(path, _read(path))
    if counts.dim() == 3:
        counts = counts.sum(0)
    if counts.shape != (num_layers, num_experts):
        raise ConfigurationError(
            f"expert statistics {path} have shape {list(counts.shape)} (layers, experts), but the model has "
            f"{[num_layers, num_experts]}; record them with this model."
        )
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise ConfigurationError(
            f"expert statistics {path} hold values that are no counts (NaN, infinite or negative), expected "
            "numbers of uses; record them again."
        )
    if not bool(counts.any()):
        raise ConfigurationError(
            f"expert statistics {path} are all zero: no token was recorded; record them while the model "
            "answers requests."
        )
    return counts


def _read(path: Path) -> Any:
    if path.suffix not in _READERS:
        raise ConfigurationError(
            f"expert statistics {path} end in {path.suffix!r}, expected one of {', '.join(_READERS)}; name "
            "such a file."
        )
    if not path.is_file():
        raise ConfigurationError(
            f"expert statistics {path} do not exist or are no file; name one that was recorded."
        )
    try:
        return _READERS[path.suffix](path)
    except Exception as error:  # each reader has its own set, and none tells more than "damaged"
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"expert statistics {path} cannot be read as {path.suffix} ({reason}); record them again."
        ) from error


def _as_tensor(path: Path, content: Any) -> torch.Tensor:
    if isinstance(content, dict):
        if COUNTS_KEY not in content:
            raise ConfigurationError(
                f"expert statistics {path} have the keys {sorted(map(str, content))}, expected "
                f"{COUNTS_KEY!r}; record them again."
            )
        content = content[COUNTS_KEY]
    try:
        counts = torch.as_tensor(content).to(torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"expert statistics {path} are no table of numbers ({error}), expected [layers, experts]; record "
            "them again."
        ) from error
    return counts
