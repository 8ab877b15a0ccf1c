"""The YAML file of a run: every key, its type, and its default."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kt_kernel.errors import ConfigurationError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LoraSettings:
    """`target_modules`: besides the routed experts, which are left out with `experts: false`."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ATTENTION
    experts: bool = True


@dataclass(frozen=True)
class TrainSettings:
    """`steps` counts changes of the weights; 0 = `epochs` passes over the data. Each takes
    `batch_size` times `accumulate` texts, cut to `max_length` tokens. `warmup`: share of the steps."""

    epochs: float = 1
    steps: int = 0
    batch_size: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_norm: float = 1.0
    max_length: int = 1024
    gradient_checkpointing: bool = False
    save_every: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """`model`: a directory, a repository of the Hub, or "demo". `experts`, `dtype`, `device`, `threads`:
    as of kt_kernel.training.load. `data`: JSONL (data.py). `output`: where everything goes."""

    model: str
    data: str
    output: str
    experts: str = "as stored"
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @property
    def adapter(self) -> Path:
        return Path(self.output) / "adapter"


def read_run(path: str) -> Run:
    """The run that the file describes; paths in it are relative to the file.

    Raises ConfigurationError for a file that cannot be read, or a key or value that does not belong there.
    """
    file = Path(path).expanduser()
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"'{path}' cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"'{path}' is not YAML: {' '.join(str(error).split())}.") from error
    run = _filled(Run, said, f"'{path}'")
    _check_ranges(run, f"'{path}'")
    here = file.parent
    beside = {name: str(here / Path(getattr(run, name)).expanduser()) for name in ("data", "output")}
    if run.model != "demo" and (here / Path(run.model).expanduser()).exists():
        beside["model"] = str(here / Path(run.model).expanduser())
    return dataclasses.replace(run, **beside)


# (part of the file, key, least, most); None: without an end.
_RANGES: tuple[tuple[str, str, float, float | None], ...] = (
    ("train", "epochs", 1e-6, None),
    ("train", "steps", 0, None),
    ("train", "batch_size", 1, None),
    ("train", "accumulate", 1, None),
    ("train", "learning_rate", 0, None),
    ("train", "warmup", 0, 1),
    ("train", "weight_decay", 0, None),
    ("train", "max_norm", 0, None),
    ("train", "max_length", 2, None),
    ("train", "save_every", 0, None),
    ("train", "seed", 0, 2**63 - 1),
    ("lora", "r", 1, None),
    ("lora", "dropout", 0, 0.999),
)


def _check_ranges(run: Run, where: str) -> None:
    for part, key, least, most in _RANGES:
        value = getattr(getattr(run, part), key)
        if not (least <= value < math.inf and (most is None or value <= most)):
            end = "up" if most is None else f"to {most:g}"
            raise ConfigurationError(
                f"{where}, {part}, {key} is {value!r}, expected a number from {least:g} {end}."
            )


def _filled(kind: type, said: Any, where: str) -> Any:
    if not isinstance(said, dict):
        raise ConfigurationError(f"{where} holds {said!r}, expected keys with values.")
    fields = {each.name: each for each in dataclasses.fields(kind)}
    for key in said:
        if key not in fields:
            raise ConfigurationError(f"{where} has the key {key!r}, expected one of {', '.join(fields)}.")
    for name, each in fields.items():
        has_default = (
            each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING
        )
        if name not in said and not has_default:
            raise ConfigurationError(f"{where} has no key '{name}', which every run needs.")
    return kind(**{key: _value(fields[key], value, f"{where}, {key}") for key, value in said.items()})


_NESTED = {"lora": LoraSettings, "train": TrainSettings}


def _value(each: dataclasses.Field, value: Any, where: str) -> Any:
    """Checked against the type of the default; "1e-4", which YAML takes for text, is a number."""
    if each.name in _NESTED:
        return _filled(_NESTED[each.name], value, where)
    kind = str(each.type)
    if kind == "float":
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ConfigurationError(f"{where} is {value!r}, expected a number.") from None
    if kind.startswith("tuple"):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigurationError(f"{where} is {value!r}, expected a list of names.")
    right: Any = {"int": int, "bool": bool, "str": str, "int | None": (int, type(None))}[kind]
    if not isinstance(value, right) or (kind.startswith("int") and isinstance(value, bool)):
        raise ConfigurationError(f"{where} is {value!r}, expected {kind.replace(' | None', '')}.")
    return value
